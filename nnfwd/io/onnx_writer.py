"""Writing ONNX: opset 17, a free batch size, weights bit for bit. https://onnx.ai/onnx/operators/

Input `x` `(batch, in)`, output `y` `(batch, out)`, or `(members, batch, out)` for an ensemble; one element type
throughout, the network's. A Dense layer is a Gemm whose weight stays `(out, in)`. From the first layer of an ensemble
on, there is a members axis: MatMul and Add, with the weight turned, `(members, in, out)` or `(in, out)`.

Every node's name starts with `layers.{i}.`. A layer's arrays are initialisers under the keys of `description.py`, and
its JSON text stands in the metadata under `nnfwd`: an attribute of ONNX is a float32, and a graph knows no classes.
"""

import collections
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnfwd.activations import SELU_ALPHA, SELU_SCALE
from nnfwd.errors import BackendError, ModelFileError
from nnfwd.io import description
from nnfwd.io.files import replacing
from nnfwd.layers import Dense, Layer, Scale
from nnfwd.network import Network
from nnfwd.placement import nearest

try:
    import onnx
except ImportError:
    raise BackendError("an .onnx file needs the package onnx: pip install 'nnfwd[onnx]'") from None

OPSET = 17
IR_VERSION = 8  # of the ONNX release that brought opset 17
METADATA = "nnfwd"
"""The key of the description in a model's metadata."""


def write(network: Network, path: Path) -> None:
    """Writes a network, as a whole or not at all.

    Raises:
        ModelFileError: for a callable of the caller's, for bfloat16 or two dtypes of weights, and for an activation
            with a parameter that opset 17 cannot express, naming the layer.
    """
    data = model(network).SerializeToString()
    with replacing(path) as file:
        file.write(data)


def model(network: Network, /, *, data: bool = True) -> onnx.ModelProto:
    """The model of a network; the same for equal networks. Raises as `write`.

    Without `data`, the initialisers of the network's arrays have a name, a shape and a dtype only.
    """
    text, arrays = description.describe(network)
    dtypes = sorted({array.dtype.name for array in arrays.values()})
    if len(dtypes) > 1:
        raise ModelFileError(
            f"weights of {' and '.join(dtypes)}: an ONNX graph has one dtype: "
            f"write network.to(dtype='{network.dtype}') first"
        )
    if sum(array.nbytes for array in arrays.values()) >= onnx.checker.MAXIMUM_PROTOBUF:
        raise ModelFileError("more than the 2 GiB of weights that an ONNX file can hold: write .safetensors")
    dtype = network.dtype or "float32"
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    members = network.chain.members
    leading = ["batch"] if members is None else [members, "batch"]
    made = onnx.helper.make_model(
        onnx.helper.make_graph(
            [],
            "nnfwd",
            [onnx.helper.make_tensor_value_info("x", element, ["batch", network.in_features or "features"])],
            [onnx.helper.make_tensor_value_info("y", element, [*leading, network.out_features or "features"])],
        ),
        producer_name="nnfwd",
        ir_version=IR_VERSION,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
    )
    onnx.helper.set_model_props(made, {METADATA: text})
    graph = _Graph(made.graph, dtype, data)
    h = "x"
    for i, layer in enumerate(network):
        graph.prefix = f"layers.{i}."
        own = {key.removeprefix(graph.prefix): a for key, a in arrays.items() if key.startswith(graph.prefix)}
        try:
            h = _layer(graph, layer.rounded(dtype), own, h)
        except ModelFileError as error:
            raise ModelFileError(f"layer {i}: {error}") from None
    made.graph.node[-1].output[0] = "y"
    return made


