"""Reading ONNX: drawn models against ONNX Runtime, exporters' files; what is refused, by name."""

import io
import math
import warnings

import numpy as np
import pytest
from hostile import survives
from oracles import agree
from places import need

import nnfwd
from nnfwd import Activation, Dense, Limits, Network, Scale, activations
from nnfwd.errors import ModelFileError

onnx = need("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_models import ACTIVATIONS, SINCE, chain, drawn, model, session  # noqa: E402


@pytest.fixture
def load(tmp_path):
    """The network of a model, by way of a file."""

    def load(made, **arguments):
        path = tmp_path / "model.onnx"
        path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
        return nnfwd.load(path, **arguments)

    return load


def normal(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


W, B = normal(4, 3), normal(4, seed=1)
GEMM = ("Gemm", ["x", W, B], {"transB": 1})


# ONNX Runtime as the oracle


def compare(load, made, x):
    net = load(made)
    theirs = session(made).run(None, {"x": x})[0]
    flat = x if net.input_shape is None else x.reshape(*x.shape[: -len(net.input_shape)], -1)
    assert net(flat).size == theirs.size
    return agree(net, flat, theirs.reshape(net(flat).shape), "onnxruntime", "float32")


@pytest.mark.parametrize("operator", ACTIVATIONS)
def test_every_activation_agrees_with_onnxruntime(operator, load):
    need("onnxruntime")
    inputs = {"PRelu": [normal(4, seed=2)], "Clip": [np.float32(-0.5), np.float32(0.7)]}
    made = chain(GEMM, (operator, inputs.get(operator, [])), opset=max(17, SINCE.get(operator, 17)))
    compare(load, made, 3 * normal(50, 3))


def test_drawn_models_agree_with_onnxruntime(load, note):
    """What is read is what it computes; what ONNX Runtime computes and we refuse is refused as an error of ours."""
    need("onnxruntime")
    read = refused = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        made, shape = drawn(rng)
        x = rng.standard_normal(shape).astype("float32")
        try:
            load(made)
            session(made).run(None, {"x": x})
        except ModelFileError:
            refused += 1
        except Exception as error:  # ONNX Runtime's own refusal of shapes that do not fit, or not implemented
            assert type(error).__module__.startswith("onnxruntime")
        else:
            compare(load, made, x)
            read += 1
    note(f"{read} drawn ONNX models agree with ONNX Runtime, {refused} are no chain")
    assert read >= 100


# Exporters


def exported(module, *shape, opset=17, dynamic=True):
    torch = need("torch")
    file = io.BytesIO()
    axes = {"x": {0: "batch"}} if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter that needs no other package
        torch.onnx.export(
            module.eval(), (torch.zeros(*shape),), file, opset_version=opset, dynamo=False, input_names=["x"], dynamic_axes=axes
        )  # fmt: skip
    return file.getvalue()


@pytest.mark.parametrize("opset", [11, 14, 17, 20])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GELU()", "gelu"),
        ("GELU(approximate='tanh')", "gelu_tanh"),
        ("Mish()", "mish"),
        ("SiLU()", "silu"),
        ("Hardswish()", "hard_silu"),
        ("Hardsigmoid()", "hard_sigmoid(alpha=0.1666666716337204, beta=0.5)"),
        ("LogSigmoid()", "log_sigmoid"),
        ("ReLU6()", "relu6"),
        ("Hardtanh()", "hard_tanh"),
        ("Hardtanh(-2, 3)", "clip(lower=-2.0, upper=3.0)"),
        ("Softsign()", "softsign"),
        ("Softplus()", "softplus"),
        ("SELU()", "selu"),
        ("ELU(0.5)", "elu(alpha=0.5)"),
        ("LeakyReLU(0.25)", "leaky_relu(negative_slope=0.25)"),
        ("PReLU()", "prelu(negative_slope=0.25)"),
        ("PReLU(4)", "prelu(negative_slope=array(4,))"),
        ("Softmax(1)", "softmax"),
        ("LogSoftmax(-1)", "log_softmax"),
        ("Sequential(torch.nn.Dropout(0.3), torch.nn.Tanh())", "tanh"),
    ],
)
def test_activations_as_torch_exports_them(name, expected, opset, load):
    torch = need("torch")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), eval(f"torch.nn.{name}"))
    net = load(exported(module, 2, 3, opset=opset))
    assert len(net) == 1
    assert repr(net[0].activation) == expected
    x = 3 * normal(50, 3)
    with torch.no_grad():
        agree(net, x, module(torch.from_numpy(x)).numpy(), "torch", "float32")


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    "how", ["x.flatten(1)", "x.view(x.size(0), -1)", "x.view(-1, 12)", "x.reshape(x.shape[0], 12)"]
)
@pytest.mark.parametrize("opset", [11, 17])
def test_flattening_as_torch_exports_it(how, opset, dynamic, load):
    torch = need("torch")

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(12, 2)

        def forward(self, x):
            return self.linear(eval(how))

    module = Flat()
    net = load(exported(module, 2, 1, 3, 4, opset=opset, dynamic=dynamic))
    assert net.input_shape == (1, 3, 4)
    x = normal(2, 1, 3, 4)
    with torch.no_grad():
        agree(net, x.reshape(2, -1), module(torch.from_numpy(x)).numpy(), "torch", "float32")


