"""Where rows come from: `.npy`, `.npz`, `.csv`, `.zarr`, a folder of `.npy` files, or an array.

A source is read by ranges of rows, so memory does not grow with it. `.npy` is read, not mapped: pages of a mapped file
count as memory of the process, and one that shrinks while it is mapped ends the process.
"""

import bisect
import hashlib
import itertools
import math
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from nnfwd import backend
from nnfwd.errors import ArrayError, BackendError, DataFileError, NnfwdError
from nnfwd.io.reading import npy_header

READ = (".npy", ".npz", ".csv", ".zarr")


class InputFileError(DataFileError):
    """A source that holds no numbers where it should, or that changes while it is read."""


class Source(ABC):
    """Rows of numbers, of which ranges are read, by one thread at a time; where it `travels`, by several.

    After `fold` it has leading axes and a width: x `(..., width)` whose rows are counted along all leading axes.
    """

    name: str
    """What a message calls it."""
    shape: tuple[int, ...]
    dtype: np.dtype
    states_dtype = True
    """Whether its dtype says something; text is read as float64."""
    travels = False
    """Whether another process that sees the same files can read it."""
    path: Path | None = None
    """Of a file or folder; None where it is an array."""
    lead: tuple[int, ...]
    width: int
    fingerprint = "an array"
    """Changes when its files do. See `stat`."""
    _identity = ""

    def fold(self, axes: int) -> None:
        """Takes the last so many axes as the features of one row."""
        cut = len(self.shape) - axes
        self.lead, self.width = self.shape[:cut], math.prod(self.shape[cut:])

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    @property
    def parts(self) -> list[tuple[str, int]] | None:
        """Of a folder, its files and the lengths of their first axes."""
        return None

    @abstractmethod
    def read(self, start: int, stop: int, /) -> np.ndarray:
        """Rows `(stop - start, width)`. Raises `DataFileError` where they are not there, or are no numbers."""

    def read_into(self, start: int, stop: int, block: np.ndarray, /) -> None:
        """Reads rows into an array of them, of whatever dtype. Raises as `read`."""
        block[...] = self.read(start, stop)

    @property
    def is_known(self) -> bool:
        """Whether one can tell if it has changed: an array has no time of change."""
        return self.path is not None

    def stat(self) -> None:
        """Remembers what its files are. To be called before anything is read of them."""
        self.fingerprint, self._identity = self._stated()

    def is_at_rest(self) -> bool:
        """Whether its files are what they were, as far as sizes and times of change can tell."""
        try:
            return not self.is_known or self._stated()[1] == self._identity
        except FileNotFoundError:
            return False

    def _stated(self) -> tuple[str, str]:
        """Sizes and times of its files as one number, which a copy of them shares; and another that it does not."""
        shared, own = hashlib.sha256(), hashlib.sha256()
        for path in self._every():
            found = path.stat()
            facts = f"{path.name} {found.st_size} {found.st_mtime_ns}\n"
            shared.update(facts.encode())
            own.update(f"{found.st_dev} {found.st_ino} {facts}".encode())
        return f"files {shared.hexdigest()[:16]}", own.hexdigest()

    def _every(self) -> Iterable[Path]:
        """Its files, in an order of their own."""
        return () if self.path is None else (self.path,)

    @property
    def files(self) -> tuple[Path, ...]:
        """What must not be written over."""
        return () if self.path is None else (self.path,)


def opened(source: Any, /) -> Source:
    """The source of a path, or of an array that is read by slices of its first axis (NumPy's, Zarr's, HDF5's).

    Raises:
        DataFileError: for an unknown format or a damaged file.
        ArrayError: for what is neither a path nor an array.
        FileNotFoundError, PermissionError: as `open`.
    """
    if not isinstance(source, str | os.PathLike):
        return _Array(source)
    path = Path(source)
    if path.is_dir() and any(part.suffix.lower() == ".zarr" for part in (path, *path.parents)):
        return _Zarr(path)
    if path.is_dir():
        return _Folder(path)
    if path.suffix.lower() not in _OPENED:
        given = path.suffix or "without an extension"
        raise DataFileError(f"{path}: no format {given} here: use {', '.join(READ)} or a folder of .npy files")
    try:
        return _OPENED[path.suffix.lower()](path)
    except (OSError, DataFileError, BackendError):
        raise
    except Exception as error:  # whatever a reader meets in a damaged file
        raise DataFileError(f"{path}: not a valid {path.suffix} file of numbers: {error}") from error


