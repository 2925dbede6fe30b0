"""Writing ONNX: what the checker accepts, ONNX Runtime computes as we do, and we read back bit for bit."""

import importlib
import json
import math
import os
import sys

import numpy as np
import pytest
from cases import free_signatures
from hypothesis import given
from hypothesis import strategies as st
from networks import ensemble, inputs, mixed
from oracles import agree
from places import need

import nnfwd
from nnfwd import Activation, Dense, Network, Scale, activations
from nnfwd.cases import Case
from nnfwd.errors import BackendError, ModelFileError
from nnfwd.io import description

onnx = need("onnx")
onnx_writer = importlib.import_module("nnfwd.io.onnx_writer")  # which needs onnx

# What ONNX Runtime 1.32 does not implement for float64 on a CPU, of what the graphs are made of.
FLOAT32_ONLY = {"Softsign", "Softplus", "Elu", "HardSwish", "Erf"}


def initialisers(model):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def session(model):
    onnxruntime = need("onnxruntime")
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(model, x):
    return session(model).run(["y"], {"x": x})[0]


def checked(net):
    model = onnx_writer.model(net)
    onnx.checker.check_model(model, full_check=True)
    return model


def function(name, dtype, per_feature):
    """An activation with parameters that float32 does not hold, for five features."""
    rng = np.random.default_rng(len(name))
    f = activations.named(name)
    values = {key: rng.uniform(0.1, 2, 5) * (-1 if key == "lower" else 1) for key in f.parameters}
    return f(**{key: value.astype(dtype) if per_feature else float(value[0]) for key, value in values.items()})


def around(f, dtype):
    """A network 4 -> 5 with this activation."""
    rng = np.random.default_rng(0)
    return Network([Dense(rng.standard_normal((5, 4)).astype(dtype), rng.standard_normal(5).astype(dtype), f)])


FUNCTIONS = [(name, False) for name in activations.names()]
FUNCTIONS += [(name, True) for name in activations.names() if activations.named(name).parameters]


def test_every_activation_has_its_operators():
    assert set(onnx_writer._ACTIVATIONS) == set(activations.names())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("name", "per_feature"), FUNCTIONS)
def test_every_activation(name, per_feature, dtype):
    net = around(function(name, dtype, per_feature), dtype)
    model = checked(net)
    if dtype == "float16":  # which ONNX Runtime computes in its own way
        return
    if dtype == "float64" and FLOAT32_ONLY & {node.op_type for node in model.graph.node}:
        return  # onnx's own evaluator computes these, below
    x = inputs(50, 4, dtype=dtype)
    agree(net, x, run(model, x), "onnxruntime", dtype)


@pytest.mark.parametrize(("name", "per_feature"), FUNCTIONS)
def test_float64_in_onnx_s_own_evaluator(name, per_feature):
    """It computes plainly in float64: to within what float32 could do, which a wrong formula is not."""
    import onnx.reference as reference

    class Erf(reference.op_run.OpRun):  # its own rounds to float32
        op_domain = ""

        def _run(self, x):
            return (np.vectorize(math.erf)(x),)

    net = around(function(name, "float64", per_feature), "float64")
    x = inputs(50, 4).astype("float64")
    (y,) = reference.ReferenceEvaluator(checked(net), new_ops=[Erf]).run(None, {"x": x})
    bound = nnfwd.error_bound(net.to(dtype="float32"), x.astype("float32"), dtype="float32")
    assert not np.any(bound.unclaimed)
    assert y.dtype == np.float64
    assert np.all(np.abs(y - net(x)) <= bound.error)


@pytest.mark.parametrize(("name", "per_feature"), FUNCTIONS)
def test_nan_stays_nan(name, per_feature):
    net = around(function(name, "float32", per_feature), "float32")
    x = np.full((1, 4), np.nan, "float32")
    assert np.isnan(run(onnx_writer.model(net), x)).all()


def test_float64_parameters_are_not_rounded_to_an_attribute():
    settings = {
        "leaky_relu": ["negative_slope"],
        "elu": ["alpha"],
        "celu": ["alpha"],
        "hard_sigmoid": ["alpha", "beta"],
    }
    for name, keys in settings.items():
        values = dict.fromkeys(keys, 0.1)
        model = checked(Network([Dense(np.ones((1, 1)), None, activations.named(name)(**values))]))
        found = initialisers(model)
        assert {key: float(found[f"layers.0.activation.{key}"]) for key in keys} == values
        attributes = [a.f for node in model.graph.node for a in node.attribute if a.type == onnx.AttributeProto.FLOAT]
        assert all(value == 1.0 for value in attributes)