def test_batch_normalisation_and_free_axes_as_torch_exports_them(load):
    torch = need("torch")
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(4, eps=0.01)
    norm(torch.randn(20, 4))
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), norm, torch.nn.ReLU(), torch.nn.Linear(4, 2))
    net = load(exported(module, 2, 3))
    assert [type(layer).__name__ for layer in net] == ["Dense", "Scale", "Activation", "Dense"]
    x = normal(50, 3)
    with torch.no_grad():
        agree(net, x, module(torch.from_numpy(x)).numpy(), "torch", "float32")
    free = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2, bias=False))
    net = load(exported(free, 2, 5, 3))
    assert [type(layer).__name__ for layer in net] == ["Dense", "Dense"]
    assert net[1].bias is None
    x = normal(2, 5, 3)
    with torch.no_grad():
        agree(net, x, free(torch.from_numpy(x)).numpy(), "torch", "float32")


def classifier(labels, *before, activation="relu"):
    need("sklearn")
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline

    x = normal(60, 4)
    mlp = MLPClassifier((5,), activation=activation, max_iter=30, random_state=0, tol=0, n_iter_no_change=100)
    return make_pipeline(*before, mlp).fit(x, np.asarray(labels)[(x[:, 0] > 0) * 1 + (x[:, 1] > 0) * (len(labels) > 2)])


@pytest.mark.filterwarnings("ignore")  # of training that stops early, and of skl2onnx
@pytest.mark.parametrize("zipmap", [True, False])
@pytest.mark.parametrize("target", [9, 15, 21])
@pytest.mark.parametrize("labels", [[0, 1], ["no", "yes"], [3, 5, 7], ["a", "b", "c"]])
@pytest.mark.parametrize("before", ["none", "StandardScaler", "MinMaxScaler"])
def test_skl2onnx_classifiers(labels, before, target, zipmap, load):
    skl2onnx = need("skl2onnx")
    from sklearn import preprocessing

    steps = [] if before == "none" else [getattr(preprocessing, before)()]
    fitted = classifier(labels, *steps, activation="tanh" if zipmap else "logistic")
    options = {id(fitted[-1]): {"zipmap": zipmap}}
    made = skl2onnx.to_onnx(fitted, normal(1, 4), target_opset={"": target, "ai.onnx.ml": 1}, options=options)
    net = load(made)
    assert net.classes == tuple(labels)
    assert [type(layer).__name__ for layer in net] == ["Scale"] * len(steps) + ["Dense", "Dense"]
    last = "sigmoid" if len(labels) == 2 else "softmax"
    assert net[-1].activation.name == last
    x = normal(50, 4, seed=3)
    assert list(nnfwd.labels(net, net(x))) == list(fitted.predict(x))
    need("onnxruntime")
    probabilities = session(made).run(None, {"X": x})[1]
    columns = (
        np.array([[row[label] for label in labels] for row in probabilities], "float32") if zipmap else probabilities
    )
    agree(net, x, columns[:, 1:] if len(labels) == 2 else columns, "onnxruntime", "float32")


@pytest.mark.filterwarnings("ignore")
def test_skl2onnx_regressor(load):
    skl2onnx = need("skl2onnx")
    from sklearn.neural_network import MLPRegressor

    x = normal(60, 4, dtype="float64")
    fitted = MLPRegressor(hidden_layer_sizes=(5,), max_iter=30, random_state=0).fit(x, x[:, 0])
    net = load(skl2onnx.to_onnx(fitted, x[:1]))
    assert net.dtype == "float64"
    for layer, weight, bias in zip(net, fitted.coefs_, fitted.intercepts_, strict=True):
        np.testing.assert_array_equal(layer.weight, weight.T)
        np.testing.assert_array_equal(layer.bias, bias)


# What the operators become


def same(net, *layers, **kept):
    assert net == Network(layers, **kept)
    assert repr(net) == repr(Network(layers, **kept))


@pytest.mark.parametrize("bias", [np.float32(0.5), normal(1), B, B.reshape(1, 4)])
def test_gemm_bias_is_broadcast(bias, load):
    net = load(chain(("Gemm", ["x", W.T, bias])))
    same(net, Dense(W, np.broadcast_to(bias.reshape(-1), 4)))


def test_gemm_factors(load):
    same(load(chain(("Gemm", ["x", W, B], {"transB": 1, "beta": 2.0}))), Dense(W, 2 * B))
    same(load(chain(("Gemm", ["x", W, B], {"transB": 1, "alpha": 0.5}))), Dense(W), Scale(0.5, shift=B))
    same(load(chain(("Gemm", ["x", W, None], {"transB": 1}))), Dense(W))


def test_matmul_and_add(load):
    same(load(chain(("MatMul", ["x", W.T]), ("Add", [B, "x"]))), Dense(W, B))
    same(load(chain(("MatMul", ["x", W.T]), ("Relu",), ("Add", ["x", B]))), Dense(W, None, "relu"), Scale(1, shift=B))
    same(load(chain(("MatMul", [W, "x"]), ("Add", ["x", B]), shape=(3,))), Dense(W, B))
    same(load(chain(("MatMul", ["x", W.T]), ("Add", ["x", B]), ("Add", ["x", B]))), Dense(W, B), Scale(1, shift=B))


def test_ensemble(load):
    w, b, v = normal(5, 4, 3), normal(5, 4), normal(2, 4)
    made = chain(("MatMul", ["x", w.transpose(0, 2, 1)]), ("Add", ["x", b[:, None]]), ("Tanh",), ("MatMul", ["x", v.T]))
    net = load(made)
    same(net, Dense(w, b, "tanh"), Dense(v))
    need("onnxruntime")
    x = normal(7, 3)
    agree(net, x, session(made).run(None, {"x": x})[0], "onnxruntime", "float32")