def read_whole(path: Path, /) -> np.ndarray:
    """The array of a file. Raises as `opened`."""
    source = opened(path)
    source.fold(1 if source.shape else 0)
    return source.read(0, source.rows).reshape(source.shape)


def changed(name: str, /) -> InputFileError:
    """The error of a source that is not what it was when it was opened."""
    return InputFileError(f"{name} changed while it was read: nothing was written, run it again when it is at rest")


class _Array(Source):
    """An array that lives elsewhere, read by slices of its first axis."""

    def __init__(self, array: Any, name: str = "the source") -> None:
        self.name = name
        if not all(hasattr(array, part) for part in ("shape", "dtype", "__getitem__")):
            raise ArrayError(f"a source is a path or an array that can be sliced, not a {type(array).__name__}")
        if isinstance(array, np.ndarray):
            backend.of(array, name)  # which refuses a masked one
        try:
            self.dtype = np.dtype(array.dtype)
        except TypeError:
            raise ArrayError(f"{name} has dtype {array.dtype}, which NumPy has not: convert it") from None
        self._array = array
        self.shape = tuple(array.shape)
        chunks = getattr(array, "chunks", None)
        # Rows of a chunk are decoded together: one slab of chunks along the first axis is kept.
        self._step = chunks[0] if isinstance(chunks, tuple) and chunks and isinstance(chunks[0], int) else None
        self._kept = threading.local()  # a slab for each thread

    def read(self, start: int, stop: int, /) -> np.ndarray:
        try:
            return self._sliced(start, stop)
        except OSError:
            raise
        except Exception as error:  # whatever a library meets in a damaged store
            raise OSError(f"rows {start + 1:,} to {stop:,} cannot be read: {error}") from error

    def _sliced(self, start: int, stop: int) -> np.ndarray:
        if not self.lead:
            return np.asarray(self._array[...]).reshape(1, -1)
        inner = math.prod(self.lead[1:])
        if self._step is None:
            first, last = start // max(inner, 1), -(-stop // max(inner, 1))
            slab = np.asarray(self._array[first:last]).reshape(-1, self.width)
            return slab[start - first * inner : stop - first * inner]
        height, pieces = self._step * inner, []
        for i in range(start // height, -(-stop // height)) if height else ():
            if getattr(self._kept, "index", None) != i:
                self._kept.index = self._kept.slab = None  # it is let go of before the next one is there
                slab = self._array[i * self._step : (i + 1) * self._step]
                self._kept.slab, self._kept.index = np.asarray(slab).reshape(-1, self.width), i
            pieces.append(self._kept.slab[max(start - i * height, 0) : stop - i * height])
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty((0, self.width), self.dtype)


class _Npy(Source):
    travels = True

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path.absolute()
        self.stat()
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                shape, dtype, order, self._start = npy_header(file, "the array")
                self.dtype = np.dtype(dtype)
            except (NnfwdError, ValueError, EOFError, TypeError) as error:
                raise DataFileError(f"{path}: not a valid .npy file of numbers: {error}") from error
        self.shape = shape
        needed = self._start + math.prod(shape) * self.dtype.itemsize
        if size < needed:
            raise DataFileError(f"{path} holds {size:,} bytes of {needed:,}: it was cut off, write or copy it again")
        self._by_columns = order == "F" and len(shape) > 1
        if self._by_columns and len(shape) > 2:
            raise DataFileError(
                f"{path} has {len(shape)} dimensions in Fortran order: save numpy.ascontiguousarray(x) instead"
            )

    def read(self, start: int, stop: int, /) -> np.ndarray:
        size = self.dtype.itemsize
        if not self._by_columns:
            block = np.empty((stop - start, self.width), self.dtype)
            self._into(block, start * self.width * size)
            return block
        columns = np.empty((self.width, stop - start), self.dtype)
        for j, column in enumerate(columns):
            self._into(column, (j * self.rows + start) * size)
        return columns.T

    def read_into(self, start: int, stop: int, block: np.ndarray, /) -> None:
        if self._by_columns or block.dtype != self.dtype:
            super().read_into(start, stop, block)
        else:
            self._into(block, start * self.width * self.dtype.itemsize)

    def _into(self, block: np.ndarray, offset: int) -> None:
        """Fills an array with bytes of the file. Raises where there are not as many any more."""
        left = memoryview(block.reshape(-1).view("uint8"))  # type: ignore[arg-type]
        with open(self.path, "rb", buffering=0) as file:  # type: ignore[arg-type]
            file.seek(self._start + offset)
            while len(left):
                count = file.readinto(left)  # type: ignore[attr-defined]
                if not count:
                    raise changed(self.name)
                left = left[count:]

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopened, (self.path, len(self.shape) - len(self.lead)))


