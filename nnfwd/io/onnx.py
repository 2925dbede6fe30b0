"""ONNX files: one chain of a graph, as layers. https://onnx.ai/onnx/repo-docs/IR.html, https://onnx.ai/onnx/operators/

The graph is walked back from its output to its input, so a node that joins two values is seen at once: it is one of
`_PATTERNS`, a formula that is an activation, or a branch, which is refused. Then the nodes become layers, in the order
of the pass.

A file that nnfwd wrote carries a description of its layers. Where writing the described network would give this very
graph, that network it is. Where it would give another one, because another program edited the graph or another version
of nnfwd wrote it, the layers are the graph's alone; the classes and the input's shape, which a graph does not hold, are
still the description's if they fit.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from nnfwd import activations
from nnfwd.errors import ModelFileError, ShapeError
from nnfwd.io import building, description, onnx_writer
from nnfwd.io.building import Builder
from nnfwd.io.onnx_graph import DTYPES, Graph, Model, Node, X, parse
from nnfwd.io.onnx_writer import write
from nnfwd.io.reading import FLOATS, Given, Limits, Tensor, file_size, parse_json, read_exactly
from nnfwd.layers import Scale
from nnfwd.network import Network
from nnfwd.placement import nearest, widest

__all__ = ["read", "write"]


def read(file: IO[bytes], given: Given) -> Network:
    """The network of an ONNX file; its leading Flatten or Reshape and a classifier's labels are kept with it.

    Its output is `(..., out)`, also where out is 1 and the graph ends by squeezing that axis away.

    Raises:
        ModelFileError: for what is damaged, beyond the limits or no chain of known operators, by name.
    """
    size = file_size(file)
    model = parse(read_exactly(file, size, "the model"))
    graph = Graph(model, size, given.limits)
    texts = [entry.value for entry in model.metadata_props if entry.key == onnx_writer.METADATA]
    if model.producer_name != "nnfwd" or not texts:
        return _Chain(graph, given.limits).network()
    if len(texts) > 1:
        raise ModelFileError(f"{len(texts)} descriptions by nnfwd: one file has one")
    return _described(texts[0], model, graph, given.limits)


def _described(text: str, model: Model, graph: Graph, limits: Limits) -> Network:
    """The network of a file of ours: the description's where the graph is what we write for it, else the graph's."""
    document = parse_json(text.encode(), limits)
    kept = {name: _list(document, name) for name in ("classes", "input_shape")}
    operators = {node.name for node in graph.nodes}

    def fetch(key: str) -> np.ndarray:
        found = graph.value(key)
        layer, _, field = key.rpartition(".")
        if f"{layer}.MatMul" in operators:  # (members, in, out) and (members, 1, out)
            found = np.matrix_transpose(found) if field == "weight" else found
            found = found[:, 0] if field == "bias" and found.ndim == 3 else found
        return found

    described = None
    with contextlib.suppress(KeyError, ShapeError):  # of an array that is gone, or has another shape by now
        described = description.parse(json.dumps(document).encode(), fetch, limits)
    if described is not None and _is_written_as(described, model):
        return Network(described, **kept)
    network = _Chain(graph, limits).network()
    for name, value in kept.items():
        if getattr(network, name) is None:
            with contextlib.suppress(ShapeError):  # it does not fit the layers by now
                held: dict[str, Any] = {"classes": network.classes, "input_shape": network.input_shape}
                network = Network(network, **held | {name: value})
    return network


def _list(document: Any, name: str) -> list[Any] | None:
    """Takes an entry out of a description."""
    found = document.pop(name, None) if isinstance(document, dict) else None
    if not isinstance(found, list | None):
        raise ModelFileError(f"its {name} are described by a {type(found).__name__}: it must be a list")
    return found


def _is_written_as(network: Network, model: Model) -> bool:
    """Whether writing a network, its arrays taken from the initialisers of a model, gives the graph of this model."""
    try:
        ours = onnx_writer.model(network, data=False).graph
    except ModelFileError:  # it has what the writer refuses
        return False
    theirs = model.graph
    return (
        all(getattr(ours, part) == getattr(theirs, part) for part in ("node", "input", "output"))
        and len(ours.initializer) == len(theirs.initializer)
        and all(
            (a.name, a.dims, a.data_type) == (b.name, b.dims, b.data_type)
            and (not a.HasField("raw_data") or a.raw_data == b.raw_data)
            for a, b in zip(ours.initializer, theirs.initializer, strict=True)
        )
    )


# Formulas that are activations. `X` is the value that goes in, another name a constant that becomes the parameter of
# this name, a number a constant; Add, Mul, Max and Min take their operands in either order.

_ERF = [("Erf", ("Div", X, math.sqrt(2))), ("Erf", ("Mul", X, math.sqrt(0.5)))]
_CUBE = [("Mul", X, ("Mul", X, X)), ("Pow", X, 3.0)]
_TANH = [("Tanh", ("Mul", math.sqrt(2 / math.pi), ("Add", X, ("Mul", 0.044715, cube)))) for cube in _CUBE]
_GATES = [("gelu", ("Add", erf, 1.0)) for erf in _ERF] + [("gelu_tanh", ("Add", tanh, 1.0)) for tanh in _TANH]
# x.view(x.size(0), n), as PyTorch's exporter writes it: n is what its second name stands for.
_SIZE = ("Gather", ("Shape", X), 0.0, {"axis": 0})
_SHAPES = [
    ("Concat", size, "shape", {"axis": 0}) for size in (("Unsqueeze", _SIZE, 0.0), ("Unsqueeze", _SIZE, {"axes": (0,)}))
]
_PATTERNS: dict[str, list[tuple[str, Any]]] = {
    "Mul": [
        ("silu", ("Mul", X, ("Sigmoid", X))),
        ("mish", ("Mul", X, ("Tanh", ("Softplus", X)))),
        ("hard_silu", ("Mul", X, ("HardSigmoid", X, {"alpha": nearest(1 / 6, "float32")}))),
        ("hard_silu", ("Mul", X, ("HardSigmoid", X, {"alpha": nearest(1 / 6, "float32"), "beta": 0.5}))),
        *((name, ("Mul", ("Mul", X, gate), 0.5)) for name, gate in _GATES),
        *((name, ("Mul", ("Mul", X, 0.5), gate)) for name, gate in _GATES),
        *((name, ("Mul", X, ("Mul", gate, 0.5))) for name, gate in _GATES),
    ],
    "Div": [("softsign", ("Div", X, ("Add", ("Abs", X), 1.0)))],
    "Log": [("log_sigmoid", ("Log", ("Sigmoid", X)))],
    "Neg": [("log_sigmoid", ("Neg", ("Softplus", ("Neg", X))))],
    "Max": [("clip", ("Max", X, "lower"))],
    "Min": [("clip", ("Min", ("Max", X, "lower"), "upper")), ("clip", ("Min", X, "upper"))],
    "Reshape": [
        *(("view", ("Reshape", X, shape)) for shape in _SHAPES),
        *(("view", ("Reshape", X, shape, {"allowzero": 0})) for shape in _SHAPES),
    ],
    "Where": [
        ("thresholded_relu", ("Where", ("LessOrEqual", X, "alpha"), 0.0, X)),
        ("elu", ("Where", ("Greater", X, 0.0), X, ("Mul", ("Elu", X, {"alpha": 1.0}), "alpha"))),
        (
            "celu",
            ("Where", ("Greater", X, 0.0), X, ("Mul", ("Elu", ("Div", X, "alpha"), {"alpha": 1.0}), "alpha")),
        ),
    ],
}
_TWO_CLASSES = ("Concat", ("Sub", 1.0, X), X, {"axis": 1})

# An operator that is an activation: its name here, and for each attribute of ONNX our parameter and ONNX's default.
_ACTIVATIONS: dict[str, tuple[str, dict[str, tuple[str, float]]]] = {
    "Relu": ("relu", {}),
    "LeakyRelu": ("leaky_relu", {"alpha": ("negative_slope", 0.01)}),
    "ThresholdedRelu": ("thresholded_relu", {"alpha": ("alpha", 1.0)}),
    "HardSigmoid": ("hard_sigmoid", {"alpha": ("alpha", 0.2), "beta": ("beta", 0.5)}),
    "HardSwish": ("hard_silu", {}),
    "Sigmoid": ("sigmoid", {}),
    "Tanh": ("tanh", {}),
    "Softsign": ("softsign", {}),
    "Softplus": ("softplus", {}),
    "Elu": ("elu", {"alpha": ("alpha", 1.0)}),
    "Celu": ("celu", {"alpha": ("alpha", 1.0)}),
    "Mish": ("mish", {}),
    "Exp": ("exp", {}),
}

# How many inputs an operator may have, and since which opset; else it is one.
_INPUTS = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "MatMul", "PRelu", "Reshape"), (2, 1)),
    **dict.fromkeys(("Split", "Squeeze", "Unsqueeze"), (2, 13)),
    "Gemm": (3, 1),
    "Clip": (3, 11),
    "Dropout": (3, 12),
    "BatchNormalization": (5, 1),
}


@dataclass(frozen=True)
class _Step:
    """A node of the chain and the value that goes in; of a pattern its activation and what its names stand for."""

    node: Node
    operand: str
    result: str
    activation: str | None
    found: dict[str, str]


class _Chain:
    """The layers of a graph: walked back from the output, then built in the order of the pass."""

    def __init__(self, graph: Graph, limits: Limits) -> None:
        self.graph = graph
        self.builder = Builder(limits)
        self.dtype, self.shape = _input_type(graph.input)
        """Of the value reached so far; a None is a free axis."""
        self.is_rounded = False
        """Whether the input was cast to a dtype that does not hold all its values."""
        self.given = list(self.shape)
        """The shape of the input."""
        self.members: int | None = None
        self._dense: tuple[np.ndarray, np.ndarray | None] | None = None
        """A weight and a bias, which may still come."""

    def network(self) -> Network:
        """The network of the whole graph."""
        output, classes = self._without_labels()
        for step in reversed(list(self._steps(output))):
            if step.activation is not None:
                self._pattern(step)
                continue
            _OPERATORS[step.node.operator](self, step)
            if step.node.attributes:
                raise ModelFileError(f"{step.node}: unknown attribute {min(step.node.attributes)[:60]}")
        self._flush()
        self.builder.classes = classes
        return self.builder.network()

    # The way back

    def _steps(self, value: str) -> Iterator[_Step]:
        graph = self.graph
        while value != graph.input.name:
            if value in graph.constants:
                raise ModelFileError(f"the output depends on no input: {value[:60]!r} is constant")
            node = graph.producers[value]
            for name, pattern in _PATTERNS.get(node.operator, ()):
                found = graph.match(pattern, value, {})
                if found is not None:
                    step = _Step(node, found.pop(X), value, name, found)
                    break
            else:
                step = _Step(node, self._operand(node), value, None, {})
            if value != node.outputs[0] and node.operator != "Split":
                raise ModelFileError(f"{node}: only its first output can be used")
            yield step
            value = step.operand

    def _operand(self, node: Node) -> str:
        moving = [name for name in node.inputs if name and name not in self.graph.constants]
        if node.operator not in _OPERATORS:
            raise ModelFileError(f"{node}: an unknown operator")
        most, since = _INPUTS.get(node.operator, (1, 1))
        if len(node.inputs) > (most if self.graph.opset >= since else 1):
            raise ModelFileError(f"{node} has {len(node.inputs)} inputs: too many for opset {self.graph.opset}")
        if len(moving) > 1:
            joined = " and ".join(repr(name[:60]) for name in moving)
            raise ModelFileError(f"{node} joins {joined}: a branch, and only a chain can be read")
        if not moving:
            raise ModelFileError(f"{node} computes with constants only: fold them before saving")
        if moving[0] != node.inputs[0] and node.operator not in ("Add", "Mul", "Sub", "MatMul"):
            raise ModelFileError(f"{node}: {moving[0][:60]!r} must be its first input")
        return moving[0]

    def _without_labels(self) -> tuple[str, tuple[Any, ...] | None]:
        """The probabilities (of the second class, where there are two) and the classes, of a classifier of skl2onnx."""
        graph = self.graph
        if len(graph.outputs) == 1:
            return graph.outputs[0], None
        sources, classes = set(), []
        for value in graph.outputs:
            source, found = self._labelled(value)
            sources.add(source)
            classes += [] if found is None else [found]
        if len(sources) != 1 or not classes or classes != classes[:1] * len(classes):
            names = ", ".join(name[:60] for name in graph.outputs[:5])
            raise ModelFileError(
                f"the model has {len(graph.outputs)} outputs, {names}: one is read, of a classifier its probabilities "
                "(convert with skl2onnx's options={id(model): {'zipmap': False}}, or load the estimator or its .skops)"
            )
        source = sources.pop()
        second = graph.match(_TWO_CLASSES, source, {})
        return (source if second is None else second[X]), classes[0]

    def _labelled(self, value: str) -> tuple[str, tuple[Any, ...] | None]:
        """Of an output the probabilities it comes from, and the classes it holds."""
        graph, end = self.graph, value
        node = graph.producers.get(value)
        while node is not None and node.operator in ("Cast", "Identity", "Reshape"):
            value = node.inputs[0]
            node = graph.producers.get(value)
        if node is not None and node.operator == "ai.onnx.ml.ArrayFeatureExtractor" and len(node.inputs) == 2:
            names, index = node.inputs
            found = graph.match(("ArgMax", X, {"axis": 1}), index, {})
            if names in graph.constants and found is not None:
                return found[X], tuple(graph.value(names).ravel().tolist())
        node = graph.producers.get(end)
        if node is not None and node.operator == "ai.onnx.ml.ZipMap" and len(node.inputs) == 1:
            attributes = node.attributes
            strings = [text.decode() for text in attributes.get("classlabels_strings", ())]
            return node.inputs[0], (*strings, *attributes.get("classlabels_int64s", ()))
        return end, None

    # The way forward: a method for each operator

    def _flush(self) -> None:
        """Makes layers of what waits for a bias or a shift."""
        if self.dtype not in FLOATS:
            raise ModelFileError(
                f"the input is {self.dtype} and is not cast to a real dtype before it is computed with"
            )
        if self._dense is not None:
            self.builder.dense(*self._dense)
            self._dense = None
        self.builder.flush()

    def _activation(self, name: str, **parameters: Any) -> None:
        self._function(activations.named(name)(**parameters))

    def _function(self, function: activations.Function) -> None:
        self._flush()
        self.builder.activation(function)

    def _tensor(self, node: Node, index: int) -> Tensor | None:
        """The plan of a constant input; None where an optional one is absent."""
        name = node.inputs[index] if index < len(node.inputs) else ""
        return self.graph.constants[name] if name else None

    def _floats(self, node: Node, index: int, *ranks: int) -> np.ndarray:
        tensor = self._tensor(node, index)
        if tensor is None or tensor.dtype not in FLOATS or len(tensor.shape) not in ranks:
            given = "missing" if tensor is None else f"{tensor.dtype} {tensor.shape}"
            raise ModelFileError(f"{node}: its input {index} is {given}: a real constant is needed there")
        return self.graph.value(node.inputs[index])

    def _integers(self, node: Node, index: int) -> tuple[int, ...]:
        """A shape or axes."""
        return self._whole(node, self._named_input(node, index))

    def _whole(self, node: Node, name: str) -> tuple[int, ...]:
        tensor = self.graph.constants[name]
        if tensor.dtype not in ("int32", "int64") or math.prod(tensor.shape) > 64:
            raise ModelFileError(
                f"{node}: {name[:60]!r} is {tensor.dtype} {tensor.shape}: it must be a few whole numbers"
            )
        return tuple(int(n) for n in tensor.read().ravel())

    def _per_feature(self, name: str, node: Node) -> float | np.ndarray:
        """A constant that goes with the last axis: one number, or one a feature."""
        tensor = self.graph.constants[name]
        *leading, last = (1, *tensor.shape)
        width = self.shape[-1]
        if tensor.dtype not in FLOATS or math.prod(leading) != 1 or len(tensor.shape) > len(self.shape):
            raise ModelFileError(f"{node}: the constant {tensor.dtype} {tensor.shape} is not one number a feature")
        if not tensor.shape or (last == 1 and width != 1):
            return float(self.graph.value(name).item())
        self._check_width(node, last)
        return self.graph.value(name).reshape(last)

    def _check_width(self, node: Node, width: int) -> None:
        if self.shape[-1] not in (None, width):
            raise ModelFileError(f"{node} takes {width} features, {self.shape[-1]} come in")
        self.shape[-1] = width

    def _pattern(self, step: _Step) -> None:
        if step.activation == "view":
            self._reshape_as(step.node, (0, *self._whole(step.node, step.found["shape"])))
            return
        given: dict[str, Any] = {name: self._per_feature(constant, step.node) for name, constant in step.found.items()}
        if step.activation == "clip":
            self._between(**given)
        else:
            self._activation(str(step.activation), **given)

    def _between(self, lower: float | np.ndarray = -math.inf, upper: float | np.ndarray = math.inf) -> None:
        if np.size(lower) == np.size(upper) == 1:
            self._function(building.clip(float(np.asarray(lower).item()), float(np.asarray(upper).item())))
        else:
            self._activation("clip", lower=lower, upper=upper)

    def _named(self, step: _Step) -> None:
        name, parameters = _ACTIVATIONS[step.node.operator]
        given = {ours: step.node.number(theirs, default) for theirs, (ours, default) in parameters.items()}
        self._activation(name, **given)

    def _selu(self, step: _Step) -> None:
        ours = [nearest(value, "float32") for value in (activations.SELU_ALPHA, activations.SELU_SCALE)]
        alpha, gamma = step.node.number("alpha", ours[0]), step.node.number("gamma", ours[1])
        if [alpha, gamma] == ours:
            self._activation("selu")
        else:
            self._activation("elu", alpha=alpha)
            self._affine(1, gamma)

    def _gelu(self, step: _Step) -> None:
        kinds = {b"none": "gelu", b"tanh": "gelu_tanh"}
        kind = step.node.take("approximate", b"none")
        if kind not in kinds:
            raise ModelFileError(f"{step.node}: its attribute approximate is {kind[:60]!r}")
        self._activation(kinds[kind])

    def _swish(self, step: _Step) -> None:
        alpha = step.node.number("alpha", 1.0)
        if alpha != 1:
            raise ModelFileError(f"{step.node}: its alpha is {alpha}: only 1 can be represented, as silu")
        self._activation("silu")

    def _softmax(self, step: _Step) -> None:
        rank = len(self.shape)
        axis = step.node.take("axis", 1 if self.graph.opset < 13 else -1)
        if axis not in (-1, rank - 1):
            raise ModelFileError(f"{step.node} is over axis {axis} of {rank}: it must be over the last")
        self._activation({"Softmax": "softmax", "LogSoftmax": "log_softmax"}[step.node.operator])

    def _prelu(self, step: _Step) -> None:
        node = step.node
        slope = self._per_feature(self._named_input(node, 1), node)
        if self.graph.opset < 7 and not isinstance(slope, float) and len(self.shape) != 2:
            raise ModelFileError(f"{node}: its slopes go with axis 1 of {len(self.shape)}: it must be the last")
        self._function(building.prelu(np.asarray(slope)))

    def _named_input(self, node: Node, index: int) -> str:
        if self._tensor(node, index) is None:
            raise ModelFileError(f"{node} has no input {index}")
        return node.inputs[index]

    def _clip(self, step: _Step) -> None:
        node = step.node
        if self.graph.opset < 11:
            limits = node.number("min", -math.inf), node.number("max", math.inf)
        else:
            limits = self._number(node, 1, -math.inf), self._number(node, 2, math.inf)
        if limits != (-math.inf, math.inf):
            self._between(*limits)

    def _number(self, node: Node, index: int, default: float) -> float:
        if self._tensor(node, index) is None:
            return default
        held = self._floats(node, index, 0, 1)
        if held.size != 1:
            raise ModelFileError(f"{node}: its input {index} is {held.shape}: it must be one number")
        return float(held.item())

    def _matmul(self, step: _Step) -> None:
        node = step.node
        left = node.inputs[0] != step.operand
        if left and len(self.shape) != 1:
            raise ModelFileError(f"{node} multiplies {len(self.shape)} axes from the left: write MatMul(x, W)")
        weight = self._floats(node, 0 if left else 1, *((2,) if left else (2, 3)))
        weight = weight if left else np.matrix_transpose(weight)
        if weight.ndim == 3:
            fits = len(self.shape) <= 2 if self.members is None else len(self.shape) > 2 and self.members == len(weight)
            if not fits:
                raise ModelFileError(f"{node}: a weight {weight.shape} does not fit {len(self.shape)} axes of x")
            if self.members is None:
                self.shape.insert(0, len(weight))
            self.members = len(weight)
        self._weighted_sum(node, weight, None)

    def _gemm(self, step: _Step) -> None:
        node = step.node
        node.take("broadcast", 0)  # before opset 7; the shapes say the same
        if node.take("transA", 0) or len(self.shape) != 2 or self.members:
            raise ModelFileError(f"{node}: its input must be (batch, features), not transposed")
        weight = self._floats(node, 1, 2)
        weight = weight if node.take("transB", 0) else weight.T
        alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
        bias = None
        if self._tensor(node, 2) is not None:
            held = self._floats(node, 2, 0, 1, 2)
            *leading, last = (1, *held.shape)
            if math.prod(leading) != 1 or last not in (1, len(weight)):
                raise ModelFileError(f"{node}: its bias {held.shape} is not one number a feature")
            bias = np.broadcast_to(held.reshape(-1), len(weight))
            if beta != 1:
                bias = (beta * bias.astype("float64")).astype(bias.dtype)
        if alpha == 1:
            self._weighted_sum(node, weight, bias)
            return
        self._weighted_sum(node, weight, None)
        self._affine(1, alpha)
        if bias is not None:
            self._affine(2, bias)

    def _weighted_sum(self, node: Node, weight: np.ndarray, bias: np.ndarray | None) -> None:
        self._flush()
        self._check_width(node, weight.shape[-1])
        self._dense = weight, bias
        self.shape[-1] = weight.shape[-2]

    def _affine(self, stage: int, value: Any) -> None:
        """Subtracts, multiplies by or adds a constant, as stage 0, 1 or 2 of one Scale."""
        if self._dense is not None:
            self._flush()
        self.builder.affine(stage, value)

    def _constant(self, step: _Step) -> float | np.ndarray:
        """The other operand of an element-wise operator."""
        node = step.node
        if len(node.inputs) != 2:
            raise ModelFileError(f"{node} has one input: two are needed")
        name = node.inputs[node.inputs[0] == step.operand]
        if self.graph.opset < 7:  # where broadcasting had to be asked for
            node.take("broadcast", 0)
            axis, rank = node.take("axis", -1), len(self.graph.constants[name].shape)
            if axis not in (-1, len(self.shape) - rank):
                raise ModelFileError(f"{node} goes with axis {axis}: it must go with the last")
        return self._per_feature(name, node)

    def _add(self, step: _Step) -> None:
        if self._dense is None or self._dense[1] is not None:
            self._affine(2, self._constant(step))
            return
        node, (weight, _) = step.node, self._dense
        index = int(node.inputs[0] == step.operand)
        tensor = self._tensor(node, index)
        if self.members and tensor is not None and len(tensor.shape) == len(self.shape):
            bias = self._floats(node, index, len(tensor.shape))
            if bias.shape != (self.members, *(1,) * (bias.ndim - 2), self.shape[-1]) or weight.ndim == 2:
                raise ModelFileError(f"{node}: its bias {bias.shape} does not fit {self.members} members")
            bias = bias.reshape(self.members, -1)
        else:
            value = self._constant(step)
            if isinstance(value, float):
                self._affine(2, value)
                return
            bias = np.broadcast_to(value, weight.shape[:-1])
        self._dense = weight, bias

    def _sub(self, step: _Step) -> None:
        self._affine(0, self._constant(step))
        if step.node.inputs[1] == step.operand:  # c - x
            self._affine(1, -1.0)

    def _mul(self, step: _Step) -> None:
        self._affine(1, self._constant(step))

    def _div(self, step: _Step) -> None:
        value = self._constant(step)
        inverse = building.reciprocal(np.asarray(value))
        self._affine(1, float(inverse) if isinstance(value, float) else inverse)

    def _neg(self, _: _Step) -> None:
        self._affine(1, -1.0)

    def _scaler(self, step: _Step) -> None:
        """`(x - offset) * scale`, float32 whatever x is; https://onnx.ai/onnx/operators/onnx_aionnxml_Scaler.html."""
        node = step.node
        given = [
            np.asarray(node.take(name, (default,)), "float32") for name, default in (("offset", 0.0), ("scale", 1.0))
        ]
        if self._built():
            raise ModelFileError(f"{node} must come first")
        self.dtype = "float32"
        for stage, held in enumerate(given):
            if held.size > 1:
                self._check_width(node, held.size)
            self._affine(stage, float(held.item()) if held.size == 1 and self.shape[-1] != 1 else held)

    def _batch_normalisation(self, step: _Step) -> None:
        node = step.node
        opset = self.graph.opset
        training = not node.take("is_test", 0) if opset < 7 else node.take("training_mode", 0)
        node.take("momentum", 0.9)
        if training or not node.take("spatial", 1) or any(node.outputs[1:]):
            raise ModelFileError(f"{node} is in training mode: export the model for inference")
        if len(self.shape) != 2 or self.members:
            raise ModelFileError(f"{node} is over axis 1 of {len(self.shape)}: it must be the last")
        gamma, beta, mean, variance = (self._floats(node, i, 1) for i in range(1, 5))
        for held in (gamma, beta, mean, variance):
            self._check_width(node, held.size)
        self._flush()
        self.builder.batch_normalisation(mean, variance, node.number("epsilon", 1e-5), gamma, beta)

    def _dropout(self, step: _Step) -> None:
        node, opset = step.node, self.graph.opset
        if opset < 12:
            node.take("ratio", 0.5)
            training: Any = opset < 7 and not node.take("is_test", 0)
        else:
            node.take("seed", 0)
            name = node.inputs[2] if len(node.inputs) > 2 else ""
            training = self._tensor(node, 2) is not None and self.graph.value(name).any()
        if training:
            raise ModelFileError(f"{node} is in training mode: export the model for inference")

    def _identity(self, _: _Step) -> None:
        pass

    def _cast(self, step: _Step) -> None:
        node = step.node
        number = node.take("to", 0)
        node.take("saturate", 1)
        node.take("round_mode", b"up")
        dtype = DTYPES.get(number, f"data type {number}")
        if dtype != self.dtype and (self._built() or dtype not in FLOATS):
            raise ModelFileError(f"{node} from {self.dtype} to {dtype}: only the input may be cast, to a real dtype")
        if dtype != self.dtype:
            if self.is_rounded:
                raise ModelFileError(f"{node} to {dtype} rounds x to {self.dtype} first: cannot be represented")
            self.is_rounded = self.dtype not in FLOATS or widest([self.dtype, dtype]) != dtype
        self.dtype = dtype

    def _split(self, step: _Step) -> None:
        """A part of the outputs of the layer right before it: a part of its rows."""
        node = step.node
        if self._dense is None or self.members or node.take("axis", 0) not in (-1, len(self.shape) - 1):
            raise ModelFileError(f"{node}: only the outputs of a Gemm or MatMul, right after it, can be split")
        weight, bias = self._dense
        width, parts = len(weight), len(node.outputs)
        node.take("num_outputs", parts)
        equal = math.ceil(width / parts)
        sizes: Sequence[int] = [equal] * (parts - 1) + [width - equal * (parts - 1)]
        if self.graph.opset < 13:
            sizes = node.take("split", tuple(sizes))
        elif self._tensor(node, 1) is not None:
            sizes = self._integers(node, 1)
        index = node.outputs.index(step.result)
        if len(sizes) != parts or sum(sizes) != width or min(sizes) < 1:
            raise ModelFileError(f"{node}: {width} features cannot be split into {tuple(sizes)[:8]}")
        rows = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
        self._dense = weight[rows], None if bias is None else bias[rows]
        self.shape[-1] = sizes[index]

    # Shapes

    def _built(self) -> bool:
        return bool(self.builder.begun or self._dense)

    def _flatten(self, step: _Step) -> None:
        node, rank = step.node, len(self.shape)
        axis = node.take("axis", 1)
        axis += rank if axis < 0 else 0
        if not 0 <= axis <= rank:
            raise ModelFileError(f"{node}: no axis {axis} of {rank}")
        after = [_product(self.shape[:axis]), _product(self.shape[axis:])]
        self._reshape_to(node, after, axis)

    def _reshape(self, step: _Step) -> None:
        self._reshape_as(step.node, self._integers(step.node, 1), keeps=not step.node.take("allowzero", 0))

    def _reshape_as(self, node: Node, asked: tuple[int, ...], keeps: bool = True) -> None:
        """To the sizes asked for: -1 is what is left, and 0, where it keeps, an axis as it is."""
        before = self.shape
        if (
            len(asked) > 8
            or (keeps and 0 in asked[len(before) :])
            or min(asked, default=-2) < -1
            or asked.count(-1) > 1
        ):
            raise ModelFileError(f"{node}: no shape {asked[:9]}")
        after: list[int | None] = [before[i] if n == 0 and keeps else n for i, n in enumerate(asked)]
        start = int(None in before)  # a free batch stays the first axis, whatever size of it was written down
        total, others = _product(before[start:]), _product([n for n in after[start:] if n != -1])
        if total is None or others is None:
            if len(after) == len(before) and all(n in (-1, was) for n, was in zip(after, before, strict=True)):
                return
            raise ModelFileError(f"{node} from {_free(before)} to {asked}: the axes to be joined must have a size")
        if -1 in after[start:] and others > 0:
            after[after.index(-1, start)] = total // others
        if start:
            after[0] = None
        if _product(after[start:]) != total:
            raise ModelFileError(f"{node}: {_free(before)} cannot be given the shape {asked}")
        self._reshape_to(node, after)

    def _squeeze(self, step: _Step) -> None:
        node, rank = step.node, len(self.shape)
        if self.graph.opset < 13:
            axes = node.take("axes", ())
        else:
            axes = () if self._tensor(node, 1) is None else self._integers(node, 1)
        unsqueeze = node.operator == "Unsqueeze"
        rank += len(axes) if unsqueeze else 0
        found = {axis + rank if axis < 0 else axis for axis in axes}
        if not found or len(found) != len(axes) or not found <= set(range(rank)):
            raise ModelFileError(f"{node}: no axes {axes[:8]} of {rank}")
        if unsqueeze:
            rest = iter(self.shape)
            after = [1 if i in found else next(rest) for i in range(rank)]
        else:
            after = [n for i, n in enumerate(self.shape) if i not in found]
            if any(self.shape[i] != 1 for i in found):
                raise ModelFileError(f"{node}: the axes {axes[:8]} of {_free(self.shape)} are not all 1")
        self._reshape_to(node, after)

    def _reshape_to(self, node: Node, after: list[int | None], axis: int | None = None) -> None:
        """Keeps the features, the last axis; or joins the axes of the input from `axis` on, the one after the batch."""
        before = self.shape
        if after == before or (node.outputs[0] in self.graph.outputs and after == before[:-1] and before[-1] == 1):
            return
        self._flush()
        untouched = all(isinstance(layer, Scale) and layer.in_features is None for layer in self.builder.layers)
        starts = range(1, len(before)) if axis is None else [axis]
        joined = next((before[i:] for i in starts if _product(before[i:]) == after[-1] is not None), [])
        if before == self.given and untouched and joined:
            self.builder.input_shape = tuple(n for n in joined if n is not None) if len(joined) > 1 else None
        elif self.members or not (after and before and after[-1] == before[-1] and _ones_apart(after, before)):
            raise ModelFileError(
                f"{node} from {_free(before)} to {_free(after)}: only the input can be flattened, and an axis of one "
                "output squeezed at the very end: leave it out and reshape the result"
            )
        self.shape = after