def test_scale_is_one_layer_and_never_folded(load):
    c, s, t = normal(3), normal(3, seed=1), normal(3, seed=2)
    made = chain(
        ("Sub", ["x", c]), ("Mul", ["x", s]), ("Add", ["x", t]), GEMM, ("Mul", ["x", np.float32(2)]), ("Tanh",)
    )
    same(load(made), Scale(s, center=c, shift=t), Dense(W, B), Scale(2), Activation("tanh"))
    inverse = (1 / s.astype("float64")).astype("float32")
    same(load(chain(("Sub", ["x", c[None]]), ("Div", ["x", s]))), Scale(inverse, center=c))
    same(load(chain(("Sub", [c, "x"]))), Scale(-1, center=c))
    same(load(chain(("Add", ["x", c]), ("Mul", ["x", s]))), Scale(1, shift=c), Scale(s))
    same(load(chain(("Mul", ["x", s]), ("Sub", ["x", c]))), Scale(s), Scale(1, center=c))
    same(
        load(chain(("Scaler", [], {"offset": [1.0, 2.0, 3.0], "scale": [2.0]}))), Scale(2, center=np.float32([1, 2, 3]))
    )


def test_consecutive_linear_layers_stay(load):
    same(load(chain(GEMM, ("Gemm", ["x", W]))), Dense(W, B), Dense(W.T))


@pytest.mark.parametrize(
    ("steps", "shape", "kept"),
    [
        ([("Flatten",)], ("batch", 1, 3), (1, 3)),
        ([("Flatten",)], (1, 3), None),
        ([("Flatten", [], {"axis": -1})], (2, 5, 3), None),
        ([("Reshape", [np.array([-1, 3])])], ("batch", 3, 1), (3, 1)),
        ([("Reshape", [np.array([1, -1])])], ("batch", 3, 1), (3, 1)),
        ([("Reshape", [np.array([0, 3])])], ("batch", 3), None),
        ([("Reshape", [np.array([8, 3])])], ("batch", 3), None),
        ([("Reshape", [np.array([0, -1])])], ("batch", 3), None),
        ([("Reshape", [np.array([-1, 3])])], (3,), None),
        ([("Unsqueeze", [np.array([0])])], (3,), None),
        ([("Squeeze", [np.array([1])])], ("batch", 1, 3), (1, 3)),
        ([("Identity",), ("Cast", [], {"to": 1}), ("Dropout",), ("Flatten",)], ("batch", 1, 3), (1, 3)),
        ([("Unsqueeze", [np.array([1])]), ("Squeeze", [np.array([-2])])], ("batch", 3), None),
    ],
)
def test_shapes_of_the_input(steps, shape, kept, load):
    same(load(chain(*steps, GEMM, shape=shape)), Dense(W, B), input_shape=kept)


def test_two_free_axes_stay(load):
    made = chain(("Reshape", [np.array([0, 0, 3])]), ("MatMul", ["x", W.T]), shape=("b", "t", 3))
    same(load(made), Dense(W))


def test_older_operators_broadcast_when_told_to(load):
    made = chain(("Gemm", ["x", W.T, B], {"broadcast": 1}), ("Add", ["x", B], {"broadcast": 1, "axis": 1}), opset=6)
    same(load(made), Dense(W, B), Scale(1, shift=B))


def test_scaled_and_then_flattened(load):
    made = chain(("Div", ["x", np.float32(255)]), ("Flatten",), GEMM, shape=("batch", 3, 1))
    same(load(made), Scale(1 / 255), Dense(W, B), input_shape=(3, 1))


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize(("part", "rows"), [(0, slice(0, 2)), (1, slice(2, 4))])
def test_split_keeps_rows(opset, part, rows, load):
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
        helper.make_node("Split", ["h"], ["p0", "p1"], axis=-1, **({"num_outputs": 2} if opset == 18 else {})),
        helper.make_node("Tanh", [f"p{part}"], ["y"]),
    ]
    same(load(model(nodes, {"w": W, "b": B}, opset=opset)), Dense(W[rows], B[rows], "tanh"))


def test_split_in_given_sizes(load):
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], transB=1),
        helper.make_node("Split", ["h", "sizes"], ["p0", "y"], axis=1),
    ]
    same(load(model(nodes, {"w": W, "sizes": np.array([3, 1])})), Dense(W[3:]))


