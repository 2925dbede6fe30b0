"""The `.npz` format: NumPy's own, with the layers described in JSON.

Members are arrays `layers.{i}.weight`, `.bias`, `.scale`, `.center`, `.shift` and `.activation.{parameter}`, and one
member `nnfwd`, the UTF-8 bytes of

    {"format": 1, "layers": [{"type": "dense", "activation": {"name": "leaky_relu", "negative_slope": 0.2}}, ...]}

in which scalars stand; an array has null there.
"""

import ast
import io
import json
import math
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from nnfwd import activations
from nnfwd.errors import ModelFileError, NnfwdError
from nnfwd.io import Limits
from nnfwd.io.files import replacing
from nnfwd.layers import Activation, Dense, Layer, Scale, to_numpy
from nnfwd.network import Network
from nnfwd.placement import dtype_name

_FORMAT = 1
_TYPES: dict[str, type[Layer]] = {"dense": Dense, "scale": Scale, "activation": Activation}
_DTYPES = {np.dtype(order + name) for name in ("f2", "f4", "f8", "u1") for order in "<>"}
# What zipfile, json, ast and struct raise on damaged bytes.
_DAMAGED = (
    *(zipfile.BadZipFile, struct.error, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError),
    *(RecursionError, NotImplementedError, RuntimeError, OverflowError, SyntaxError, MemoryError),
)


def write(network: Network, path: Path) -> None:
    """Writes a network, as a whole or not at all."""
    arrays: dict[str, np.ndarray] = {}
    described = []
    for i, layer in enumerate(network):
        function = layer.activation
        if not function.is_named:
            raise ModelFileError(
                f"{path}: layer {i}: the activation {function.name} is a callable, which no file can hold"
            )
        description: dict[str, Any] = {"type": type(layer).__name__.lower(), "activation": {"name": function.name}}
        for name in layer.fields:
            description[name] = _put(getattr(layer, name), f"layers.{i}.{name}", arrays, path)
        for name, value in function.parameters.items():
            description["activation"][name] = _put(value, f"layers.{i}.activation.{name}", arrays, path)
        described.append({k: v for k, v in description.items() if v is not ABSENT})
    text = json.dumps({"format": _FORMAT, "layers": described}).encode()
    with replacing(path) as file:
        np.savez(file, nnfwd=np.frombuffer(text, dtype="u1"), **arrays)  # type: ignore[arg-type]


ABSENT = object()


def _put(value: Any, key: str, arrays: dict[str, np.ndarray], path: Path) -> Any:
    """A scalar for the description; an array goes into `arrays`, and leaves null there."""
    if value is None:
        return ABSENT
    if isinstance(value, float):
        return value
    if dtype_name(value.dtype) == "bfloat16":
        raise ModelFileError(f"{path}: .npz cannot hold bfloat16: write network.to(dtype='float32') first")
    array = to_numpy(value)
    arrays[key] = array
    return None


def read(path: Path, limits: Limits) -> Network:
    """Reads a network; `ModelFileError` for whatever is wrong with the file."""
    with open(path, "rb") as file:
        try:
            return _read(file, path, limits)
        except ModelFileError:
            raise
        except NnfwdError as error:
            raise ModelFileError(f"{path}: {error}") from error
        except _DAMAGED as error:
            raise ModelFileError(f"{path}: not a valid .npz file: {error}") from error


def _read(file: IO[bytes], path: Path, limits: Limits) -> Network:
    size = file.seek(0, io.SEEK_END)
    if size > limits.file:
        raise ModelFileError(f"{path}: {size} bytes are more than {limits.file}: raise limits.file if you trust it")
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            names = [info.filename for info in archive.infolist()]
            twice = next(name for name in names if names.count(name) > 1 or f"{name}.npy" in names)
            raise ModelFileError(f"{path}: two members of one name, {twice}")
        if len(members) > limits.tensors:
            raise ModelFileError(f"{path}: {len(members)} members are more than {limits.tensors}")
        if "nnfwd" not in members:
            raise ModelFileError(
                f"{path}: no member 'nnfwd' that describes the layers, only {', '.join(list(members)[:5])}: "
                "load the arrays with numpy.load and write nnfwd.Network.from_arrays(weights, biases, activations)"
            )
        if members["nnfwd"].file_size > limits.metadata:
            raise ModelFileError(f"{path}: metadata of {members['nnfwd'].file_size} bytes")
        description = json.loads(bytes(_member(archive, members.pop("nnfwd"), path, limits)))
        return _network(
            description, lambda key: _member(archive, members.pop(key), path, limits), members, path, limits
        )


