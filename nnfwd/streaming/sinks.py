"""Where outputs go: `.npy`, `.npz`, `.csv`, `.zarr`, a folder of `.npy` files, or an array.

Files are written under another name, `OUTPUT.partial` in the same folder, and take their own when they are complete and
on the disk. Rows come in order. What `flush` has seen to the disk is what an interrupted run goes on from.
"""

import bisect
import csv
import io
import itertools
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from nnfwd.errors import ArrayError, DataFileError, ShapeError
from nnfwd.io.files import replacing, synced
from nnfwd.streaming.sources import imported_zarr

WRITTEN = (".npy", ".npz", ".csv", ".zarr")
_PART = 256 << 20  # bytes of a file, in a folder whose source has no files of its own


@dataclass(frozen=True)
class Layout:
    """The shape of an output: `(*members, *lead, *tail)`, whose rows are counted along `lead`."""

    members: tuple[int, ...]
    """`(members,)` of an ensemble, else `()`."""
    lead: tuple[int, ...]
    tail: tuple[int, ...]
    """`(out,)`, or `()` of labels."""
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.members, *self.lead, *self.tail)

    @property
    def rows(self) -> int:
        return math.prod(self.lead)

    @property
    def inner(self) -> int:
        """Rows of one index along the first leading axis."""
        return math.prod(self.lead[1:])

    @property
    def row_bytes(self) -> int:
        """Of one row of one member."""
        return math.prod(self.tail) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return math.prod(self.members) * self.rows * self.row_bytes

    def part(self, length: int) -> "Layout":
        """The same for so many indices along the first leading axis."""
        return Layout(self.members, (length, *self.lead[1:]), self.tail, self.dtype)


class Sink(ABC):
    """A place for rows of a layout, which come in order: y is `(*members, rows, *tail)`."""

    keeps = True
    """Whether what was flushed can be gone on from."""
    entries: frozenset[str] = frozenset()
    """Of a folder, the names of what it will hold."""

    @abstractmethod
    def begin(self) -> None:
        """Makes the file, or the folder."""

    @abstractmethod
    def write(self, start: int, y: np.ndarray, /) -> None:
        """Takes rows from `start` on. Raises OSError where they cannot be written."""

    @abstractmethod
    def flush(self) -> int:
        """Sees to it that the rows are on the disk; gives how many are, from the first on."""

    def state(self) -> dict[str, int]:
        """What `resume` needs besides the number of rows, after a flush."""
        return {}

    @abstractmethod
    def resume(self, rows: int, state: dict[str, int], /) -> None:
        """Opens what an interrupted run has left, to write from row `rows` on; drops what comes after it."""

    @abstractmethod
    def holds(self, start: int, y: np.ndarray, /) -> bool:
        """Whether rows from `start` on, the last that were flushed, are these, bit for bit."""

    @abstractmethod
    def finish(self) -> None:
        """Everything is written: makes it complete on the disk and closes it."""

    def close(self) -> None:  # noqa: B027
        """Lets go of files."""


def sink(partial: Path, name: Path, layout: Layout, parts: list[tuple[str, int]] | None, height: int) -> Sink:
    """The sink that writes `partial`, of the kind that the final name says; blocks are so many rows high.

    Raises:
        DataFileError: where this kind of file cannot hold such an output.
    """
    kind = name.suffix.lower()
    if kind == ".npy":
        return _Npy(partial, layout)
    if kind == ".npz":
        return _Npz(partial, layout)
    if kind == ".csv":
        return _Csv(partial, name, layout)
    if kind == ".zarr":
        return _Zarr(partial, layout, height)
    return _Folder(partial, name, layout, parts)


def written(file: IO[bytes], data: Any, /) -> None:
    """Writes bytes to an unbuffered file, all of them. Raises OSError where the disk takes no more."""
    left = memoryview(data).cast("B")
    while len(left):
        left = left[file.write(left) :]


