"""PyTorch: state dicts in `.pt` and `.pth` files, and live modules.

A file of `torch.save` is a zip, https://pytorch.org/docs/stable/notes/serialization.html: `data.pkl`, a pickle whose
tensors refer to `data/<key>`, their raw storages. The pickle is read as data (`nnfwd.io.pickles`); PyTorch is not
needed for it. A live module brings PyTorch along; nothing here imports it.
"""

import contextlib
import functools
import operator
import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NoReturn

import numpy as np

from nnfwd import activations
from nnfwd.activations import Function
from nnfwd.errors import ModelFileError, NnfwdError
from nnfwd.io.building import Builder, clip, prelu, reciprocal
from nnfwd.io.pickles import UnknownObject, inert
from nnfwd.io.reading import FLOATS, Archive, Given, Limits, Tensor, array, check_tensor, file_size, itemsize
from nnfwd.io.state_dict import network
from nnfwd.layers import Dense
from nnfwd.network import Network
from nnfwd.placement import dtype_name

_STATE_DICT = "save a state dict: torch.save(model.state_dict(), path)"
_AGAIN = "load it with PyTorch and save it again with torch.save(model.state_dict(), path)"
_WEIGHTS = {"weight", "bias", "running_mean", "running_var"}
_OPCODES = 64  # for each of limits.tensors; torch.save needs about 30


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor as the pickle describes it, not checked; all in elements of its storage."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Any:
    if isinstance(storage, UnknownObject):
        return storage
    if metadata:
        raise ModelFileError("a tensor with metadata ('conj', 'neg'), a view that is not stored as it is")
    return _View(storage, offset, shape, strides)


def _rebuild_parameter(view: Any, requires_grad: Any, hooks: Any) -> Any:
    return view


def _ordered_dict() -> dict[Any, Any]:
    return {}


_STORAGES = {
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch FloatStorage": "float32",
    "torch DoubleStorage": "float64",
    "torch CharStorage": "int8",
    "torch ShortStorage": "int16",
    "torch IntStorage": "int32",
    "torch LongStorage": "int64",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
}
_NAMES = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
} | _STORAGES


def read(file: IO[bytes], given: Given) -> Network:
    """The network of a state dict, or of one inside a checkpoint: dicts in dicts are joined by dots.

    Objects beside the weights, of whatever class, are left alone; one in the place of a weight is refused by name.
    """
    limits = given.limits
    size = file_size(file)
    if file.read(4) != b"PK\x03\x04":
        raise ModelFileError(f"not a zip, as torch.save writes since PyTorch 1.6: {_AGAIN}")
    archive = Archive(file, limits)
    roots = [name.removesuffix("data.pkl") for name in archive.members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ModelFileError(f"a zip with {len(roots)} members data.pkl, not one: torch.save did not write it")
    if f"{roots[0]}constants.pkl" in archive.members:
        raise ModelFileError(f"a TorchScript program: {_AGAIN}")
    for name, info in archive.members.items():
        if info.compress_type != zipfile.ZIP_STORED:
            raise ModelFileError(f"its member {name} is compressed, which torch.save never does: {_AGAIN}")
    storages = _Storages(archive, roots[0], max(limits.expansion * size, 2**24))
    data = archive.read(f"{roots[0]}data.pkl", metadata=True)
    saved = inert(data, _NAMES, storages.find, _OPCODES * limits.tensors)
    if isinstance(saved, UnknownObject):
        raise ModelFileError(_unknown(saved))
    if not isinstance(saved, dict):
        raise ModelFileError(f"it holds a {_kind(saved)}, not a state dict: torch.save(model.state_dict(), path)")
    named = _flat(saved, limits)
    _check_chosen(named, [given.prefix] if isinstance(given.prefix, str) else given.prefix or [""])
    return network({k: storages.plan(k, v, limits) if isinstance(v, _View) else v for k, v in named.items()}, given)


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, _View) else type(value).__name__


def _unknown(value: UnknownObject) -> str:
    return f"whole module or unknown object {value}: {_STATE_DICT}"


