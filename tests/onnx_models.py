"""ONNX models to read: put together by hand, or drawn at random."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

ELEMENTS = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE, "float16": TensorProto.FLOAT16}


def model(nodes, constants=None, shape=("batch", 3), dtype="float32", opset=17, outputs=("y",), ml=False):
    """A model from "x" to its outputs; constants are arrays by name."""
    constants = {name: numpy_helper.from_array(np.asarray(a), name) for name, a in (constants or {}).items()}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", ELEMENTS[dtype], shape)],
        [helper.make_tensor_value_info(name, ELEMENTS[dtype], None) for name in outputs],
        list(constants.values()),
    )
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid("ai.onnx.ml", 3)] if ml else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def chain(*steps, **settings):
    """A model of operators one after another: each `(operator, constants, attributes)`, the last two may be missing.

    A constant of "x" stands for the value that goes in, which else is the first input.
    """
    nodes, constants, value = [], {}, "x"
    for i, (operator, *more) in enumerate(steps):
        given = more[0] if more else []
        attributes = more[1] if len(more) > 1 else {}
        names = [value] if not any(isinstance(a, str) for a in given) else []
        for j, a in enumerate(given):
            if isinstance(a, str):
                names.append(value)
            elif a is None:
                names.append("")
            else:
                names.append(f"c{i}.{j}")
                constants[names[-1]] = a
        value = "y" if i == len(steps) - 1 else f"h{i}"
        domain = "ai.onnx.ml" if operator == "Scaler" else ""
        nodes.append(helper.make_node(operator, names, [value], f"n{i}", domain=domain, **attributes))
    return model(nodes, constants, ml=any(node.domain for node in nodes), **settings)


def session(made):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # which would fuse and fold
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


ACTIVATIONS = [
    *("Relu", "Sigmoid", "Tanh", "Softsign", "Softplus", "LeakyRelu", "Elu", "Selu", "HardSigmoid", "ThresholdedRelu"),
    *("Celu", "HardSwish", "Mish", "Gelu", "Softmax", "LogSoftmax", "Clip", "PRelu", "Exp"),
]
SINCE = {"Celu": 12, "HardSwish": 14, "Mish": 18, "Gelu": 20, "ThresholdedRelu": 10}


def drawn(rng):
    """A model of one to six operators with random shapes and settings, not all of which a chain of layers can be."""
    opset = int(rng.choice([7, 9, 11, 12, 13, 17, 20, 21]))
    rank, width = int(rng.choice([1, 2, 2, 2, 3])), int(rng.integers(1, 5))
    batch = [2, 3][: rank - 1] if rng.random() < 0.5 else ["b", 3][: rank - 1]
    steps = []
    w = width
    for _ in range(rng.integers(1, 7)):
        step, w = _step(rng, opset, w)
        if step[0] not in SINCE or SINCE[step[0]] <= opset:
            steps.append(step)
    return chain(*(steps or [("Identity",)]), shape=[*batch, width], opset=opset), [*[2, 3][: rank - 1], width]


def _step(rng, opset, w):
    def normal(*shape):
        return rng.standard_normal(shape).astype("float32")

    def maybe(name, value):
        return {name: value} if rng.random() < 0.5 else {}

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    n = int(rng.integers(1, 5))
    kind = pick("gemm", "gemm", "matmul", "matmul", "affine", "affine", "activation", "activation", "shape", "other")
    if kind == "gemm":
        turned = bool(rng.integers(2))
        bias = [] if opset >= 11 and rng.random() < 0.3 else [normal(*pick((), (1,), (n,), (1, n), (2, n), (2, 1)))]
        attributes = {"transB": int(turned)} | maybe("alpha", 0.5) | maybe("beta", 2.0) | maybe("transA", 0)
        return ("Gemm", ["x", normal(*((n, w) if turned else (w, n))), *bias], attributes), n
    if kind == "matmul":
        given = pick(["x", normal(w, n)], ["x", normal(w, n)], ["x", normal(2, w, n)], [normal(n, w), "x"])
        return ("MatMul", given), n
    if kind == "affine":
        constant = normal(*pick((), (1,), (w,), (w,), (1, w), (2, 1, w), (1, 1, w)))
        return (pick("Add", "Sub", "Mul", "Div"), pick(["x", constant], ["x", constant], [constant, "x"])), w
    if kind == "shape":
        choices = [
            ("Flatten", [], maybe("axis", int(rng.integers(0, 3)))),
            ("Reshape", [np.array(pick([-1, w], [0, -1], [0, 0], [2, w], [1, w], [-1, 3 * w]))]),
        ]
        axes = [int(rng.integers(0, 3))]
        operator = pick("Squeeze", "Unsqueeze")
        choices.append((operator, [np.array(axes)]) if opset >= 13 else (operator, [], {"axes": axes}))
        return pick(*choices), w
    if kind == "other":
        numbers = [np.abs(normal(w)) + 0.5, normal(w), normal(w), np.abs(normal(w)) + 0.5]
        return pick(
            ("BatchNormalization", numbers, maybe("epsilon", 0.01)),
            ("Dropout",),
            ("Identity",),
            ("Neg",),
            ("Max", [normal(*pick((), (w,)))]),
            ("Min", [normal(*pick((), (w,)))]),
            ("Cast", [], {"to": 1}),
        ), w
    operator = pick(*ACTIVATIONS)
    if operator in ("Softmax", "LogSoftmax"):
        return (operator, [], maybe("axis", int(rng.integers(0, 3)))), w
    if operator == "PRelu":
        return (operator, [normal(*pick((1,), (w,), (1, w), ()))]), w
    if operator == "Clip":
        low, high = np.float32(rng.uniform(-1, 0)), np.float32(rng.uniform(0, 1))
        if opset < 11:
            return (operator, [], maybe("min", float(low)) | maybe("max", float(high))), w
        return (operator, pick([low], [None, high], [low, high], [])), w
    attributes = {
        "LeakyRelu": maybe("alpha", 0.2), "Elu": maybe("alpha", 0.7), "Celu": maybe("alpha", 0.7), "ThresholdedRelu": maybe("alpha", 0.3),
        "HardSigmoid": maybe("alpha", 0.3) | maybe("beta", 0.4), "Gelu": maybe("approximate", pick("none", "tanh")), "Selu": maybe("gamma", 1.5),
    }  # fmt: skip
    return (operator, [], attributes.get(operator, {})), w