def test_constants_in_nodes_and_among_the_inputs(load):
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(W)),
        helper.make_node("Transpose", ["w"], ["wt"]),
        helper.make_node("Identity", ["b"], ["b2"]),
        helper.make_node("Gemm", ["x", "wt", "b2"], ["h"]),
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Mul", ["two", "h"], ["y"]),
    ]
    made = model(nodes, {"b": B})
    made.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [4]))
    same(load(made), Dense(W, B), Scale(2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("raw", [True, False])
def test_weights_of_every_dtype(dtype, raw, load):
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) if dtype != "bfloat16" else TensorProto.BFLOAT16
    values = np.array([[1.5, -0.25, 2**-15], [np.inf, -0.0, 2]], "float32")
    if dtype == "bfloat16":
        bits = (values.view("u4") >> 16).astype("u2")
        tensor = helper.make_tensor("w", element, (2, 3), bits.tobytes() if raw else values.ravel(), raw=raw)
        held = (bits.astype("u4") << 16).view("float32")
    else:
        held = values.astype(dtype)
        tensor = helper.make_tensor("w", element, (2, 3), held.tobytes() if raw else held.ravel(), raw=raw)
    made = chain(("Gemm", ["x", W], {"transB": 1}))
    made.graph.input[0].type.tensor_type.elem_type = element
    made.graph.initializer[0].CopyFrom(tensor)
    made.graph.initializer[0].name = "c0.1"
    net = load(made)
    assert net[0].weight.dtype == held.dtype
    np.testing.assert_array_equal(net[0].weight, held)


def test_parameters_are_the_file_s(load):
    """A stated one as it is, an absent one by ONNX's own default, both float32."""
    f32 = np.float32
    for operator, attributes, function in [
        ("LeakyRelu", {}, activations.leaky_relu(negative_slope=f32(0.01))),
        ("LeakyRelu", {"alpha": 0.3}, activations.leaky_relu(negative_slope=f32(0.3))),
        ("HardSigmoid", {}, activations.hard_sigmoid(alpha=f32(0.2), beta=0.5)),
        ("HardSigmoid", {"alpha": 0.3, "beta": 0.1}, activations.hard_sigmoid(alpha=f32(0.3), beta=f32(0.1))),
        ("Elu", {}, activations.elu(alpha=1.0)),
        ("ThresholdedRelu", {}, activations.thresholded_relu(alpha=1.0)),
        ("Selu", {}, activations.selu),
    ]:
        same(load(chain(GEMM, (operator, [], attributes))), Dense(W, B, function))
    same(load(chain(("Selu", [], {"alpha": 2.0, "gamma": 3.0}))), Activation(activations.elu(alpha=2)), Scale(3))


@pytest.mark.parametrize(
    ("given", "to", "dtype"),
    [("float64", "float32", 1), ("float16", "float32", 1), ("int64", "float32", 1), ("float32", "float64", 11)],
)
def test_one_cast_of_the_input(given, to, dtype, load):
    made = chain(("Cast", [], {"to": dtype}), ("MatMul", ["x", W.T.astype(to)]))
    made.graph.input[0].type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(given))
    same(load(made), Dense(W.astype(to)))


def test_casts_that_lose_nothing(load):
    made = chain(("Cast", [], {"to": 1}), ("Cast", [], {"to": 11}), ("Neg",), dtype="float16")
    same(load(made), Scale(-1))


@pytest.mark.parametrize(
    ("operator", "given"),
    [("Squeeze", [np.array([-1])]), ("Squeeze", [np.array([1])]), ("Reshape", [np.array([-1])])],
)
def test_one_output_squeezed_at_the_end(operator, given, load):
    made = chain(GEMM, ("Gemm", ["x", W[0, :1].repeat(4)[:, None]]), ("Sigmoid",), (operator, given))
    net = load(made)
    assert net.out_features == 1
    need("onnxruntime")
    x = normal(20, 3)
    agree(net, x, session(made).run(None, {"x": x})[0][:, None], "onnxruntime", "float32")


def test_one_output_squeezed_as_torch_exports_it(load):
    torch = need("torch")

    class Squeezed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 1)

        def forward(self, x):
            return self.linear(x).squeeze(-1)

    module = Squeezed()
    for opset in (11, 17):
        net = load(exported(module, 2, 3, opset=opset))
        x = normal(20, 3)
        with torch.no_grad():
            agree(net, x, module(torch.from_numpy(x)).numpy()[:, None], "torch", "float32")


def test_limits_and_their_names(load):
    low, high = normal(3) - 5, normal(3) + 5
    clip = activations.clip
    same(load(chain(("Max", ["x", low]), ("Min", [high, "x"]))), Activation(clip(lower=low, upper=high)))
    same(load(chain(("Max", ["x", np.float32(0)]))), Activation("relu"))
    same(load(chain(("Min", ["x", np.float32(2)]))), Activation(clip(lower=-math.inf, upper=2)))
    same(load(chain(("Clip", [], {"min": 0.0, "max": 6.0}), opset=9)), Activation("relu6"))
    same(load(chain(("Clip", [np.float32(-1), np.float32(1)]))), Activation("hard_tanh"))
    same(load(chain(("Clip", [np.float32(0)]))), Activation("relu"))
    for one in (np.float32, lambda a: np.array([a], "float32")):
        for shape in (("b", 3), ("b", 1)):
            same(load(chain(("Max", ["x", one(-1)]), ("Min", ["x", one(1)]), shape=shape)), Activation("hard_tanh"))
            same(load(chain(("Max", ["x", one(0)]), ("Min", ["x", one(6)]), shape=shape)), Activation("relu6"))
            slope = activations.prelu(negative_slope=0.25)
            same(load(chain(("PRelu", ["x", one(0.25)]), shape=shape)), Activation(slope))
    same(load(chain(GEMM, ("Clip", []))), Dense(W, B))


# Refused, by name