class _Graph:
    """Adds nodes and initialisers to a graph; a value is named after the node that makes it, and goes by that name."""

    def __init__(self, proto: onnx.GraphProto, dtype: str, data: bool) -> None:
        self.proto = proto
        self.dtype = dtype
        self.data = data
        """Whether arrays, which have an axis where a number has none, are written with their data."""
        self.prefix = ""
        """What the names of the current layer start with."""
        self.has_members = False
        """Whether values have a members axis by now."""
        self._count: collections.Counter[str] = collections.Counter()

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node; the name of its output."""
        name = f"{self.prefix}{operator}"
        self._count[name] += 1
        name += f"_{self._count[name]}" if self._count[name] > 1 else ""
        self.proto.node.append(onnx.helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def put(self, name: str, value: Any) -> str:
        """Adds an initialiser of the graph's dtype."""
        name = f"{self.prefix}{name}"
        value = np.asarray(value, self.dtype)
        if self.data or not value.ndim:
            self.proto.initializer.append(onnx.numpy_helper.from_array(value, name))
        else:
            element = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            self.proto.initializer.add(name=name, data_type=element, dims=value.shape)
        return name

    def number(self, value: float) -> str:
        """A constant of a formula."""
        return self.put(f"constant.{value}", value)


def _layer(graph: _Graph, layer: Layer, arrays: Mapping[str, np.ndarray], h: str) -> str:
    """Adds a layer. Its arrays are taken from `arrays`, where they are NumPy's; its numbers are rounded already."""
    if isinstance(layer, Dense):
        graph.has_members |= layer.members is not None
        h = _weighted_sum(graph, arrays["weight"], arrays.get("bias"), h)
    elif isinstance(layer, Scale):
        scale, center, shift = (arrays.get(name, getattr(layer, name)) for name in layer.fields)
        if not _is_zero(center):
            h = graph.node("Sub", h, graph.put("center", center))
        h = graph.node("Mul", h, graph.put("scale", scale))
        if not _is_zero(shift):
            h = graph.node("Add", h, graph.put("shift", shift))
    elif layer.activation.name == "identity":
        return graph.node("Identity", h)
    inside = layer.activation.parameters
    given = {name: arrays.get(f"activation.{name}", value) for name, value in inside.items()}
    return _ACTIVATIONS[layer.activation.name](graph, h, **given)


def _weighted_sum(graph: _Graph, weight: np.ndarray, bias: np.ndarray | None, h: str) -> str:
    if not graph.has_members:  # Gemm takes matrices only
        inputs = [graph.put("weight", weight)] + ([] if bias is None else [graph.put("bias", bias)])
        return graph.node("Gemm", h, *inputs, transB=1)
    h = graph.node("MatMul", h, graph.put("weight", np.matrix_transpose(weight)))
    if bias is None:
        return h
    return graph.node("Add", h, graph.put("bias", bias if weight.ndim == 2 else bias[:, None, :]))


def _is_zero(value: Any) -> bool:
    return isinstance(value, float) and value == 0


def _is_attribute(value: Any) -> bool:
    """Whether an attribute holds a parameter exactly: one number, and a float32."""
    return isinstance(value, float) and nearest(value, "float32") == value


# Each activation in operators of opset 17: of the graph, the name of x and its parameters, the name of the result.


def _operator(operator: str, **attributes: Any) -> Callable[[_Graph, str], str]:
    return lambda graph, x: graph.node(operator, x, **attributes)


def _positive_or(graph: _Graph, x: str, otherwise: str) -> str:
    return graph.node("Where", graph.node("Greater", x, graph.number(0.0)), x, otherwise)


def _leaky_relu(graph: _Graph, x: str, negative_slope: Any) -> str:
    if _is_attribute(negative_slope):
        return graph.node("LeakyRelu", x, alpha=negative_slope)
    return _prelu(graph, x, negative_slope)


def _prelu(graph: _Graph, x: str, negative_slope: Any) -> str:
    return graph.node("PRelu", x, graph.put("activation.negative_slope", negative_slope))


def _thresholded_relu(graph: _Graph, x: str, alpha: Any) -> str:
    # ThresholdedRelu swallows NaN.
    below = graph.node("LessOrEqual", x, graph.put("activation.alpha", alpha))
    return graph.node("Where", below, graph.number(0.0), x)


def _clip(graph: _Graph, x: str, lower: Any, upper: Any) -> str:
    low, high = graph.put("activation.lower", lower), graph.put("activation.upper", upper)
    if isinstance(lower, float) and isinstance(upper, float):
        return graph.node("Clip", x, low, high)
    return graph.node("Min", graph.node("Max", x, low), high)


