"""The nodes and constants of an ONNX file, checked. https://onnx.ai/onnx/repo-docs/IR.html

The package onnx parses the bytes; nothing of it is called besides, and no external data is opened.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from nnfwd.errors import ModelFileError
from nnfwd.io.reading import FLOATS, Limits, Tensor, array, check_tensor
from nnfwd.placement import nearest

OPSETS = range(6, 29)
"""The versions of the standard operators whose definitions the reader was written against."""
DTYPES = {1: "float32", 6: "int32", 7: "int64", 8: "string", 9: "bool", 10: "float16", 11: "float64", 16: "bfloat16"}
"""The data types that are read, by ONNX's number."""
# Where a tensor without raw_data has its values; the others in int32_data, float16 and bfloat16 as their bits.
_TYPED = {"float32": "float_data", "float64": "double_data", "int64": "int64_data", "string": "string_data"}
Model = onnx.ModelProto
X = "x"
"""In a pattern, the value that goes in."""
_COMMUTATIVE = ("Add", "Mul", "Max", "Min")


@dataclass(frozen=True)
class Node:
    """An operator at work. `str` names it in errors."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.operator} {self.name[:60]!r}"

    def take(self, name: str, default: Any) -> Any:
        """An attribute, which must be of the default's type."""
        value = self.attributes.pop(name, default)
        if type(value) is not type(default):
            raise ModelFileError(f"{self}: its attribute {name} is of type {type(value).__name__}")
        return value

    def number(self, name: str, default: float) -> float:
        """A float attribute, which is a float32 in ONNX, its default too."""
        return nearest(self.take(name, default), "float32")


class Graph:
    """The nodes and the plan of the constants of a model, checked: sorted, every name once, nothing hidden."""

    def __init__(self, model: onnx.ModelProto, size: int, limits: Limits) -> None:
        graph = model.graph
        self._left = 2 * size + 2**24
        self.limits = limits
        self.opset = _opset(model)
        for what, held in (
            ("functions", model.functions),
            ("training information", model.training_info),
            ("sparse initialisers", graph.sparse_initializer),
        ):
            if held:
                raise ModelFileError(f"the model holds {what}: only a chain of operators can be read")
        tensors = sum(math.prod(tensor.dims) != 1 for tensor in graph.initializer)  # and numbers besides
        if tensors > limits.tensors or max(len(graph.initializer), len(graph.node)) > 16 * limits.layers:
            raise ModelFileError(f"{len(graph.initializer)} initialisers, {len(graph.node)} nodes: beyond the limits")
        self.constants: dict[str, Tensor] = {}
        for tensor in graph.initializer:
            self._define(tensor.name, self.constants)
            self.constants[tensor.name] = _plan(tensor, f"the initialiser {tensor.name[:60]}", limits)
        inputs = [value for value in graph.input if value.name not in self.constants]
        if len(inputs) != 1:
            raise ModelFileError(f"the model has {len(inputs)} inputs: one is needed: {_names(inputs)}")
        self.input = inputs[0]
        self.outputs = [value.name for value in graph.output]
        self.producers: dict[str, Node] = {}
        self.nodes = []
        known = {self.input.name, ""} | self.constants.keys()
        for proto in graph.node:
            node = _node(proto)
            missing = [name for name in node.inputs if name not in known]
            if missing:
                raise ModelFileError(f"{node} takes {missing[0][:60]!r}, which no node before it gives")
            self.nodes.append(node)
            for name in filter(None, node.outputs):
                self._define(name, known)
                known.add(name)
                self.producers[name] = node
            self._fold(node)
        self._check_use()

    def _define(self, name: str, known: Any) -> None:
        if not name or name in known:
            raise ModelFileError(f"two values of one name, {name[:60]!r}")

    def _fold(self, node: Node) -> None:
        """Keeps the output of a node that only hands on a constant."""
        if node.operator == "Constant" and len(node.attributes) == 1 and len(node.outputs) == 1:
            self.constants[node.outputs[0]] = _constant(node, self.limits)
        elif node.operator == "Identity" and node.inputs[:1] and node.inputs[0] in self.constants:
            self.constants[node.outputs[0]] = self.constants[node.inputs[0]]
        elif node.operator == "Transpose" and node.inputs[:1] and node.inputs[0] in self.constants:
            held = self.constants[node.inputs[0]]
            if len(held.shape) == 2 and node.attributes.get("perm", (1, 0)) == (1, 0):
                self.constants[node.outputs[0]] = Tensor(held.shape[::-1], held.dtype, lambda: held.read().T)

    def _check_use(self) -> None:
        """Every output is computed, and every node leads to one."""
        needed = set(self.outputs)
        lost = needed - self.producers.keys() - {self.input.name}
        if lost or not needed:
            raise ModelFileError(f"no node gives the output {min(lost, default='')[:60]!r}")
        for node in reversed(self.nodes):
            if needed.isdisjoint(node.outputs) and not self.constants.keys() >= set(node.outputs):
                raise ModelFileError(f"{node} leads to no output: only a chain can be read")
            needed.update(filter(None, node.inputs))

    def value(self, name: str) -> np.ndarray:
        """The values of a constant."""
        found = self.constants[name].read()
        self._left -= found.nbytes
        if self._left < 0:
            raise ModelFileError(f"the constants, {name[:60]!r} among them, are used again and again")
        return found

    def match(self, pattern: Any, name: str, found: dict[str, str]) -> dict[str, str] | None:
        """What the names of a pattern stand for where the value `name` is computed by it; None where it is not."""
        if isinstance(pattern, str):
            fits = (pattern == X) != (name in self.constants) and found.get(pattern, name) == name
            return found | {pattern: name} if fits else None
        if isinstance(pattern, float):
            return found if self._equals(name, pattern) else None
        operator, *operands = pattern
        attributes = operands.pop() if isinstance(operands[-1], dict) else {}
        node = self.producers.get(name)
        if (
            node is None
            or node.operator != operator
            or node.attributes != attributes
            or len(node.inputs) != len(operands)
        ):
            return None
        for order in (node.inputs, node.inputs[::-1])[: 2 if operator in _COMMUTATIVE else 1]:
            whole: dict[str, str] | None = found
            for part, operand in zip(operands, order, strict=True):
                whole = None if whole is None else self.match(part, operand, whole)
            if whole is not None:
                return whole
        return None

    def _equals(self, name: str, number: float) -> bool:
        """Whether a value is this constant, in the precision in which it is written."""
        tensor = self.constants.get(name)
        if tensor is None or math.prod(tensor.shape) != 1 or tensor.dtype not in (*FLOATS, "int64"):
            return False
        dtype = tensor.dtype if tensor.dtype in FLOATS else "float64"
        return float(tensor.read().item()) in (nearest(number, dtype), nearest(number, "float32"))