def _check_chosen(named: dict[str, Any], prefixes: Sequence[str]) -> None:
    """Raises `ModelFileError` where another object is in the place of a chosen weight, or of all that are chosen."""
    starts = [f"{stripped}." if (stripped := prefix.strip().rstrip(".")) else "" for prefix in prefixes]
    empty = not any(isinstance(value, _View) for value in named.values())
    for name, value in named.items():
        shown = ascii(name[:80])[1:-1]
        if name.rpartition(".")[2] in _WEIGHTS and name.startswith(tuple(starts)):
            if isinstance(value, UnknownObject):
                raise ModelFileError(f"{shown} is a {_unknown(value)}")
            if not isinstance(value, _View):
                raise ModelFileError(f"{shown} is a {type(value).__name__}, no tensor")
        elif isinstance(value, UnknownObject) and (empty or any(start.startswith(f"{name}.") for start in starts)):
            raise ModelFileError(f"{shown} is a {_unknown(value)}")


def _flat(saved: dict[Any, Any], limits: Limits) -> dict[str, Any]:
    """What nested dicts hold, by their keys joined by dots. They may be nested without end, or shared manifold."""
    found: dict[str, Any] = {}
    room = limits.metadata

    def walk(inside: dict[Any, Any], start: str, depth: int) -> None:
        nonlocal room
        if depth > limits.depth:
            raise ModelFileError(f"dicts nested deeper than {limits.depth}")
        for key, value in inside.items():
            name = f"{start}{key}"
            room -= 64 + 4 * len(name)  # about what it takes in memory
            if room < 0:
                raise ModelFileError(f"the names of its entries fill more than limits.metadata, {limits.metadata}")
            if isinstance(value, dict):
                walk(value, f"{name}.", depth + 1)
            elif name in found:
                raise ModelFileError(f"two entries have the name {name[:80]!a}")
            else:
                found[name] = value

    walk(saved, "", 1)
    return found


class _Storages:
    """The storages of a file. What several tensors share is read once."""

    def __init__(self, archive: Archive, root: str, room: int) -> None:
        self._archive = archive
        self._root = root
        self._room = room
        """Bytes that may still be read: tensors may share one storage a thousand times."""
        self._read: dict[_Storage, np.ndarray] = {}
        # PyTorch before 2.1 did not say, and runs on little-endian machines.
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in archive.members else b"little"
        if order not in (b"little", b"big"):
            raise ModelFileError(f"an unknown byte order {order[:20]!r}")
        self._order = "<" if order == b"little" else ">"

    def find(self, identifier: Any) -> _Storage | UnknownObject:
        """The storage of a persistent id, `("storage", type, key, device, number of elements)`."""
        match identifier:
            case ("storage", str(dtype), str(key), _, int(count)) if dtype in _STORAGES.values():
                info = self._archive.find(f"{self._root}data/{key}")
            case ("storage", UnknownObject() as unknown, *_):  # of complex numbers, of float8
                return unknown
            case _:
                raise ModelFileError("data.pkl refers to something that is no storage")
        if info.file_size != count * itemsize(dtype):
            raise ModelFileError(f"{info.filename} has {info.file_size} bytes, not those of {count} {dtype}")
        return _Storage(key, dtype, count)

    def plan(self, name: str, view: _View, limits: Limits) -> Tensor:
        """The plan of a tensor, whose elements must be apart from each other and inside the storage."""
        storage, offset, shape, strides = view.storage, view.offset, view.shape, view.strides
        if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
            raise ModelFileError(f"{name} is no tensor in a storage")
        check_tensor(name, shape, storage.dtype, limits)
        if len(strides) != len(shape) or not all(type(n) is int and n >= 0 for n in (offset, *strides)):
            raise ModelFileError(f"{name} {shape} has strides and an offset that do not fit it")
        extent = 1
        for stride, n in sorted(zip(strides, shape, strict=True)):
            if n > 1 and stride < extent:
                raise ModelFileError(f"{name} {shape} has elements that share memory: save {name}.contiguous()")
            extent += stride * (n - 1)
        if 0 not in shape and offset + extent > storage.count:
            raise ModelFileError(f"{name} {shape} does not fit into its storage of {storage.count} elements")
        return Tensor(shape, storage.dtype, functools.partial(self._values, name, view))

    def _values(self, name: str, view: _View) -> np.ndarray:
        storage = view.storage
        if storage not in self._read:
            data = self._archive.read(f"{self._root}data/{storage.key}")
            self._read[storage] = array(data, storage.dtype, (storage.count,), order=self._order)
        flat = self._read[storage]
        width = flat.itemsize
        found = np.ndarray(view.shape, flat.dtype, flat, view.offset * width, [n * width for n in view.strides])
        self._room -= found.nbytes
        if self._room < 0:
            raise ModelFileError(f"{name} shares its storage with others too often: raise limits.expansion")
        return found


