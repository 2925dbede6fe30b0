"""The safetensors format: a header of JSON, then raw bytes. https://huggingface.co/docs/safetensors

    u64, little-endian: the length of the header
    {"__metadata__": {"nnfwd": "..."},
     "layers.0.weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}, ...}
    the arrays, little-endian, C order; the offsets count from here

Files of ours have the layers described under `nnfwd` in the metadata (see `description`). Others are state dicts.
Weights that are tied, `safetensors.torch.save_model` writes once; the metadata have the other names, each with the name
of the one that was written: https://github.com/huggingface/safetensors/blob/main/bindings/python/py_src/safetensors/torch.py
"""

import json
import math
from pathlib import Path
from typing import IO, Any

import numpy as np

from nnfwd.errors import ModelFileError
from nnfwd.io import description, state_dict
from nnfwd.io.files import replacing
from nnfwd.io.reading import Given, Limits, Tensor, array, check_tensor, file_size, itemsize, parse_json, read_exactly
from nnfwd.network import Network

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
_DTYPES |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
_DTYPES |= {f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)}


def write(network: Network, path: Path) -> None:
    """Writes a network, as a whole or not at all: byte for byte what the safetensors library makes of these arrays."""
    text, arrays = description.describe(network)
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"nnfwd": text}}
    end = 0
    for name in names:
        begin, end = end, end + arrays[name].nbytes
        dtype = f"F{8 * arrays[name].itemsize}"
        header[name] = {"dtype": dtype, "shape": list(arrays[name].shape), "data_offsets": [begin, end]}
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)  # the arrays start at a multiple of 8
    with replacing(path) as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for name in names:
            file.write(np.ascontiguousarray(arrays[name], dtype=arrays[name].dtype.newbyteorder("<")).data)


def read(file: IO[bytes], given: Given) -> Network:
    """The network of an open file; `ModelFileError` for whatever is wrong with it."""
    size = file_size(file)
    length = int.from_bytes(read_exactly(file, 8, "the length of its header"), "little")
    if length > min(size - 8, given.limits.metadata):
        raise ModelFileError(
            f"it claims a header of {length} bytes: the file has {size}, and limits.metadata is {given.limits.metadata}"
        )
    data = read_exactly(file, length, "its header")
    if not data.startswith(b"{"):
        raise ModelFileError("not a safetensors file: its header must start with {")
    header = parse_json(data, given.limits)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelFileError("__metadata__ must be an object of strings")
    tensors = _plan(file, header, 8 + length, size, given.limits)
    if "nnfwd" not in metadata:
        return state_dict.network(tensors | _tied(metadata, tensors, size, given.limits), given)
    given.refuse("activations", "prefix", "epsilon")
    return description.network(metadata["nnfwd"].encode(), tensors, given.limits)


def _plan(file: IO[bytes], header: dict[str, Any], start: int, size: int, limits: Limits) -> dict[str, Tensor]:
    """The arrays a header describes; in the order of their offsets they fill the bytes from `start` to `size`."""
    if len(header) > limits.tensors:
        raise ModelFileError(f"{len(header)} tensors are more than limits.tensors, {limits.tensors}")
    tensors = {}
    spans = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ModelFileError(f"{name!r:.80} must have a dtype, a shape, data_offsets and nothing else")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ModelFileError(f"{name!r:.80} is {dtype!r:.80}: weights are read from F16, BF16, F32 and F64")
        if not isinstance(shape, list) or not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
            raise ModelFileError(f"{name!r:.80}: shape and data_offsets must be lists of integers")
        count = check_tensor(name, shape, _DTYPES[dtype], limits)
        begin, end = offsets
        if end - begin != count:
            raise ModelFileError(f"{name!r:.80} {dtype} {shape} has {count} bytes, not those of {offsets!r:.80}")
        tensors[name] = _tensor(file, name, start + begin, count, tuple(shape), _DTYPES[dtype])
        spans.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            raise ModelFileError(f"{name!r:.80} starts at {begin}, where {expected} was due: no gap, no overlap")
        expected = end
    if start + expected != size:
        raise ModelFileError(f"the arrays end at byte {start + expected}, the file at {size}")
    return tensors


def _tied(metadata: dict[str, str], tensors: dict[str, Tensor], size: int, limits: Limits) -> dict[str, Tensor]:
    """The tensors that go by a second name; a few bytes can claim many copies of a large one."""
    found = {alias: tensors[name] for alias, name in metadata.items() if alias not in tensors and name in tensors}
    total = sum(math.prod(tensor.shape) * itemsize(tensor.dtype) for tensor in found.values())
    if total > max(limits.expansion * size, 2**24):
        raise ModelFileError(
            f"tied weights expand it from {size} bytes by {total}: raise limits.expansion if you trust it"
        )
    return found


def _tensor(file: IO[bytes], name: str, start: int, count: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    def read() -> np.ndarray:
        file.seek(start)
        return array(read_exactly(file, count, name), dtype, shape)

    return Tensor(shape, dtype, read)