SQUARE = normal(3, 3)
REFUSED = {
    "unknown operator": ([GEMM, ("Sin",)], "Sin 'n1': an unknown operator"),
    "convolution": ([("Conv", ["x", W])], "Conv 'n0': an unknown operator"),
    "recurrent": ([("LSTM", ["x", W, W])], "LSTM"),
    "unknown attribute": ([("Relu", [], {"slope": 0.1})], "Relu 'n0': unknown attribute slope"),
    "attribute of another type": ([("LeakyRelu", [], {"alpha": 1})], "its attribute alpha is of type int"),
    "softmax over the batch": ([GEMM, ("Softmax", [], {"axis": 0})], "over axis 0 of 2"),
    "transposed input": ([("Gemm", ["x", W.T], {"transA": 1})], "not transposed"),
    "a bias for each row": ([("Gemm", ["x", W.T, normal(2, 4)])], r"its bias \(2, 4\)"),
    "a column of biases": ([("Gemm", ["x", normal(3, 2), normal(2, 1)])], r"its bias \(2, 1\)"),
    "from the left": ([("MatMul", [W, "x"])], "from the left"),
    "a vector": ([("MatMul", ["x", normal(3)])], r"float32 \(3,\)"),
    "a weight of whole numbers": ([("MatMul", ["x", np.ones((3, 2), "int64")])], "int64"),
    "a constant for each row": ([("Mul", ["x", normal(2, 3)])], r"\(2, 3\) is not one number a feature"),
    "more axes": ([("Add", ["x", normal(1, 1, 3)])], "is not one number a feature"),
    "another width": ([GEMM, ("Mul", ["x", normal(3)])], "takes 3 features, 4 come in"),
    "another input": ([("MatMul", ["x", normal(5, 2)])], "takes 5 features, 3 come in"),
    "divided by x": ([("Div", [np.float32(1), "x"])], "must be its first input"),
    "training": ([("Dropout", [np.float32(0.5), np.array(True)])], "training mode"),
    "cast between layers": ([GEMM, ("Cast", [], {"to": 10})], "from float32 to float16"),
    "cast to a narrower dtype and back": (
        [("Cast", [], {"to": 10}), ("Cast", [], {"to": 1}), ("MatMul", ["x", W.T])],
        "Cast 'n1' to float32 rounds x to float16 first: cannot be represented",
    ),
    "cast twice": (
        [("Cast", [], {"to": 1}), ("Cast", [], {"to": 10}), ("MatMul", ["x", W.T.astype("f2")])],
        "rounds x to float32 first",
        {"dtype": "float64"},
    ),
    "squeezed in the middle": (
        [("MatMul", ["x", W[:1].T]), ("Squeeze", [np.array([-1])]), ("Tanh",)],
        r"\(\?, 1\) to \(\?\).* at the very end: leave it out and reshape the result",
    ),
    "cast to an integer": ([("Cast", [], {"to": 7})], "from float32 to int64"),
    "flattened after a layer": ([GEMM, ("Reshape", [np.array([-1, 2])])], "cannot be given the shape"),
    "a limit for each feature": ([("Clip", [normal(3)])], r"Clip 'n0': its input 1 is \(3,\)"),
    "an unknown gelu": ([("Gelu", [], {"approximate": "erf"})], "approximate is b'erf'", {"opset": 20}),
    "a slope that is missing": ([("PRelu",)], "PRelu 'n0' has no input 1"),
    "slopes along axis 1": ([("PRelu", ["x", normal(2)])], "go with axis 1 of 3", {"opset": 6, "shape": ("b", 2, 2)}),
    "added along axis 0": ([("Add", ["x", normal(3)], {"broadcast": 1, "axis": 0})], "goes with axis 0", {"opset": 6}),
    "an axis too far": ([("Flatten", [], {"axis": 5})], "no axis 5 of 2"),
    "a shape of fractions": ([("Reshape", ["x", normal(2)])], "a few whole numbers"),
    "batch normalisation in training": (
        [("BatchNormalization", ["x", *[normal(3)] * 4], {"training_mode": 1})],
        "in training mode",
    ),
    "batch normalisation over axis 1": (
        [("BatchNormalization", ["x", *[normal(2)] * 4])],
        "over axis 1 of 3",
        {"shape": ("b", 2, 3)},
    ),
    "a scaler in the middle": ([GEMM, ("Scaler",)], "must come first"),
    "a bias of other members": (
        [("MatMul", ["x", normal(5, 3, 4)]), ("Add", ["x", normal(2, 1, 4)])],
        "does not fit 5 members",
    ),
    "no axes": ([("Identity",)], "1 to 8 axes", {"shape": ()}),
    "an input too many": ([("Relu", ["x", normal(3)])], "Relu 'n0' has 2 inputs"),
    "an input too few": ([("Add",)], "has one input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, load):
    steps, message, *settings = REFUSED[name]
    with pytest.raises(ModelFileError, match=message):
        load(chain(*steps, **(settings[0] if settings else {})))


def test_swish_with_another_slope_is_refused(load):
    same(load(chain(("Swish",), opset=24)), Activation("silu"))
    with pytest.raises(ModelFileError, match=r"Swish 'n0': its alpha is 2\.0"):
        load(chain(("Swish", [], {"alpha": 2.0}), opset=24))


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([("Relu", ["x"], ["a"]), ("Tanh", ["x"], ["b"]), ("Add", ["a", "b"], ["y"])], "Add 'n2' joins 'a' and 'b': a branch"),
        ([("Relu", ["x"], ["a"]), ("Concat", ["a", "x"], ["y"])], "Concat 'n1': an unknown operator"),
        ([("Relu", ["x"], ["a"]), ("Add", ["a", "x"], ["y"])], "a branch"),
        ([("Mul", ["x", "x"], ["y"])], "a branch"),
        ([("Relu", ["x"], ["a"]), ("MatMul", ["x", "a"], ["y"])], "a branch"),
        ([("Relu", ["x"], ["a"]), ("Tanh", ["x"], ["y"])], "Relu 'n0' leads to no output"),
        ([("Relu", ["a"], ["y"]), ("Tanh", ["x"], ["a"])], "which no node before it gives"),
        ([("Relu", ["y"], ["y"])], "which no node before it gives"),
        ([("Relu", ["x"], ["y"]), ("Tanh", ["x"], ["y"])], "two values of one name, 'y'"),
        ([("Relu", ["x"], ["x"])], "two values of one name, 'x'"),
        ([("Relu", ["x"], ["h"])], "no node gives the output 'y'"),
        ([("Relu", ["x"], [])], "has no output"),
        ([("Relu", ["w"], ["y"])], "constants only"),
        ([("Identity", ["w"], ["y"])], "depends on no input"),
        ([("Sum", ["x", "w", "w"], ["y"])], "Sum 'n0': an unknown operator"),
        ([("Sigmoid", ["x"], ["a"]), ("Tanh", ["a"], ["b"]), ("Mul", ["x", "b"], ["y"])], "a branch"),
        ([("Dropout", ["x"], ["a", "y"])], "only its first output"),
    ],
)  # fmt: skip
def test_a_branch_is_refused(nodes, message, load):
    made = [helper.make_node(operator, i, o, f"n{k}") for k, (operator, i, o) in enumerate(nodes)]
    with pytest.raises(ModelFileError, match=message):
        load(model(made, {"w": normal(3)}))