def from_torch(module: Any, /) -> Network:
    """The network of a live PyTorch module: an `nn.Sequential`, or any module whose forward is one chain of layers.

    Meanwhile `module.training` is False: no other thread should run it. The forward is traced by `torch.fx`,
    https://docs.pytorch.org/docs/stable/fx.html, with a symbol for x; nothing is computed. Read as at inference, also
    while it is in training mode. The weights are copied to NumPy, bfloat16 as float32, exactly. A Flatten of all but
    the rows changes nothing: x is `(..., features)`.

    Layers: Linear, BatchNorm1d with running statistics, Identity, Dropout, Flatten, and the activations nnfwd has, as
    modules, functions or methods. A number or a tensor `(features,)` that is added, subtracted, multiplied with or
    divided by becomes a Scale, `(x - mean) / std` one Scale; added right after a Linear without a bias, a tensor is
    its bias. Softmax over the last dimension, -1 or 1. Softplus as PyTorch computes it is x beyond its threshold of
    20; here it is log(1 + exp(x)) everywhere, up to exp(-20) = 2.1e-9 more: below rounding in float32, not in float64.

    Raises:
        ModelFileError: for what cannot be represented, naming it: a branch, another layer or function, a hook, a
            parametrisation, a forward that depends on the numbers.
        ShapeError: where two layers do not fit.
    """
    torch = sys.modules.get("torch")
    if isinstance(module, str | bytes | os.PathLike):
        raise ModelFileError(
            f"from_torch takes a live module, not {module!r:.80}: a file is read by nnfwd.load(path, activations=...)"
        )
    if torch is None or not isinstance(module, torch.nn.Module):
        raise ModelFileError(
            f"from_torch takes a torch.nn.Module, not a {type(module).__name__}: "
            "a dict of arrays is read by nnfwd.from_state_dict"
        )
    if inside := _WRAPPERS.get(type(module).__name__):
        raise ModelFileError(f"a {type(module).__name__} wraps the module: pass {inside}")
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        raise ModelFileError("a hook is registered for all modules, which may compute anything: remove it first")
    for name, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            raise ModelFileError(
                f"{_called(name, part)} has a hook or a forward of its own, which may compute anything"
            )
    root = torch.nn.Sequential(module)  # so that a single layer is a layer too, and constants are not kept in `module`
    with _at_inference(module):
        try:
            graph = torch.fx.Tracer().trace(root)
        except Exception as error:  # a forward of the caller's, given a symbol, may fail in any way
            raise ModelFileError(
                f"the forward of {type(module).__name__} cannot be traced as one chain of layers: "
                f"{str(error).strip().partition(chr(10))[0]}"
            ) from error
    return _Chain(torch, root).network(graph)


_WRAPPERS = {"OptimizedModule": "m._orig_mod"} | dict.fromkeys(
    ("DataParallel", "DistributedDataParallel"), "model.module"
)


@contextlib.contextmanager
def _at_inference(module: Any) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def _called(name: str, module: Any) -> str:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return f"{name}, {kind}," if name else kind


# PyTorch's functions without the tensor they are applied to, with PyTorch's own defaults.


def _plain(ours: str, inplace: bool = False) -> str:
    return ours


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Function:
    return activations.leaky_relu(negative_slope=negative_slope)


def _threshold(threshold: float, value: float, inplace: bool = False) -> Function:
    if value != 0:
        raise ModelFileError(f"threshold with value={value}: only 0 is known")
    return activations.thresholded_relu(alpha=threshold)


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Function:
    return clip(min_val, max_val)


def _clamp(min: Any = None, max: Any = None) -> str | Function:
    if (min, max) == (0, None):
        return "relu"
    if min is None or max is None:
        raise ModelFileError(f"clamp with min={min}, max={max}: only min=0, or both, are known")
    return clip(min, max)


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> str:
    if beta != 1 or threshold < 20:
        raise ModelFileError(f"softplus with beta={beta}, threshold={threshold}: only 1 and 20 are known")
    return "softplus"


