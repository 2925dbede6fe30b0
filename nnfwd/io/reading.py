"""What every reader does in the same way: open once, check against limits, refuse what is damaged with one error.

A reader takes an open file and `Given`. It parses the metadata into a plan (`Tensor`: shapes and dtypes, nothing read
yet), checks the plan, and only then allocates. It raises `ModelFileError` without the file's name: `opened` adds it.
"""

import collections
import contextlib
import json
import math
import os
import re
import reprlib
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from nnfwd.errors import ModelFileError, NnfwdError


@dataclass(frozen=True)
class Limits:
    """What a model file may ask for; beyond it, `ModelFileError` before anything is allocated. Sizes in bytes."""

    file: int = 16 * 2**30
    metadata: int = 16 * 2**20
    """Of JSON and the like, which takes up to fifteen times its size in memory."""
    depth: int = 32
    """How deep JSON, groups and other nested things may be."""
    tensors: int = 4096
    layers: int = 1024
    dimension: int = 2**24
    tensor: int = 8 * 2**30
    expansion: int = 20
    """How many times larger than the file its uncompressed contents may be (16 MiB are always allowed)."""


@dataclass(frozen=True)
class Given:
    """What the caller of `load` says besides the path."""

    limits: Limits
    activations: Any = None
    prefix: str | Sequence[str] | None = None
    epsilon: float | None = None
    weights: Path | None = None

    def refuse(self, *names: str) -> None:
        """Raises `ModelFileError` where one of these was given: the file itself says it."""
        for name in names:
            if getattr(self, name) is not None:
                raise ModelFileError(f"the file itself states its {name}: leave {name}= out")


@dataclass(frozen=True)
class Tensor:
    """An array of a file, before it is read."""

    shape: tuple[int, ...]
    dtype: str
    """The name of its dtype: float16, bfloat16, float32, float64, int64, ..."""
    read: Callable[[], np.ndarray]
    """Its values; bfloat16 as float32, which NumPy has."""

    def weights(self, name: str, /) -> np.ndarray:
        """Its values, or `ModelFileError` where they are no floating-point numbers."""
        if self.dtype not in FLOATS:
            raise ModelFileError(f"{name} is {self.dtype}: it must be {', '.join(FLOATS[:-1])} or {FLOATS[-1]}")
        return self.read()


FLOATS = ("float16", "bfloat16", "float32", "float64")

# What struct, zipfile, json, ast and a protobuf parser raise on damaged bytes.
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, LookupError, TypeError),
    *(AttributeError, RuntimeError, ArithmeticError, SyntaxError, MemoryError),
)


@contextlib.contextmanager
def opened(path: Path, limits: Limits) -> Iterator[IO[bytes]]:
    """A regular file within the limit, open for reading; what goes wrong inside becomes a `ModelFileError` naming it.

    Raises:
        ModelFileError: for whatever a reader finds wrong.
        FileNotFoundError, PermissionError, IsADirectoryError: as `open`.
    """
    # A pipe would wait for ever without O_NONBLOCK.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise ModelFileError(f"{path}: not a regular file")
        if state.st_size > limits.file:
            raise ModelFileError(
                f"{path}: {state.st_size} bytes are more than {limits.file}: raise limits.file if you trust it"
            )
        if not state.st_size:
            raise ModelFileError(f"{path}: the file is empty")
        with _named(path):
            yield file


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except NnfwdError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except _DAMAGED as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):  # of a second file
            raise
        reason = "not enough memory" if isinstance(error, MemoryError) else f"{error}" or type(error).__name__
        raise ModelFileError(f"{path}: not a valid {path.suffix} file: {reason}") from error