def _between(lower: float, upper: float) -> Callable[[_Graph, str], str]:
    return lambda graph, x: graph.node("Clip", x, graph.number(lower), graph.number(upper))


def _hard_sigmoid(graph: _Graph, x: str, alpha: Any, beta: Any) -> str:
    if _is_attribute(alpha) and _is_attribute(beta):
        return graph.node("HardSigmoid", x, alpha=alpha, beta=beta)
    line = graph.node("Mul", x, graph.put("activation.alpha", alpha))
    return _between(0.0, 1.0)(graph, graph.node("Add", line, graph.put("activation.beta", beta)))


def _log_sigmoid(graph: _Graph, x: str) -> str:
    return graph.node("Neg", graph.node("Softplus", graph.node("Neg", x)))


def _elu(graph: _Graph, x: str, alpha: Any) -> str:
    if _is_attribute(alpha):
        return graph.node("Elu", x, alpha=alpha)
    below = graph.node("Mul", graph.node("Elu", x, alpha=1.0), graph.put("activation.alpha", alpha))
    return _positive_or(graph, x, below)


def _selu(graph: _Graph, x: str) -> str:
    if graph.dtype != "float64":
        return graph.node("Selu", x, alpha=SELU_ALPHA, gamma=SELU_SCALE)
    return graph.node("Mul", _elu(graph, x, SELU_ALPHA), graph.number(SELU_SCALE))


def _celu(graph: _Graph, x: str, alpha: Any) -> str:
    if _is_attribute(alpha) and graph.dtype == "float32":  # the only one Celu takes
        return graph.node("Celu", x, alpha=alpha)
    if np.any(np.less_equal(alpha, 0)):
        raise ModelFileError("celu with an alpha that is not positive: opset 17 has it as one float32 only")
    alpha = graph.put("activation.alpha", alpha)
    below = graph.node("Mul", graph.node("Elu", graph.node("Div", x, alpha), alpha=1.0), alpha)
    return _positive_or(graph, x, below)


def _silu(graph: _Graph, x: str) -> str:
    return graph.node("Mul", x, graph.node("Sigmoid", x))


def _mish(graph: _Graph, x: str) -> str:
    return graph.node("Mul", x, graph.node("Tanh", graph.node("Softplus", x)))


# The two gelus as PyTorch's exporter writes them, which other readers recognise; opset 17 has no Gelu.


def _gelu(graph: _Graph, x: str) -> str:
    erf = graph.node("Erf", graph.node("Div", x, graph.number(math.sqrt(2))))
    return graph.node("Mul", graph.node("Mul", x, graph.node("Add", erf, graph.number(1.0))), graph.number(0.5))


def _gelu_tanh(graph: _Graph, x: str) -> str:
    cube = graph.node("Mul", x, graph.node("Mul", x, x))
    inner = graph.node("Add", x, graph.node("Mul", graph.number(0.044715), cube))
    tanh = graph.node("Tanh", graph.node("Mul", graph.number(math.sqrt(2 / math.pi)), inner))
    return graph.node("Mul", graph.number(0.5), graph.node("Mul", x, graph.node("Add", tanh, graph.number(1.0))))


_ACTIVATIONS: dict[str, Callable[..., str]] = {
    "identity": lambda graph, x: x,
    "relu": _operator("Relu"),
    "relu6": _between(0.0, 6.0),
    "leaky_relu": _leaky_relu,
    "prelu": _prelu,
    "thresholded_relu": _thresholded_relu,
    "clip": _clip,
    "hard_tanh": _between(-1.0, 1.0),
    "hard_sigmoid": _hard_sigmoid,
    "sigmoid": _operator("Sigmoid"),
    "tanh": _operator("Tanh"),
    "softsign": _operator("Softsign"),
    "softplus": _operator("Softplus"),
    "log_sigmoid": _log_sigmoid,
    "elu": _elu,
    "selu": _selu,
    "celu": _celu,
    "silu": _silu,
    "hard_silu": _operator("HardSwish"),
    "mish": _mish,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "exp": _operator("Exp"),
    "softmax": _operator("Softmax", axis=-1),
    "log_softmax": _operator("LogSoftmax", axis=-1),
}