def _elu(alpha: float = 1.0, inplace: bool = False) -> Function:
    return activations.elu(alpha=alpha)


def _celu(alpha: float = 1.0, inplace: bool = False) -> Function:
    return activations.celu(alpha=alpha)


def _gelu(approximate: str = "none") -> str:
    if approximate not in ("none", "tanh"):
        raise ModelFileError(f"gelu with approximate={approximate!r}")
    return "gelu" if approximate == "none" else "gelu_tanh"


def _softmax(ours: str, dim: int | None = None, *, _stacklevel: int = 3, dtype: Any = None) -> str:
    if dim not in (-1, 1) or dtype is not None:
        raise ModelFileError(f"{ours} with dim={dim}, dtype={dtype}: dim must be -1, or 1, without a dtype")
    return ours


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> str:
    if training:
        raise ModelFileError("a dropout that drops at inference too: write training=self.training")
    return "identity"


_PLAIN = {
    "relu": "relu", "relu6": "relu6", "sigmoid": "sigmoid", "tanh": "tanh", "softsign": "softsign", "selu": "selu",
    "silu": "silu", "mish": "mish", "exp": "exp", "logsigmoid": "log_sigmoid", "hardsigmoid": "hard_sigmoid",
    "hardswish": "hard_silu",
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., str | Function]] = {
    "leaky_relu": _leaky_relu, "prelu": prelu, "threshold": _threshold, "hardtanh": _hardtanh, "clamp": _clamp,
    "clip": _clamp, "softplus": _softplus, "elu": _elu, "celu": _celu, "gelu": _gelu, "dropout": _dropout,
}  # fmt: skip
_FUNCTIONS |= {theirs: functools.partial(_plain, ours) for theirs, ours in _PLAIN.items()}
_FUNCTIONS |= {name: functools.partial(_softmax, name) for name in ("softmax", "log_softmax")}
# The modules of these functions, and which of their attributes are the settings.
_MODULES = {
    "ReLU": ("relu",), "ReLU6": ("relu6",), "Sigmoid": ("sigmoid",), "Tanh": ("tanh",), "Softsign": ("softsign",),
    "SELU": ("selu",), "SiLU": ("silu",), "Mish": ("mish",), "LogSigmoid": ("logsigmoid",),
    "Hardsigmoid": ("hardsigmoid",), "Hardswish": ("hardswish",), "LeakyReLU": ("leaky_relu", "negative_slope"),
    "Threshold": ("threshold", "threshold", "value"), "Hardtanh": ("hardtanh", "min_val", "max_val"),
    "Softplus": ("softplus", "beta", "threshold"), "ELU": ("elu", "alpha"), "CELU": ("celu", "alpha"),
    "GELU": ("gelu", "approximate"), "Softmax": ("softmax", "dim"), "LogSoftmax": ("log_softmax", "dim"),
}  # fmt: skip
_BRANCH = "a branch, and only one chain of layers can be represented"
_AFFINE = ("add", "sub", "mul", "div", "neg")
_NOTHING = {"Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"}