def file_size(file: IO[bytes], /) -> int:
    """The size of an open file, which is left at its start."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def read_exactly(file: IO[bytes], size: int, what: str) -> bytes:
    """So many bytes, or `ModelFileError`. `size` must have been checked before: it is allocated."""
    data = file.read(size)
    if len(data) != size:
        raise ModelFileError(f"the file ends inside {what}")
    return data


def check_tensor(name: str, shape: Sequence[Any], dtype: str, limits: Limits) -> int:
    """The size in bytes of an array as it is claimed, or `ModelFileError` where it is beyond the limits."""
    if not all(type(n) is int and 0 <= n <= limits.dimension for n in shape) or len(shape) > 8:
        raise ModelFileError(f"{name} has shape {_short(shape)}, beyond the limits")
    size = math.prod(shape) * itemsize(dtype)
    if size > limits.tensor:
        raise ModelFileError(f"{name} {tuple(shape)} has {size} bytes: raise limits.tensor if you trust it")
    return size


def itemsize(dtype: str, /) -> int:
    """Bytes of one element of a dtype, by its name."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def array(data: bytes, dtype: str, shape: Sequence[int], *, order: str = "<") -> np.ndarray:
    """An array of raw bytes, little-endian by default; bfloat16 becomes float32, exactly."""
    if dtype == "bfloat16":
        wide = np.frombuffer(data, dtype=f"{order}u2").astype("u4") << np.uint32(16)
        return wide.view("f4").reshape(shape)
    return np.frombuffer(data, dtype=np.dtype(f"{order}{np.dtype(dtype).str[1:]}")).reshape(shape)