def test_split_elsewhere_is_refused(load):
    for nodes in (
        [("Split", ["x"], ["y", "b"])],
        [("Gemm", ["x", "w"], ["h"]), ("Tanh", ["h"], ["t"]), ("Split", ["t"], ["y", "b"])],
    ):
        made = [
            helper.make_node(operator, i, o, **({"axis": 1} if operator == "Split" else {})) for operator, i, o in nodes
        ]
        with pytest.raises(ModelFileError, match="Split 'y'"):
            load(model(made, {"w": SQUARE}))


@pytest.mark.filterwarnings("ignore")
def test_several_outputs_are_refused(load):
    made = [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Tanh", ["a"], ["b"])]
    with pytest.raises(ModelFileError, match="2 outputs, a, b: one is read, of a classifier its probabilities"):
        load(model(made, outputs=("a", "b")))
    skl2onnx = need("skl2onnx")
    from sklearn.neural_network import MLPClassifier

    x = normal(60, 4)
    several = MLPClassifier((3,), max_iter=5).fit(x, np.stack([x[:, 0] > 0, x[:, 1] > 0], 1))
    with pytest.raises(ModelFileError, match=r"2 outputs.*zipmap.*or load the estimator or its \.skops"):
        load(skl2onnx.to_onnx(several, x[:1]))
    one = classifier([3, 5, 7])
    options = {id(one[-1]): {"zipmap": "columns"}}
    with pytest.raises(ModelFileError, match=r"4 outputs, \w+, \w+, \w+, \w+: one is read.*zipmap': False"):
        load(skl2onnx.to_onnx(one, x[:1], options=options))


def edited(change):
    made = chain(GEMM, ("Relu",))
    change(made)
    return made


def _function(made):
    made.functions.add().name = "f"


def _subgraph(made):
    made.graph.node[1].CopyFrom(helper.make_node("If", ["h0"], ["y"], then_branch=made.graph, else_branch=made.graph))


def _external(made, path="../../etc/passwd"):
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=path)


def _sparse(made):
    made.graph.sparse_initializer.add().dims.append(3)


def _dims(*dims):
    def change(made):
        made.graph.initializer[0].dims[:] = dims

    return change


def _twice(made):
    made.graph.initializer.add().CopyFrom(made.graph.initializer[0])


def _many(made):
    made.graph.node[1].ClearField("op_type")
    del made.graph.node[1:]
    for i in range(20_000):
        made.graph.node.append(helper.make_node("Relu", [f"r{i - 1}" if i else "h0"], [f"r{i}"]))
    made.graph.output[0].name = "r19999"


def _both(made):
    made.graph.initializer[0].float_data.extend([1.0] * 12)


def _opsets(*opsets):
    def change(made):
        del made.opset_import[:]
        made.opset_import.extend(helper.make_opsetid(*opset) for opset in opsets)

    return change


def _domain(made):
    made.graph.node[1].domain = "com.microsoft"


def _segment(made):
    made.graph.initializer[0].segment.begin = 0


def _no_shape(made):
    made.graph.input[0].type.tensor_type.ClearField("shape")


def _sequence(made):
    made.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = 1


def _no_graph(made):
    made.ClearField("graph")


def _two_inputs(made):
    made.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [1]))


def _integers(made):
    made.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64