class _File(Sink):
    """A sink that is one file."""

    _file: IO[bytes] | None = None  # while it is written; without a buffer, which would hold back what failed
    _rows = 0

    def __init__(self, path: Path, layout: Layout) -> None:
        self._path, self._layout = path, layout

    def begin(self) -> None:
        self._file = open(self._path, "x+b", buffering=0)  # noqa: SIM115

    @property
    def _opened(self) -> IO[bytes]:
        assert self._file is not None, "it is closed"
        return self._file

    def flush(self) -> int:
        synced(self._opened)
        return self._rows

    def resume(self, rows: int, _state: dict[str, int], /) -> None:
        self._file = open(self._path, "r+b", buffering=0)  # noqa: SIM115
        self._rows = rows

    def finish(self) -> None:
        synced(self._opened)
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Takes the file away, if it is there."""
        removed(self._path)


class _Npy(_File):
    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(path, layout)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": np.lib.format.dtype_to_descr(layout.dtype), "fortran_order": False, "shape": layout.shape}
        )
        self._header = header.getvalue()

    def begin(self) -> None:
        super().begin()
        written(self._opened, self._header)
        self._opened.truncate(len(self._header) + self._layout.nbytes)

    def _members(self, start: int, y: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Where in the file the rows of each member go, and they."""
        rows = y.shape[len(self._layout.members)]
        for m, part in enumerate(y.reshape(-1, rows, *self._layout.tail)):
            yield len(self._header) + (m * self._layout.rows + start) * self._layout.row_bytes, part

    def write(self, start: int, y: np.ndarray, /) -> None:
        for offset, part in self._members(start, y):
            self._opened.seek(offset)
            written(self._opened, np.ascontiguousarray(part).reshape(-1).view("uint8"))
        self._rows = start + y.shape[len(self._layout.members)]

    def holds(self, start: int, y: np.ndarray, /) -> bool:
        with open(self._path, "rb") as file:
            for offset, part in self._members(start, y):
                file.seek(offset)
                if file.read(part.nbytes) != part.tobytes():
                    return False
        return True


class _Csv(_File):
    """A line a row, with as many digits as it takes to read the same number back; labels one a line."""

    def __init__(self, path: Path, name: Path, layout: Layout) -> None:
        super().__init__(path, layout)
        self._bytes = 0  # of the rows that were written whole
        if len(layout.shape) > 1 + len(layout.tail):
            raise DataFileError(f"{name}: a .csv has a line a row, and the result is {layout.shape}: write .npy")

    def _text(self, y: np.ndarray) -> bytes:
        if self._layout.tail:
            digits = {"float16": 5, "float32": 9}.get(str(y.dtype), 17)
            file = io.BytesIO()
            np.savetxt(file, y, fmt=f"%.{digits}g", delimiter=",")
            return file.getvalue()
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(y.reshape(-1, 1).tolist())
        return text.getvalue().encode()

    def write(self, start: int, y: np.ndarray, /) -> None:
        text = self._text(y)
        self._opened.seek(self._bytes)
        written(self._opened, text)
        self._rows, self._bytes = start + len(y), self._bytes + len(text)

    def state(self) -> dict[str, int]:
        return {"bytes": self._bytes}

    def resume(self, rows: int, state: dict[str, int], /) -> None:
        super().resume(rows, state)
        self._bytes = state["bytes"]
        self._opened.truncate(self._bytes)

    def holds(self, _start: int, y: np.ndarray, /) -> bool:
        text = self._text(y)
        self._opened.seek(max(self._bytes - len(text), 0))
        return self._opened.read() == text