def test_a_parameter_of_a_narrow_network_is_an_attribute():
    """As other programs expect it; rounded as we compute with it."""
    for dtype in ("float16", "float32"):
        (gemm, leaky) = checked(around(activations.leaky_relu(negative_slope=0.2), dtype)).graph.node
        assert (gemm.op_type, leaky.op_type) == ("Gemm", "LeakyRelu")
        assert leaky.attribute[0].f == np.dtype(dtype).type(0.2)


def test_a_jump_is_where_ours_is():
    net = Network([Activation(activations.thresholded_relu(alpha=1.5))])
    x = np.nextafter(np.array([[1.5, 1.5, 1.5]], "float32"), np.array([1.5, 0, 9], "float32"))
    assert np.array_equal(net(x), [[0, 0, x[0, 2]]])
    assert np.array_equal(run(checked(net), x), net(x))


@given(
    st.builds(
        Case,
        signature=free_signatures,
        dtype=st.sampled_from(["float16", "float32", "float64"]),
        regime=st.sampled_from(["ordinary", "small-integer"]),
        special=st.just("none"),
        seed=st.integers(0, 2**32 - 1),
    )
)
def test_drawn_networks(tmp_path_factory, case):
    net = case.network
    path = tmp_path_factory.mktemp("drawn") / "a.onnx"
    try:
        nnfwd.save(net, path)
    except ModelFileError as error:
        assert "celu with an alpha that is not positive" in str(error)
        assert any(np.any(np.asarray(layer.activation.parameters.get("alpha", 1)) <= 0) for layer in net)
        return
    model = checked(net)
    assert path.read_bytes() == model.SerializeToString()
    again = nnfwd.load(path)
    assert again == net
    nnfwd.save(again, path)
    assert path.read_bytes() == model.SerializeToString()
    x = inputs(3, case.signature.in_features)
    if case.dtype == "float32" and not np.any(nnfwd.error_bound(net, x, dtype="float32").unclaimed):
        agree(net, x, run(model, x), "onnxruntime", "float32")


@pytest.mark.parametrize(
    "net",
    [
        mixed(),
        ensemble(),
        ensemble()[:1],
        Network([*ensemble(), Scale(np.ones(2, "f4") / 3, shift=0.1), *Network.from_arrays([np.ones((3, 2), "f4")])]),
        Network([*Network.from_arrays([np.ones((4, 4), "f4")], [np.ones(4, "f4")], "tanh"), *ensemble()]),
        Network([Dense(np.ones((2, 3, 4), "f4"), None, activations.prelu(negative_slope=np.ones(3, "f4") / 3))]),
    ],
    ids=range(6),
)
@pytest.mark.parametrize("rows", [1, 7])
def test_members_and_a_free_batch(net, rows, tmp_path):
    x = inputs(rows, 4)
    agree(net, x, run(checked(net), x), "onnxruntime", "float32")
    nnfwd.save(net, tmp_path / "a.onnx")
    assert nnfwd.load(tmp_path / "a.onnx") == net


def test_the_graph():
    """What the reader and other programs rely on."""
    model = checked(Network([Scale(2.0, center=np.ones(4, "f4")), *mixed()[1:]]))
    assert (model.ir_version, model.producer_name) == (8, "nnfwd")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    shapes = [
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output)
    ]
    assert shapes == [["batch", 4], ["batch", 2]]
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == ["x", "y"]
    nodes = [node.name for node in model.graph.node]
    assert nodes == [
        "layers.0.Sub", "layers.0.Mul", "layers.1.Gemm", "layers.1.PRelu", "layers.2.Gemm", "layers.2.Div", "layers.2.Erf",
        "layers.2.Add", "layers.2.Mul", "layers.2.Mul_2", "layers.3.Gemm", "layers.3.Softmax",
    ]  # fmt: skip
    assert len({*nodes, *initialisers(model)}) == len(nodes) + len(model.graph.initializer)
    (metadata,) = model.metadata_props
    assert metadata.key == "nnfwd"
    assert [layer["type"] for layer in json.loads(metadata.value)["layers"]] == ["scale", "dense", "dense", "dense"]