def _input_type(value: Any) -> tuple[str, list[int | None]]:
    """The dtype and the shape of an input; None for an axis without a size."""
    if value.type.WhichOneof("value") != "tensor_type" or not value.type.tensor_type.HasField("shape"):
        raise ModelFileError(f"the input {value.name[:60]!r} has no shape: it must state one")
    stated = value.type.tensor_type
    if not 1 <= len(stated.shape.dim) <= 8 or any(dim.dim_value < 0 for dim in stated.shape.dim):
        raise ModelFileError(f"the input {value.name[:60]!r} must have 1 to 8 axes, of positive sizes")
    shape = [dim.dim_value or None for dim in stated.shape.dim]
    return DTYPES.get(stated.elem_type, f"data type {stated.elem_type}"), shape


def _product(shape: Sequence[int | None]) -> int | None:
    sizes = [n for n in shape if n is not None]
    return math.prod(sizes) if len(sizes) == len(shape) else None


def _ones_apart(a: Sequence[int | None], b: Sequence[int | None]) -> bool:
    """Whether two shapes differ by leading axes of size 1 only."""
    return [n for n in a[:-1] if n != 1] == [n for n in b[:-1] if n != 1]


def _free(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("?" if n is None else str(n) for n in shape) + ")"


_OPERATORS: dict[str, Callable[[_Chain, _Step], None]] = {
    **dict.fromkeys(_ACTIVATIONS, _Chain._named),
    "Add": _Chain._add,
    "BatchNormalization": _Chain._batch_normalisation,
    "Cast": _Chain._cast,
    "Clip": _Chain._clip,
    "Div": _Chain._div,
    "Dropout": _Chain._dropout,
    "Flatten": _Chain._flatten,
    "Gelu": _Chain._gelu,
    "Gemm": _Chain._gemm,
    "Identity": _Chain._identity,
    "LogSoftmax": _Chain._softmax,
    "MatMul": _Chain._matmul,
    "Mul": _Chain._mul,
    "Neg": _Chain._neg,
    "PRelu": _Chain._prelu,
    "Reshape": _Chain._reshape,
    "Selu": _Chain._selu,
    "Softmax": _Chain._softmax,
    "Split": _Chain._split,
    "Squeeze": _Chain._squeeze,
    "Sub": _Chain._sub,
    "Swish": _Chain._swish,
    "Unsqueeze": _Chain._squeeze,
    "ai.onnx.ml.Scaler": _Chain._scaler,
}
