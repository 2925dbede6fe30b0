"""PyTorch's files: state dicts in `.pt` and `.pth`, and in checkpoints.

A file of `torch.save` is a zip, https://pytorch.org/docs/stable/notes/serialization.html: `data.pkl`, a pickle whose
tensors refer to `data/<key>`, their raw storages. The pickle is read as data (`nnfwd.io.pickles`); PyTorch is not
needed for it.
"""

import functools
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from nnfwd.errors import ModelFileError
from nnfwd.io.pickles import UnknownObject, inert
from nnfwd.io.reading import Archive, Given, Limits, Tensor, array, check_tensor, file_size, itemsize
from nnfwd.io.state_dict import network
from nnfwd.network import Network

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