def parse(data: bytes) -> onnx.ModelProto:
    """The model of a file's bytes, or `ModelFileError`."""
    try:
        _check_structure(data)
        return onnx.ModelProto.FromString(data)
    except (DecodeError, IndexError) as error:
        raise ModelFileError(f"not an ONNX model: {error}") from None


def _fields() -> dict[str, dict[int, str | int]]:
    """Of each message, by number, the fields that hold messages, with their names, or integers, with their width."""
    found: dict[str, dict[int, str | int]] = {}
    waiting = [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        message = waiting.pop()
        if message.full_name in found:
            continue
        found[message.full_name] = fields = {}
        for field in message.fields:
            if field.message_type:
                fields[field.number] = field.message_type.full_name
                waiting.append(field.message_type)
            elif field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
                fields[field.number] = 4 if field.cpp_type == field.CPPTYPE_INT32 else 8
    return found


_FIELDS = _fields()
_ROOM = 2**26


def _check_structure(data: bytes) -> None:
    """Refuses what the parser would make much larger: two bytes can ask for an empty message of 200.

    https://protobuf.dev/programming-guides/encoding/
    """
    cost = numbers = 0
    waiting = [(onnx.ModelProto.DESCRIPTOR.full_name, 0, len(data))]
    while waiting:
        message, at, end = waiting.pop()
        while at < end:
            key, at = _varint(data, at)
            cost += 64
            size = {1: 8, 5: 4}.get(key & 7, 0)
            if key & 7 == 0:
                _, at = _varint(data, at)
            elif key & 7 == 2:
                size, at = _varint(data, at)
                kind = _FIELDS[message].get(key >> 3)
                if size > end - at:
                    raise ModelFileError("not an ONNX model: it ends early")
                if isinstance(kind, int):
                    numbers += kind * int(np.count_nonzero(np.frombuffer(data, "u1", size, at) < 128))
                elif kind is not None:
                    cost += 192
                    waiting.append((kind, at, at + size))
            at += size
            if cost > _ROOM or numbers > _ROOM // 2 + 2 * len(data):
                raise ModelFileError("too many nodes, names or numbers for one chain of layers")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 128 and shift < 63:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
    return value | data[at] << shift, at + 1


def _names(values: Any) -> str:
    return ", ".join(value.name[:60] for value in values[:5]) or "none"


def _opset(model: onnx.ModelProto) -> int:
    """The version of the standard operators."""
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if len(versions) != 1:
        raise ModelFileError(f"the model states {len(versions)} versions of the standard operators: it must state one")
    if versions[0] not in OPSETS:
        raise ModelFileError(f"opset {versions[0]} is not one of {OPSETS[0]} to {OPSETS[-1]}")
    return int(versions[0])


def _node(proto: onnx.NodeProto) -> Node:
    operator = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}"[:80]
    attributes: dict[str, Any] = {}
    node = Node(
        operator[:80], proto.name or next(iter(proto.output), ""), (*proto.input,), (*proto.output,), attributes
    )
    if not any(proto.output):
        raise ModelFileError(f"{node} has no output")
    if proto.domain not in ("", "ai.onnx", "ai.onnx.ml"):
        raise ModelFileError(f"{node}: the operators of {proto.domain[:60]!r} are unknown")
    for attribute in proto.attribute:
        if attribute.name in attributes or attribute.ref_attr_name:
            raise ModelFileError(f"{node}: its attribute {attribute.name[:60]} stands twice, or for a function's")
        attributes[attribute.name] = _attribute(attribute, node)
    return node