def test_weights_stand_there_bit_for_bit():
    weight = np.array([[np.nan, -0.0], [np.inf, 1e-45], [0.1, 3.4e38]], "float32")
    found = initialisers(onnx_writer.model(Network([Dense(weight, weight[:, 1])])))
    assert found["layers.0.weight"].tobytes() == weight.tobytes()
    assert found["layers.0.bias"].tobytes() == weight[:, 1].tobytes()
    net = ensemble()
    found = initialisers(onnx_writer.model(net))
    assert found["layers.0.weight"].shape == (3, 4, 5)
    assert np.array_equal(found["layers.0.weight"], np.swapaxes(net[0].weight, 1, 2))
    assert np.array_equal(found["layers.0.bias"], net[0].bias[:, None, :])


def test_without_data():
    """What a network is compared by: everything but its arrays, none of them copied."""
    for net in (mixed(), ensemble()):
        whole, bare = onnx_writer.model(net), onnx_writer.model(net, data=False)
        _, arrays = description.describe(net)
        left_out = [tensor for tensor in bare.graph.initializer if not tensor.HasField("raw_data")]
        assert {tensor.name for tensor in left_out} == set(arrays)
        for tensor in left_out:
            tensor.raw_data = next(t for t in whole.graph.initializer if t.name == tensor.name).raw_data
        assert bare == whole


def test_a_network_without_weights():
    net = Network([Activation("identity"), Scale(0.1), Activation("identity")])
    model = checked(net)
    for width in (1, 5):
        x = inputs(3, width)
        agree(net, x, run(model, x), "onnxruntime", "float32")


def test_round_trip_of_everything_else(tmp_path):
    """Scalars that float32 does not hold, classes, the input's shape, weights of another library."""
    net = Network(
        [
            Scale(0.1, center=0.2, shift=0.3),
            Dense(np.ones((4, 4), "f4"), None, activations.leaky_relu(negative_slope=0.1)),
            Activation("relu"),
            Dense(np.ones((2, 4), "f4"), None, activations.hard_sigmoid(alpha=0.2)),
        ],
        classes=("cat", "dög"),
        input_shape=(2, 2),
    )
    path = tmp_path / "a.onnx"
    nnfwd.save(net, path)
    again = nnfwd.load(path)
    assert again == net
    assert (again.classes, again.input_shape) == (net.classes, net.input_shape)
    before = path.read_bytes()
    nnfwd.save(again, path)
    assert path.read_bytes() == before


def test_a_network_of_another_library_is_saved(tmp_path):
    need("jax")
    assert onnx_writer.model(mixed().to("jax")) == onnx_writer.model(mixed())
    with pytest.raises(ModelFileError, match=r"bfloat16: write network.to\(dtype='float32'\)"):
        nnfwd.save(mixed().to("jax", dtype="bfloat16"), tmp_path / "a.onnx")
    assert os.listdir(tmp_path) == []


def test_what_is_refused(monkeypatch):
    def mine(x, /, *, xp):
        return x

    with pytest.raises(ModelFileError, match=r"the activation mine is a callable"):
        onnx_writer.model(Network([Dense([[1.0]], None, mine)]))
    two = Network([Dense(np.ones((1, 1), "f4"), np.ones(1, "f8"))])
    with pytest.raises(ModelFileError, match=r"float32 and float64.* network.to\(dtype='float64'\)"):
        onnx_writer.model(two)
    checked(two.to(dtype="float64"))
    celu = Network([Scale(1.0), Dense(np.ones((2, 1)), None, activations.celu(alpha=[1.0, -1.0]))])
    with pytest.raises(ModelFileError, match=r"layer 1: celu with an alpha that is not positive"):
        onnx_writer.model(celu)
    monkeypatch.setattr(onnx.checker, "MAXIMUM_PROTOBUF", 100)
    with pytest.raises(ModelFileError, match="2 GiB"):
        onnx_writer.model(mixed())


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("nnfwd.io.onnx")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(nnfwd.io, name.rpartition(".")[2])
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendError, match=r"pip install 'nnfwd\[onnx\]'"):
        nnfwd.save(mixed(), tmp_path / "a.onnx")