class _Folder(Sink):
    """`.npy` files: those of the source's folder by their names, or parts of some 256 MiB."""

    def __init__(self, path: Path, name: Path, layout: Layout, parts: list[tuple[str, int]] | None) -> None:
        if not layout.lead:
            raise DataFileError(f"{name} is a folder and the result is one row: write a file such as {name}.npy")
        self._path = path
        if parts is None:
            length = max(_PART // max(layout.part(1).nbytes, 1), 1)
            lengths = [min(length, layout.lead[0] - at) for at in range(0, layout.lead[0], length)] or [0]
            parts = [(f"part-{i:05}.npy", n) for i, n in enumerate(lengths)]
        layouts = [layout.part(length) for _, length in parts]
        self._axis = len(layout.members)
        self.entries = frozenset(file for file, _ in parts)
        self._files = [_Npy(path / file, part) for (file, _), part in zip(parts, layouts, strict=True)]
        self._edges = [0, *itertools.accumulate(part.rows for part in layouts)]
        self._open = 0  # the file that is being written
        self._rows = 0

    def begin(self) -> None:
        self._path.mkdir()
        self._files[0].begin()

    def _shares(self, start: int, y: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
        """Which rows go to which file: its index, where in it they start, and they."""
        rows, found = y.shape[self._axis], []
        for i in range(bisect.bisect_right(self._edges, start) - 1, len(self._files)):
            first, last = max(self._edges[i], start), min(self._edges[i + 1], start + rows)
            if self._edges[i] >= start + rows:
                break
            if first < last:
                chosen = (*(slice(None),) * self._axis, slice(first - start, last - start))
                found.append((i, first - self._edges[i], y[chosen]))
        return found

    def write(self, start: int, y: np.ndarray, /) -> None:
        for i, at, share in self._shares(start, y):
            self._finish_until(i)
            self._files[i].write(at, share)
        self._rows = start + y.shape[self._axis]

    def _finish_until(self, i: int) -> None:
        """Completes the files before file i, which is opened."""
        while self._open < i:
            self._files[self._open].finish()
            self._open += 1
            self._files[self._open].begin()

    def flush(self) -> int:
        self._files[self._open].flush()
        synced(self._path)
        return self._rows

    def state(self) -> dict[str, int]:
        return {"file": self._open}

    def resume(self, rows: int, state: dict[str, int], /) -> None:
        self._rows, self._open = rows, state["file"]
        self._files[self._open].resume(rows - self._edges[self._open], {})
        for file in self._files[self._open + 1 :]:
            file.remove()

    def holds(self, start: int, y: np.ndarray, /) -> bool:
        return all(self._files[i].holds(at, share) for i, at, share in self._shares(start, y))

    def finish(self) -> None:
        self._finish_until(len(self._files) - 1)
        self._files[-1].finish()
        synced(self._path)

    def close(self) -> None:
        for file in self._files:
            file.close()


class _Slabs(Sink):
    """An array that is written a slab along its first leading axis at a time: rows wait until one is complete."""

    _array: Any

    def __init__(self, layout: Layout, step: int) -> None:
        self._layout, self._axis = layout, len(layout.members)
        self._height = step * layout.inner  # rows of a slab
        self._waiting: list[np.ndarray] = []
        self._done = 0

    def write(self, start: int, y: np.ndarray, /) -> None:
        waiting = sum(part.shape[self._axis] for part in self._waiting)
        y = self._rows(y, self._done + waiting - start, None)  # a resumed run makes some again
        have = waiting + y.shape[self._axis]
        ready = have if self._done + have == self._layout.rows else have // max(self._height, 1) * self._height
        if ready:
            y = np.concatenate([*self._waiting, y], axis=self._axis) if self._waiting else y
            self._put(self._done, self._rows(y, 0, ready))
            self._waiting = []
            self._done += ready
        if have > ready:
            self._waiting.append(self._rows(y, ready, None).copy())  # y is good until the next block

    def _rows(self, y: np.ndarray, start: int, stop: int | None) -> np.ndarray:
        return y[(*(slice(None),) * self._axis, slice(start, stop))]

    def _put(self, start: int, y: np.ndarray) -> None:
        where, shape = self._where(start, start + y.shape[self._axis])
        self._array[where] = y.reshape(shape)

    def _where(self, start: int, stop: int) -> tuple[tuple[slice, ...], tuple[int, ...]]:
        """The slab that holds these rows, as an index and a shape."""
        layout = self._layout
        if not layout.lead:
            return (slice(None),) * len(layout.shape), layout.shape
        first, last = start // max(layout.inner, 1), -(-stop // max(layout.inner, 1))
        return (*(slice(None),) * self._axis, slice(first, last)), layout.part(last - first).shape

    def flush(self) -> int:
        return self._done

    def resume(self, rows: int, _state: dict[str, int], /) -> None:
        self._done = rows

    def holds(self, start: int, y: np.ndarray, /) -> bool:
        stop = start + y.shape[self._axis]
        where, _ = self._where(start, stop)
        slab = np.asarray(self._array[where]).reshape(*self._layout.members, -1, *self._layout.tail)
        skipped = start % max(self._layout.inner, 1)
        return self._rows(slab, skipped, skipped + stop - start).tobytes() == y.tobytes()


class Target(_Slabs):
    """An array of the caller's; where it has chunks, it is written a chunk at a time."""

    keeps = False

    def __init__(self, array: Any, layout: Layout) -> None:
        if not all(hasattr(array, part) for part in ("shape", "dtype", "__setitem__")):
            raise ArrayError(f"a sink is a path or an array that can be assigned to, not a {type(array).__name__}")
        if tuple(array.shape) != layout.shape or array.dtype != layout.dtype:
            raise ShapeError(
                f"the sink is {tuple(array.shape)} {array.dtype}: it must be {layout.shape} {layout.dtype}"
            )
        chunks = getattr(array, "chunks", None)
        step = chunks[len(layout.members)] if isinstance(chunks, tuple) and layout.lead else 1
        super().__init__(layout, step if isinstance(step, int) else 1)
        self._array = array

    def begin(self) -> None:
        """It is there already, and so is every row at the end."""

    finish = begin


class _Npz(_Slabs):
    """An archive, which is held in memory and written at the end."""

    keeps = False

    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(layout, 1)
        self._path = path

    def begin(self) -> None:
        self._array = np.empty(self._layout.shape, self._layout.dtype)

    def finish(self) -> None:
        with replacing(self._path) as file:
            np.savez(file, y=self._array)


class _Zarr(_Slabs):
    """A Zarr store whose chunks are about a block of rows, each whole in its other axes."""

    entries = frozenset({"zarr.json", "c"})

    def __init__(self, path: Path, layout: Layout, height: int) -> None:
        if layout.dtype.kind not in "biuf":
            raise DataFileError(f"{path.stem}: Zarr has no settled way to hold strings: write labels to .npy or .csv")
        self._path, self._zarr = path, imported_zarr()
        self._step = max(height // max(layout.inner, 1), 1)
        super().__init__(layout, self._step)

    def begin(self) -> None:
        sizes = self._layout.part(self._step).shape if self._layout.lead else self._layout.shape
        self._array = self._zarr.create_array(
            self._path,
            shape=self._layout.shape,
            chunks=tuple(max(n, 1) for n in sizes),
            dtype=self._layout.dtype,
            config={"write_empty_chunks": True},
        )

    def _put(self, start: int, y: np.ndarray) -> None:
        super()._put(start, y)
        where, _ = self._where(start, start + y.shape[self._axis])
        chunks = [(0,) * len(self._layout.shape)]
        if self._layout.lead:
            rows = where[self._axis]
            slabs = range(rows.start // self._step, -(-rows.stop // self._step))
            chunks = [(*chunks[0][: self._axis], i, *chunks[0][self._axis + 1 :]) for i in slabs]
        for chunk in chunks:
            synced(self._path / self._array.metadata.encode_chunk_key(chunk))

    def resume(self, rows: int, state: dict[str, int], /) -> None:
        super().resume(rows, state)
        self._array = self._zarr.open_array(self._path, mode="r+")

    def finish(self) -> None:
        for folder, _, names in os.walk(self._path):
            for path in (Path(folder), *(Path(folder, name) for name in names if name == "zarr.json")):
                synced(path)


def removed(path: Path, /) -> None:
    """Takes a file or a folder away, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_room(path: Path, partial: Path, layout: Layout, /) -> None:
    """Raises `DataFileError` where the disk has less room than the output needs: before any work."""
    there = partial.stat() if partial.is_file() else None
    free = shutil.disk_usage(path.parent).free + (getattr(there, "st_blocks", 0) * 512 if there else 0)
    if path.suffix.lower() in (".npy", ".npz", "") and layout.nbytes > free:  # the size of others is not known before
        raise DataFileError(
            f"{path} needs {layout.nbytes / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free: choose another disk, "
            "or a narrower --dtype"
        )