def _reopened(path: Path, axes: int) -> Source:
    """A source in another process."""
    source = opened(path)
    source.fold(axes)
    return source


class _Folder(Source):
    """The `.npy` files of a folder one after another, by the numbers in their names: 2.npy before 10.npy."""

    travels = True

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path.absolute()
        self.stat()
        self._paths = self._every()
        if not self._paths:
            raise DataFileError(f"{path} is a folder without .npy files: name a file, or a folder that has some")
        self._files = [_Npy(file) for file in self._paths]
        first = self._files[0]
        for file in self._files:
            if file.shape[1:] != first.shape[1:] or file.dtype != first.dtype or not file.shape:
                raise DataFileError(
                    f"{file.name} holds {file.shape} {file.dtype} and {first.name} {first.shape} {first.dtype}: "
                    "the files of a folder may differ in the length of their first axis alone"
                )
        self.dtype = first.dtype
        self.shape = (sum(file.shape[0] for file in self._files), *first.shape[1:])

    def fold(self, axes: int) -> None:
        if len(self.shape) == axes:
            raise DataFileError(f"{self.name}: its files hold one row each, {self.shape[-1:]}: save them as (1, ...)")
        super().fold(axes)
        for file in self._files:
            file.fold(axes)
        self._ends = list(itertools.accumulate(file.rows for file in self._files))

    @property
    def parts(self) -> list[tuple[str, int]]:
        return [(path.name, file.shape[0]) for path, file in zip(self._paths, self._files, strict=True)]

    def read(self, start: int, stop: int, /) -> np.ndarray:
        block = np.empty((stop - start, self.width), self.dtype)
        self.read_into(start, stop, block)
        return block

    def read_into(self, start: int, stop: int, block: np.ndarray, /) -> None:
        for i in range(bisect.bisect_right(self._ends, start), len(self._files)):
            before = self._ends[i] - self._files[i].rows
            if before >= stop:
                break
            first, last = max(start, before), min(stop, self._ends[i])
            self._files[i].read_into(first - before, last - before, block[first - start : last - start])

    def _every(self) -> list[Path]:
        found = (file for file in self.path.iterdir() if file.suffix.lower() == ".npy")  # type: ignore[union-attr]
        return sorted((file for file in found if file.is_file() and not file.name.startswith(".")), key=_natural)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path, *self._paths)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopened, (self.path, len(self.shape) - len(self.lead)))


def _natural(path: Path) -> list[Any]:
    parts = re.split(r"(\d+)", path.name)
    return [*(int(part) if i % 2 else part for i, part in enumerate(parts)), path.name]