class _Chain:
    """Walks a traced forward, which must be one chain: each step takes what the one before gave."""

    def __init__(self, torch: Any, root: Any) -> None:
        self._torch = torch
        self._root = root
        self._builder = Builder()
        self._shapes: set[Any] = set()
        """The nodes that are the shape of x."""
        self._rows: set[Any] = set()
        """The nodes that are the number of rows of x."""
        self._known: dict[Any, str] = {torch.reshape: "reshape", torch.flatten: "flatten"}
        self._known[torch.nn.functional.linear] = "linear"
        self._known |= {getattr(operator, {"div": "truediv"}.get(name, name)): name for name in _AFFINE}
        for name in (*_FUNCTIONS, *_AFFINE, "squeeze"):
            for library in (torch, torch.nn.functional):
                for spelling in (name, f"{name}_"):
                    if hasattr(library, spelling):
                        self._known[getattr(library, spelling)] = name

    def network(self, graph: Any) -> Network:
        """The network of the graph of a forward."""
        last: Any = None
        for node in graph.nodes:
            if node.op == "get_attr" or self._is_size(node):
                continue
            name = self._name(node)
            if name in _AFFINE:
                self._affine(node, name, last)
            else:
                self._builder.flush()
                self._check_given(node, last)
                if node.op == "call_module":
                    self._module(node)
                elif node.op in ("call_function", "call_method"):
                    self._function(node, name)
            last = node
        return self._builder.network()

    def _name(self, node: Any) -> str | None:
        """What a function or a method is called here; None for one that is not known."""
        if node.op != "call_method":
            return self._known.get(node.target)
        name: str = node.target.rstrip("_")
        return name if name in {*_FUNCTIONS, *_AFFINE, "view", "reshape", "flatten", "squeeze"} else None

    def _check_given(self, node: Any, last: Any) -> None:
        """Each step takes what the one before gave."""
        given = node.args[0] if node.args else node.kwargs.get("input")
        if node.op == "placeholder" or given is last:
            return
        if self._is_constant(given):
            self._refuse(node, f"is given {given} where x belongs: this cannot be represented")
        self._refuse(node, f"does not take what comes before it: {_BRANCH}")

    def _is_constant(self, value: Any) -> bool:
        return isinstance(value, int | float) or (isinstance(value, self._torch.fx.Node) and value.op == "get_attr")

    def _refuse(self, node: Any, why: str = "is not known and cannot be represented") -> NoReturn:
        if node.op == "call_module":
            what = _called(node.target.partition(".")[2], self._root.get_submodule(node.target))
        elif node.op == "output":
            what = "the output"
        else:
            what = f"the function {getattr(node.target, '__name__', node.target)}"
        raise ModelFileError(f"{what} {why}")

    def _is_size(self, node: Any) -> bool:
        """Whether a step asks for the shape of x or its number of rows, as in `x.view(x.size(0), -1)`."""
        first, *others = node.args or (None,)
        if node.target == "size" and node.op == "call_method" and not node.kwargs and others in ([], [0]):
            (self._rows if others else self._shapes).add(node)
        elif node.target is getattr and others == ["shape"]:
            self._shapes.add(node)
        elif node.target is operator.getitem and first in self._shapes and others == [0]:
            self._rows.add(node)
        return node in self._rows or node in self._shapes

    def _module(self, node: Any) -> None:
        module = self._root.get_submodule(node.target)
        kind = type(module).__name__
        if getattr(self._torch.nn, kind, None) is not type(module):
            self._refuse(node)
        if kind == "Linear":
            self._linear(module.weight, module.bias)
        elif kind == "BatchNorm1d":
            if module.running_mean is None:
                self._refuse(node, "has no running statistics and normalises by the rows it is given")
            mean, variance = self._array(module.running_mean), self._array(module.running_var)
            affine = {"gamma": module.weight, "beta": module.bias}
            given = {name: None if tensor is None else self._array(tensor) for name, tensor in affine.items()}
            self._builder.batch_normalisation(mean, variance, module.eps, **given)
        elif kind == "Flatten":
            self._flatten(node, module.start_dim, module.end_dim)
        elif kind == "PReLU":
            self._builder.activation(prelu(self._array(module.weight)))
        elif kind in _MODULES:
            function, *settings = _MODULES[kind]
            self._builder.activation(_FUNCTIONS[function](**{name: getattr(module, name) for name in settings}))
        elif kind not in _NOTHING:
            self._refuse(node)

    # Element by element with constants: at most one Scale, as the ONNX reader's

    def _affine(self, node: Any, name: str, last: Any) -> None:
        """x + c, x - c, c - x, x * c, x / c and -x."""
        settings = dict(node.kwargs)
        operands = [*node.args, *(settings.pop(key) for key in ("input", "other") if key in settings)]
        known = all(isinstance(value, int | float | self._torch.fx.Node) for value in operands)
        if settings or not known or len(operands) != (1 if name == "neg" else 2):
            self._refuse(node, f"with {[*operands[1:], *settings]} is not known")
        others = [value for value in operands if value is not last]
        if len(others) != len(operands) - 1 or not all(map(self._is_constant, others)):
            self._refuse(node, f"takes {' and '.join(map(str, operands))}: {_BRANCH}")
        if name == "neg":
            self._builder.affine(1, -1.0)
            return
        constant = self._constant(node, others[0])
        reverse = operands[0] is not last
        if name == "add":
            self._add(constant)
        elif name == "mul":
            self._builder.affine(1, constant)
        elif name == "sub":
            self._builder.affine(0, constant)
            if reverse:
                self._builder.affine(1, -1.0)
        elif reverse:
            self._refuse(node, "divides by x, which no layer does")
        else:
            self._builder.affine(1, reciprocal(np.asarray(constant)))

    def _constant(self, node: Any, value: Any) -> float | np.ndarray:
        """One number, or one for each feature."""
        if not isinstance(value, self._torch.fx.Node):
            return float(value)
        found = self._array(operator.attrgetter(value.target)(self._root))
        if found.ndim > 2 or (found.ndim == 2 and len(found) != 1):
            self._refuse(node, f"takes {value.target} of shape {found.shape}: it must be () or (features,)")
        return float(found.item()) if found.size == 1 else found.reshape(-1)

    def _add(self, value: float | np.ndarray) -> None:
        match self._builder.last:
            case Dense(bias=None, activation=Function(name="identity")) as last:
                if isinstance(value, np.ndarray) and last.out_features == len(value):
                    self._builder.layers[-1] = Dense(last.weight, value)
                    return
        self._builder.affine(2, value)

    # Functions and methods

    def _function(self, node: Any, name: str | None) -> None:
        if name is None:
            self._refuse(node)
        if name == "squeeze":
            self._refuse(node, "drops an axis: leave it out, nnfwd gives (..., 1) where there is one output")
        if name in ("view", "reshape"):
            return self._reshape(node)
        weights = name in ("linear", "prelu")
        values = [self._value(node, value, weights) for value in node.args[1:]]
        settings = {key: self._value(node, value, weights) for key, value in node.kwargs.items() if key != "input"}
        try:
            if name == "linear":
                self._linear(*values, **settings)
            elif name == "flatten":
                self._flatten(node, *values, **settings)
            else:
                self._builder.activation(_FUNCTIONS[name](*values, **settings))
        except NnfwdError:
            raise
        except TypeError:  # settings beyond those of our functions above
            self._refuse(node, f"with {[*values, *settings]} is not known")

    def _value(self, node: Any, value: Any, weights: bool) -> Any:
        """An argument of a function, which is a number, or where it may be `weights`, an array."""
        if not isinstance(value, self._torch.fx.Node):
            return value
        if not weights and value.op == "get_attr":
            self._refuse(node, f"takes the tensor {value.target}, where only numbers are known")
        if value.op != "get_attr":
            self._refuse(node, f"takes {value} too: {_BRANCH}")
        return self._array(operator.attrgetter(value.target)(self._root))

    def _linear(self, weight: Any, bias: Any = None) -> None:
        self._builder.dense(self._array(weight), None if bias is None else self._array(bias))

    def _flatten(self, node: Any, start_dim: int = 0, end_dim: int = -1) -> None:
        if (start_dim, end_dim) != (1, -1):
            self._refuse(node, f"from dimension {start_dim} to {end_dim} does not keep the rows, as from 1 to -1 does")

    def _reshape(self, node: Any) -> None:
        """`(rows, -1)`, `(rows, features)` or `(-1, features)`, which change nothing."""
        sizes = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
            sizes = sizes[0]
        widths = [layer.out_features for layer in self._builder.layers if layer.out_features]
        features = {-1, *(widths or sizes)[-1:]}
        if len(sizes) != 2 or not (sizes[0] == -1 or sizes[0] in self._rows) or sizes[1] not in features:
            self._refuse(node, f"to {sizes} may move numbers between rows")

    def _array(self, tensor: Any) -> np.ndarray:
        """A tensor's numbers; bfloat16, which NumPy has not, as float32."""
        if isinstance(tensor, np.ndarray):
            return tensor
        dtype = dtype_name(tensor.dtype)
        if tensor.is_meta or tensor.layout is not self._torch.strided or dtype not in FLOATS:
            raise ModelFileError(
                f"a weight is {dtype}, {tensor.layout}, on device {tensor.device}: "
                f"it must be {', '.join(FLOATS)}, dense, on a device that holds numbers"
            )
        tensor = tensor.detach().cpu()
        found: np.ndarray = (tensor.float() if dtype == "bfloat16" else tensor).numpy()
        return found