def _network(description: Any, fetch: Any, members: dict[str, Any], path: Path, limits: Limits) -> Network:
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ModelFileError(f"{path}: written in another format than {_FORMAT}: update nnfwd")
    described = description["layers"]
    if not isinstance(described, list) or not 0 < len(described) <= limits.layers:
        raise ModelFileError(f"{path}: it must describe 1 to {limits.layers} layers")
    layers: list[Layer] = []
    for i, entry in enumerate(described):
        if not isinstance(entry, dict) or not isinstance(entry.get("activation"), dict):
            raise ModelFileError(f"{path}: layer {i}: it must have a type and an activation")
        kind = entry.pop("type", None)
        if kind not in _TYPES:
            raise ModelFileError(f"{path}: layer {i}: unknown type {kind!r}: there are {', '.join(_TYPES)}")
        settings = entry.pop("activation")
        name = settings.pop("name")
        if not isinstance(name, str):
            raise ModelFileError(f"{path}: layer {i}: the activation's name is {name!r}")
        function = activations.named(name)(
            **{k: _value(v, f"layers.{i}.activation.{k}", fetch) for k, v in settings.items()}
        )
        if kind == "scale" and function.name != "identity":
            raise ModelFileError(f"{path}: layer {i}: a scale has no activation {name}: give it a layer of its own")
        unknown = entry.keys() - set(_TYPES[kind].fields)
        if unknown:
            raise ModelFileError(f"{path}: layer {i}: unknown field {min(unknown)}")
        values = {k: _value(v, f"layers.{i}.{k}", fetch) for k, v in entry.items()}
        layers.append(_TYPES[kind](**values, **({"activation": function} if kind != "scale" else {})))
    if members:
        raise ModelFileError(f"{path}: {', '.join(sorted(members)[:5])} belong to no layer")
    return Network(layers)


def _value(value: Any, key: str, fetch: Any) -> Any:
    if value is None:
        return fetch(key)
    if type(value) not in (int, float):
        raise ValueError(f"{key} is {value!r}")
    return float(value)


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, limits: Limits) -> np.ndarray:
    """One array: its header is checked against the limits and the member's size before anything is allocated."""
    if info.file_size > limits.expansion * max(info.compress_size, 1) or info.file_size > limits.tensor + 2**16:
        raise ModelFileError(
            f"{path}: {info.filename} expands to {info.file_size} bytes: raise limits.expansion if you trust it"
        )
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ModelFileError(f"{path}: {info.filename} is compressed in a way that NumPy never writes")
    try:
        return _array(archive, info, path, limits)
    except _DAMAGED as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path}: {info.filename} is damaged: {error}") from error


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, limits: Limits) -> np.ndarray:
    text = info.filename == "nnfwd.npy"
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        (length,) = struct.unpack("<H", stream.read(2)) if version == (1, 0) else struct.unpack("<I", stream.read(4))
        if length > 2**14:
            raise ModelFileError(f"{path}: {info.filename} has a header of {length} bytes")
        header = ast.literal_eval(stream.read(length).decode("latin1"))
        shape, dtype = header["shape"], header["descr"]
        if not isinstance(dtype, str) or np.dtype(dtype) not in _DTYPES or (np.dtype(dtype) == "u1") != text:
            raise ModelFileError(f"{path}: {info.filename} is {dtype}: it must be float16, float32 or float64")
        if not all(type(n) is int and 0 <= n <= limits.dimension for n in shape) or len(shape) > 3:
            raise ModelFileError(f"{path}: {info.filename} has shape {shape}")
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > limits.tensor or stream.tell() + size != info.file_size:
            raise ModelFileError(f"{path}: {info.filename} of shape {shape} does not fill {info.file_size} bytes")
        data = stream.read(size)
        if len(data) != size or stream.read(1):
            raise ModelFileError(f"{path}: {info.filename} ends early")
    order = "F" if header["fortran_order"] else "C"
    return np.frombuffer(data, dtype=dtype).reshape(shape, order=order)  # type: ignore[call-overload]