class _Csv(Source):
    """Lines of numbers, `(rows, columns)`. A first line of names is skipped, blank ones and comments (#) are too."""

    states_dtype = False

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path.absolute()
        self.stat()
        self.dtype = np.dtype("float64")
        with self._open() as file:
            first = next(_lines(file), "")
            cells = [cell.strip() for cell in first.split(",")]
            self._named = bool(first) and not any(map(_is_value, cells))
            line = next(_lines(file), "") if self._named else first
            if not line:
                raise DataFileError(f"{path} holds no numbers")
            columns = _parsed([line], self.name).shape[1]
            if self._named and len(cells) != columns:
                raise DataFileError(
                    f"{path} has {len(cells)} names in its first line and {columns} numbers in its second"
                )
            if columns > 2 and cells == list(map(str, range(columns))):
                raise DataFileError(
                    f"{path} begins with 0,1,...,{columns - 1}, which may be names or a row: write names, or 0.0,1.0"
                )
            self.shape = (1 + sum(1 for _ in _lines(file)), columns)
        self._at = 0
        self._left: Iterator[str] = iter(())
        self._file: IO[str] | None = None

    def _open(self) -> IO[str]:
        return open(self.path, encoding="utf-8-sig")  # type: ignore[arg-type]

    def read(self, start: int, stop: int, /) -> np.ndarray:
        if self._file is None or start < self._at:
            if self._file is not None:
                self._file.close()
            self._file = self._open()
            self._left = itertools.islice(_lines(self._file), int(self._named), None)
            self._at = 0
        lines = list(itertools.islice(self._left, start - self._at, stop - self._at))
        self._at = stop
        if len(lines) != stop - start:
            raise changed(self.name)
        if not lines:
            return np.empty((0, self.width))
        block = _parsed(lines, f"{self.name}, rows {start + 1:,} to {stop:,}")
        if block.shape != (len(lines), self.width):
            raise InputFileError(
                f"{self.name}: rows {start + 1:,} to {stop:,} have {block.shape[1]} columns, {self.width} in the first"
            )
        return block

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self._file.close()  # type: ignore[union-attr]


def _lines(file: IO[str]) -> Iterator[str]:
    """The lines that hold something."""
    return (line for line in file if line.partition("#")[0].strip())


def _parsed(lines: list[str], where: str) -> np.ndarray:
    try:
        return np.loadtxt(lines, delimiter=",", ndmin=2)
    except ValueError as error:
        raise InputFileError(
            f"{where}: not a valid .csv file of numbers, with commas between: {_said(error)}"
        ) from error


def _said(error: Exception) -> str:
    """NumPy's message, without its advice, which names arguments of a function of its own."""
    return str(error).partition("; use `usecols`")[0][:200]


def _is_value(text: str) -> bool:
    """Whether a cell of the first line is a value and no name: a number, or one that is missing."""
    text = text.strip().strip('"')
    if not any(map(str.isalpha, text)) or text.lower() in ("na", "n/a", "nan", "null", "none"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


class _Npz(_Array):
    """One array of an archive, held in memory whole."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.stat()
        with np.load(path, allow_pickle=False) as archive:
            name = "x" if "x" in archive.files else archive.files[0]
            if name != "x" and len(archive.files) != 1:
                raise DataFileError(f"{path} holds {', '.join(archive.files)}: call the input x")
            super().__init__(archive[name], str(path))


class _Zarr(_Array):
    """A Zarr array in a folder, or the only one (or the one called x) of a group."""

    travels = True

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise FileNotFoundError(2, "No such file or directory", str(path))
        self.path = path.absolute()
        self.stat()
        zarr = imported_zarr()
        found = zarr.open(path, mode="r")
        if not hasattr(found, "shape"):
            names = sorted(found.array_keys())
            if not names or ("x" not in names and len(names) != 1):
                named = f": name one, {path}/{names[0]}" if names else ""
                raise DataFileError(f"{path} is a group of {', '.join(names) or 'no arrays'}{named}")
            found = found["x" if "x" in names else names[0]]
        super().__init__(found, str(path))

    def _every(self) -> Iterator[Path]:
        for folder, folders, names in os.walk(str(self.path)):
            folders.sort()
            yield from (Path(folder, name) for name in sorted(names))

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopened, (self.path, len(self.shape) - len(self.lead)))


def imported_zarr() -> Any:
    """The module zarr. Raises `BackendError` with what to install."""
    try:
        import zarr
    except ImportError:
        raise BackendError("a .zarr store needs zarr, which is not installed: pip install 'nnfwd[zarr]'") from None
    return zarr


_OPENED: dict[str, Callable[[Path], Source]] = {".npy": _Npy, ".npz": _Npz, ".csv": _Csv, ".zarr": _Zarr}