def parse_json(data: bytes, limits: Limits) -> Any:
    """The contents of a JSON document; one too large, too deep or with a key twice in an object is refused."""
    if len(data) > limits.metadata:
        raise ModelFileError(f"{len(data)} bytes of JSON are more than limits.metadata, {limits.metadata}")
    text = str(data, "utf-8")
    depth = count = 0
    # Possessive, and the closing quote optional: a string without an end is passed over once.
    for bracket in re.finditer(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', text, re.DOTALL):
        step = {"[": 1, "{": 1, "]": -1, "}": -1}.get(bracket[0], 0)
        depth += step
        count += step > 0
        if not 0 <= depth <= limits.depth:
            raise ModelFileError(f"JSON nested deeper than {limits.depth}")
        if count > _CONTAINERS:  # an empty one takes thirty times its two bytes in memory
            raise ModelFileError(f"more than {_CONTAINERS} objects and lists of JSON")
    return json.loads(text, object_pairs_hook=_unique)


_CONTAINERS = 2**18


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ModelFileError(f"the key {_short(twice)} stands twice in one object")
    return found


def _short(value: object) -> str:
    text = reprlib.repr(value)  # the whole of nested, shared things may be endless
    return text if len(text) <= 80 else f"{text[:77]}..."


class Archive:
    """The members of a zip file, checked before any is read. Nothing is ever extracted to a path."""

    def __init__(self, file: IO[bytes], limits: Limits) -> None:
        size = file_size(file)
        bounded = _Bounded(file, 2**20 + 1024 * limits.tensors)
        self._zip = zipfile.ZipFile(bounded)
        bounded.limit = size  # the directory is read
        infos = self._zip.infolist()
        self.limits = limits
        self.members = {info.filename: info for info in infos}
        """Each member's zip header, by its name."""
        if len(infos) > limits.tensors:
            raise ModelFileError(f"{len(infos)} members are more than {limits.tensors}: raise limits.tensors")
        if len(self.members) != len(infos):
            names = [info.filename for info in infos]
            raise ModelFileError(f"two members of one name, {next(n for n in names if names.count(n) > 1)}")
        for info in infos:
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                raise ModelFileError(f"the member {info.filename} is encrypted or compressed in an unknown way")
        if sum(info.compress_size for info in infos) > size:
            raise ModelFileError("members overlap")
        total = sum(info.file_size for info in infos)
        if total > max(limits.expansion * size, 2**24):
            raise ModelFileError(f"it expands from {size} to {total} bytes: raise limits.expansion if you trust it")

    def read(self, name: str, *, metadata: bool = False) -> bytes:
        """A member's bytes, whole, its checksum compared; `metadata` within that limit."""
        info = self.find(name)
        limit = self.limits.metadata if metadata else self.limits.tensor
        if info.file_size > limit:
            raise ModelFileError(f"{name} has {info.file_size} bytes, more than {limit}")
        with self._zip.open(info) as stream:
            data = read_exactly(stream, info.file_size, name)
            if stream.read(1):
                raise ModelFileError(f"{name} is longer than it says")
        return data

    def open(self, name: str) -> IO[bytes]:
        """A member as a stream."""
        return self._zip.open(self.find(name))

    def find(self, name: str) -> zipfile.ZipInfo:
        """A member's zip header, or `ModelFileError`."""
        if name not in self.members:
            raise ModelFileError(f"no member {name} in the archive")
        return self.members[name]


class _Bounded:
    """A file of which no more than `limit` bytes are read at once."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file = file
        self.limit = limit

    def read(self, size: int = -1, /) -> bytes:
        if size > self.limit:
            raise ModelFileError(f"a directory of {size} bytes is more than {self.limit}: raise limits.tensors")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def npy(open_stream: Callable[[], AbstractContextManager[IO[bytes]]], size: int, name: str, limits: Limits) -> Tensor:
    """The plan of an array in NumPy's `.npy` format: `size` bytes of a stream, of which only the header is read now."""
    try:
        with open_stream() as stream:
            shape, dtype, order, start = npy_header(stream, name)
        kind = np.dtype(dtype)
    except _DAMAGED as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{name} is damaged: {error}") from error
    if kind.kind not in "fiub" or kind.itemsize > 8:
        raise ModelFileError(f"{name} is {dtype}: it must be float16, float32 or float64")
    count = check_tensor(name, shape, kind.name, limits)
    if start + count != size:
        raise ModelFileError(f"{name} of shape {shape} and dtype {kind.name} does not fill its {size} bytes")

    def read() -> np.ndarray:
        with open_stream() as stream:
            read_exactly(stream, start, name)
            data = read_exactly(stream, count, name)
            if stream.read(1):
                raise ModelFileError(f"{name} is longer than it says")
        return np.frombuffer(data, dtype=kind).reshape(shape, order=order)  # type: ignore[call-overload]

    return Tensor(shape, kind.name, read)


def npy_header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], str, str, int]:
    """Shape, dtype, order and where the data starts; https://numpy.org/neps/nep-0001-npy-format.html"""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ModelFileError(f"{name} is of an unknown version of .npy")
    width = 2 if version == (1, 0) else 4
    length = int.from_bytes(read_exactly(stream, width, name), "little")
    if length > 2**14:
        raise ModelFileError(f"{name} has a header of {length} bytes")
    text = read_exactly(stream, length, name).decode("latin1").strip()
    # A dictionary in Python's spelling, its keys in any order; read as text, so that nothing is ever evaluated.
    pairs = re.findall(r"'(descr|fortran_order|shape)': *('[^']*'|\[.*\]|True|False|\([-\d, ]*\))", text)
    header = dict(pairs)
    if len(pairs) != 3 or len(header) != 3 or not re.fullmatch(r"\{.*\}", text):
        raise ModelFileError(f"{name} has a damaged header")
    dtype, order, shape = header["descr"][1:-1], header["fortran_order"], header["shape"]
    if not re.fullmatch(r"[<>|=][fiubU]\d{1,8}", dtype):
        raise ModelFileError(f"{name} has dtype {dtype:.40}: it must be float16, float32 or float64")
    if order not in ("True", "False") or not re.fullmatch(r"\((-?\d{1,19}(, ?-?\d{1,19})*,?)?\)", shape):
        raise ModelFileError(f"{name} has a damaged header, or a shape that is none: {shape:.40}")
    sizes = tuple(int(n) for n in re.findall(r"-?\d+", shape))
    return sizes, dtype, "F" if order == "True" else "C", 8 + width + length