def _attribute(attribute: onnx.AttributeProto, node: Node) -> Any:
    kinds = onnx.AttributeProto
    single = {kinds.FLOAT: "f", kinds.INT: "i", kinds.STRING: "s", kinds.TENSOR: "t"}
    several = {kinds.FLOATS: "floats", kinds.INTS: "ints", kinds.STRINGS: "strings"}
    if attribute.type in single:
        return getattr(attribute, single[attribute.type])
    if attribute.type in several:
        return tuple(getattr(attribute, several[attribute.type]))
    raise ModelFileError(f"{node}: its attribute {attribute.name[:60]} is a graph or of another unreadable type")


def _constant(node: Node, limits: Limits) -> Tensor:
    """The value of a Constant node."""
    ((name, value),) = node.attributes.items()
    if name == "value" and isinstance(value, onnx.TensorProto):
        return _plan(value, str(node), limits)
    kinds = {"value_float": "float32", "value_floats": "float32", "value_int": "int64", "value_ints": "int64"}
    if name not in kinds:
        raise ModelFileError(f"{node}: a constant given as {name[:60]} is not read")
    held = np.asarray(value, kinds[name])
    return Tensor(held.shape, kinds[name], lambda: held)


def _plan(tensor: onnx.TensorProto, name: str, limits: Limits) -> Tensor:
    """The plan of a tensor: it holds its data itself, and exactly as much as its shape asks for."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        raise ModelFileError(f"{name} lies in another file: save the model whole (PyTorch: external_data=False)")
    dtype = DTYPES.get(tensor.data_type)
    if dtype is None or tensor.HasField("segment"):
        raise ModelFileError(f"{name} is of data type {tensor.data_type}: {', '.join(DTYPES.values())} are read")
    shape = tuple(tensor.dims)
    size = check_tensor(name, shape, "int64" if dtype == "string" else dtype, limits)
    count = math.prod(shape)
    raw = len(tensor.raw_data) if tensor.HasField("raw_data") else None
    field = _TYPED.get(dtype, "int32_data")
    held = len(getattr(tensor, field))
    if (raw, held) not in ((size if dtype != "string" else -1, 0), (None, count)):
        raise ModelFileError(f"{name} {shape} of {dtype} does not hold the {count} numbers of its shape")

    def values() -> np.ndarray:
        if raw is not None:
            return array(tensor.raw_data, dtype, shape)
        if dtype == "string":
            return np.array([text.decode() for text in tensor.string_data], dtype=object).reshape(shape)
        bits = dtype if field != "int32_data" else {"int32": "int32", "bool": "bool"}.get(dtype, "uint16")
        flat: NDArray[Any] = np.fromiter(getattr(tensor, field), bits, count)
        return array(flat.tobytes(), dtype, shape, order="=")

    return Tensor(shape, dtype, values)