def _reference(made):
    made.graph.node[0].attribute[0].ref_attr_name = "transB"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_function, "the model holds functions"),
        (lambda made: made.training_info.add(), "training information"),
        (_sparse, "sparse initialisers"),
        (_subgraph, "its attribute (then|else)_branch is a graph"),
        (_external, "lies in another file"),
        (lambda made: _external(made, "weights.bin"), "lies in another file"),
        (_dims(2**40, 2**20), "beyond the limits"),
        (_dims(2**24, 2**24), "raise limits.tensor"),
        (_dims(2**63 - 1, 2), "beyond the limits"),
        (_dims(-1, 3), "beyond the limits"),
        (_dims(4, 4), r"does not hold the 16 numbers"),
        (_dims(2, 3), r"does not hold the 6 numbers"),
        (_dims(*[1] * 9), "beyond the limits"),
        (_dims(0, 3), "does not hold the 0 numbers"),
        (_both, "does not hold"),
        (_segment, "data type 1"),
        (_twice, "two values of one name, 'c0.1'"),
        (_many, "beyond the limits"),
        (_opsets(("", 17), ("", 18)), "2 versions"),
        (_opsets(), "0 versions"),
        (_opsets(("", 2**40)), "opset 1099511627776 is not one of 6 to"),
        (_opsets(("", 5)), "opset 5"),
        (_opsets(("", -1)), "opset -1"),
        (_domain, "the operators of 'com.microsoft' are unknown"),
        (_no_shape, "has no shape"),
        (_sequence, "has no shape"),
        (_no_graph, "inputs"),
        (_two_inputs, "2 inputs: one is needed: x, b"),
        (_integers, "the input is int64"),
        (_reference, "for a function's"),
    ],
)
def test_hidden_or_hostile(change, message, load):
    with pytest.raises(ModelFileError, match=message):
        load(edited(change))


def test_a_weight_used_again_and_again_is_no_bomb(load):
    square = normal(1000, 1000)
    nodes = [helper.make_node("MatMul", [f"h{i}" if i else "x", "w"], [f"h{i + 1}"]) for i in range(100)]
    made = model(nodes, {"w": square}, shape=("b", 1000), outputs=("h100",))
    with pytest.raises(ModelFileError, match="used again and again"):
        load(made)


def field(number, data):
    """A field of a protobuf message that holds bytes."""
    size, length = b"", len(data)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + data


def test_deep_graphs_are_refused(load):
    """A graph in an attribute of a node of a graph, and so on."""
    data = b""
    for _ in range(2000):
        data = field(1, field(5, field(6, data)))
    with pytest.raises(ModelFileError, match="not an ONNX model"):
        load(field(7, data))


@pytest.mark.parametrize("path", [(1,), (1, 5), (11,), (5,)])
def test_millions_of_empty_messages_are_refused(path, load):
    """Two bytes each, 200 in memory."""

    *outer, inner = path
    data = field(inner, b"") * 1_000_000
    for number in (*reversed(outer), 7):
        data = field(number, data)
    with pytest.raises(ModelFileError, match="too many nodes"):
        load(data)


def test_limits_are_arguments(load):
    made = chain(GEMM, ("Relu",), ("Gemm", ["x", normal(4, 2)]))
    assert len(load(made, limits=Limits(layers=2))) == 2
    for limits in (Limits(layers=1), Limits(tensors=2), Limits(dimension=3), Limits(tensor=47), Limits(file=100)):
        with pytest.raises(ModelFileError):
            load(made, limits=limits)


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"not a model", b"\x80" * 100, b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"]
)
def test_no_model_at_all(data, load):
    with pytest.raises(ModelFileError):
        load(data)


# Files of ours


def written(net, tmp_path):
    nnfwd.save(net, tmp_path / "own.onnx")
    return onnx.load(tmp_path / "own.onnx")


OWN = Network(
    [Scale(0.1, center=normal(3)), Dense(W, B, activations.leaky_relu(negative_slope=0.3)), Activation("identity"), Dense(W.T)],
    classes=["a", "b", "c"],
    input_shape=(1, 3),
)  # fmt: skip


def test_own_files_keep_what_a_graph_cannot_say(tmp_path, load):
    assert load(written(OWN, tmp_path)) == OWN
    made = written(OWN, tmp_path)
    del made.metadata_props[:]
    net = load(made)
    assert net.classes is net.input_shape is None
    assert [type(layer).__name__ for layer in net] == ["Scale", "Dense", "Dense"]
    assert net[0].scale == float(np.float32(0.1))
    x = normal(20, 3)
    np.testing.assert_array_equal(net(x), OWN(x))


def test_an_edited_graph_decides_over_its_description(tmp_path, load):
    def weight(made):
        tensor = next(t for t in made.graph.initializer if t.name == "layers.1.weight")
        tensor.CopyFrom(numpy_helper.from_array(2 * W, tensor.name))

    def operator(made):
        next(n for n in made.graph.node if n.op_type == "LeakyRelu" or n.op_type == "PRelu").CopyFrom(
            helper.make_node(
                "Tanh", ["layers.1.Gemm"], [node.output[0] for node in made.graph.node if "Relu" in node.op_type]
            )
        )

    def slope(made):
        text = made.metadata_props[0].value
        made.metadata_props[0].value = text.replace("0.3", "0.4")

    net = written(OWN, tmp_path)
    weight(net)
    assert load(net) == Network(
        [OWN[0], Dense(2 * W, B, OWN[1].activation), *OWN[2:]], classes=OWN.classes, input_shape=(1, 3)
    )
    net = written(OWN, tmp_path)
    operator(net)
    assert [layer.activation.name for layer in load(net)] == ["identity", "tanh", "identity"]
    net = written(OWN, tmp_path)
    slope(net)
    assert load(net)[1].activation.parameters["negative_slope"] == float(np.float32(0.3))


def _narrower(made):
    made.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in made.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("f2"), tensor.name))


def _another_weight(made):
    next(t for t in made.graph.initializer if t.name == "layers.1.bias").name = "b"
    next(n for n in made.graph.node if n.name == "layers.1.Gemm").input[2] = "b"


def _one_layer_more(made):
    made.graph.node[-1].output[0] = "h"
    made.graph.node.append(helper.make_node("Neg", ["h"], ["y"], "layers.4.Neg"))


def _of_two_dtypes(made):
    tensor = next(t for t in made.graph.initializer if t.name == "layers.1.bias")
    tensor.CopyFrom(numpy_helper.from_array(B.astype("float64"), tensor.name))


@pytest.mark.parametrize("change", [_narrower, _another_weight, _one_layer_more, _of_two_dtypes])
def test_what_a_graph_cannot_say_outlives_an_edit(change, tmp_path, load):
    """Another program's, or the form of another version of nnfwd."""
    made = written(OWN, tmp_path)
    change(made)
    net = load(made)
    assert (net.classes, net.input_shape) == (("a", "b", "c"), (1, 3))
    if change is not _narrower:
        assert net[0].scale == float(np.float32(0.1))  # the graph's


def test_what_does_not_fit_an_edited_graph_is_left_out(tmp_path, load):
    other = Network([Dense(normal(2, 3))])  # whose outputs are fewer
    text = written(OWN, tmp_path).metadata_props[0].value
    made = written(other, tmp_path)
    made.metadata_props[0].value = text
    net = load(made)
    assert net == Network(other, input_shape=(1, 3))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"format"', '"format'),
        ('"layers"', '"lagers"'),
        ('"format": 1', '"format": 2'),
        ('"dense"', '"danse"'),
        ("leaky_relu", "leaky_rely"),
        ('"negative_slope": 0.3', '"negative_slope": 1' + 400 * "0"),
        ('"classes"', '"glasses"'),
        ('"classes": ["a", "b", "c"]', '"classes": "abc"'),
        ('["a", "b", "c"]', '["a", "b", "b"]'),
        ('["a", "b", "c"]', '["a", "b"]'),
        ('["a", "b", "c"]', '["a", "b", []]'),
        ("[1, 3]", "[1, 2]"),
        ("[1, 3]", "3"),
    ],
)
def test_a_damaged_description_is_refused(before, after, tmp_path, load):
    """Its classes would be lost."""
    made = written(OWN, tmp_path)
    text = made.metadata_props[0].value
    assert text.count(before) >= 1
    made.metadata_props[0].value = text.replace(before, after)
    with pytest.raises(ModelFileError):
        load(made)


def test_no_description_but_an_object_and_one_is_read(tmp_path, load):
    made = written(OWN, tmp_path)
    for text in ("{", "[]", "null"):
        made.metadata_props[0].value = text
        with pytest.raises(ModelFileError):
            load(made)
    made = written(OWN, tmp_path)
    made.metadata_props.add(key="nnfwd", value="{}")
    with pytest.raises(ModelFileError, match="2 descriptions by nnfwd"):
        load(made)


def test_a_saved_clip_stays_a_clip(tmp_path, load):
    for lower, upper in ((0.0, 6.0), (-1.0, 1.0), (0.0, math.inf)):
        net = Network([Dense(W, B, activations.clip(lower=lower, upper=upper))])
        made = written(net, tmp_path)
        assert repr(load(made)) == repr(net)
        del made.metadata_props[:]
        assert load(made)[0].activation.name in ("relu6", "hard_tanh", "relu")


# Damaged files


def seeds():
    small = chain(GEMM, ("LeakyRelu", [], {"alpha": 0.1}), ("Clip", [np.float32(0)]), ("Softmax",), opset=13)
    shaped = chain(
        ("Reshape", [np.array([-1, 3])]),
        ("Sub", ["x", normal(3)]),
        ("Div", ["x", np.float32(2)]),
        GEMM,
        shape=("b", 3, 1),
    )
    half = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(W)),
        helper.make_node("Gemm", ["x", "w"], ["h"], transB=1),
        helper.make_node("Split", ["h"], ["p", "q"], axis=1),
        helper.make_node("Sigmoid", ["p"], ["s"]),
        helper.make_node("Mul", ["p", "s"], ["y"]),
    ]
    tail = [
        helper.make_node("Gemm", ["x", "w"], ["z"]),
        helper.make_node("Sigmoid", ["z"], ["p"]),
        helper.make_node("Sub", ["one", "p"], ["q"]),
        helper.make_node("Concat", ["q", "p"], ["both"], axis=1),
        helper.make_node("ArgMax", ["both"], ["i"], axis=1),
        helper.make_node("ZipMap", ["both"], ["map"], domain="ai.onnx.ml", classlabels_strings=["no", "yes"]),
        helper.make_node("ArrayFeatureExtractor", ["names", "i"], ["label"], domain="ai.onnx.ml"),
    ]
    names = {"w": normal(3, 1), "one": np.float32(1), "names": np.array(["no", "yes"], object)}
    labelled = model(tail, names, outputs=("label", "map"), ml=True)
    return {"chain": small, "shapes": shaped, "split": model(half, opset=13), "labels": labelled}


@pytest.mark.parametrize("name", ["chain", "shapes", "split", "labels", "own"])
def test_survives(name, tmp_path, note):
    made = written(OWN, tmp_path) if name == "own" else seeds()[name]
    survives(tmp_path, ".onnx", made.SerializeToString(), note)


def test_the_label_tail_by_hand(load):
    net = load(seeds()["labels"])
    assert net.classes == ("no", "yes")
    assert repr(net[0]) == "Dense(3 -> 1, no bias, sigmoid)"
