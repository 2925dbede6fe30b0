"""A recorded pass run well on a CPU: over tiles of rows that stay in cache, on a few threads.

A batch is cut into tiles, and every thread takes the next one until none is left. Where the tiles would be so low that
each is mostly reading the weights (few rows through wide layers), the pass is cut at its products instead: these are
shared out by output columns, what is between them by rows. Where a tile ends depends on shapes and the number of
threads alone, and BLAS runs on one thread while tiles do, so the same shape gives the same bits every time.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from nnfwd_numpy.program import Order, Program, Workspace
from nnfwd_numpy.recording import Value, record
from nnfwd_numpy.threads import BLAS, TEAM, cache_size

_MEMORY = 24 << 20  # bytes that the tiles of all threads may take together
_TALL = 1024  # rows from which on products are at full speed
_LOW = 256  # rows of a thread below which it mostly reads the weights, where these are
_HEAVY = 16 << 20  # bytes that no cache holds
_WIDE = 32  # rows from which on operations along them are long
_ALONE = 1 << 17  # multiplications of a product below which no BLAS calls its own threads
_WORK = 8_000_000  # multiplications and the like that take longer than waking a thread
_STEP = 16  # multiplications that an operation on one number costs as much as
_SPAN = 4000  # multiplications in whose time the slower products lose what one operation along a short row takes


class Compiled:
    """The pass over x `(..., in)` of one dtype and any width, recorded when the first x of a width comes."""

    def __init__(self, forward: Callable[[Any], Any], threads: int | None) -> None:
        self._forward, self._threads = forward, threads
        self._passes: dict[int, Pass] = {}
        self._rows: dict[tuple[int, ...], _Row] = {}  # by the shape of x

    def __call__(self, x: np.ndarray) -> np.ndarray:
        row = self._rows.get(x.shape)
        if row is not None:
            return row(x)
        width = x.shape[-1]
        found = self._passes.get(width)
        if found is None:
            if len(self._passes) >= 4:  # a network without weights, which takes any
                self._passes, self._rows = {}, {}
            found = Pass(record(self._forward, width, x.dtype.newbyteorder("=")), self._threads)
            self._passes[width] = found
        if x.size == width and not found.ensemble:
            row = self._rows[x.shape] = _Row(Program(found.values, "vector"), x.shape)
            return row(x)
        return found(np.asarray(x))  # a memmap's slices would be memmaps


class _Row:
    """A pass over a single row: its products are BLAS's own, with as many threads as that has."""

    def __init__(self, program: Program, shape: tuple[int, ...]) -> None:
        self._program, self._shape = program, shape
        self._free: list[Callable[[np.ndarray], np.ndarray]] = []

    def __call__(self, x: np.ndarray) -> np.ndarray:
        try:
            run = self._free.pop()
        except IndexError:
            run = Workspace(self._program, 1).row(self._shape)
        y = run(x)
        self._free.append(run)
        return y


class Pass:
    """One recorded pass over many rows: x `(..., in)` to `(..., out)`, or `(members, ..., out)` for an ensemble."""

    def __init__(self, values: list[Value], threads: int | None) -> None:
        self.values, self.threads = values, threads
        self.width, output = values[0].features, values[-1]
        self.members, self.out, self.dtype = output.shape[:-2], output.features, output.dtype
        self.ensemble = any(len(value.shape) == 3 for value in values)
        self.cost = sum(map(_cost, values))
        products = [value.operands[1] for value in values if value.kind == "matmul"]
        self.largest = max((w.size for w in products), default=0)
        self.heavy = sum(w.nbytes for w in products) > _HEAVY and not self.ensemble
        self._few: dict[int, list[Workspace]] = {}
        self._made: dict[str, Any] = {}

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """What is made when it is needed; not by functools.cached_property, whose lock a fork could leave locked."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def _flat(self) -> Program:
        return cast(Program, self._once("flat", lambda: Program(self.values, "rows")))

    @property
    def _tiles(self) -> "_Tiles":
        return cast("_Tiles", self._once("tiles", lambda: _Tiles(Program(self.values, _order(self.values)))))

    @property
    def _layers(self) -> "_Layers":
        return cast("_Layers", self._once("layers", lambda: _Layers(self.values)))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        flat = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), self.width)
        n = len(flat)
        y = np.empty((*self.members, n, self.out), self.dtype)
        if n * self.largest < _ALONE and n * self.cost < _WORK:
            self._straight(flat, y)
        else:
            holder = object()
            try:
                self._shared(flat, y, BLAS.hold(holder, self.threads))
            finally:
                try:
                    BLAS.release(holder)
                except KeyboardInterrupt:  # at the worst of moments
                    BLAS.release(holder)
                    raise
        return y if x.ndim == 2 else y.reshape(*self.members, *x.shape[:-1], self.out)

    def _shared(self, x: np.ndarray, y: np.ndarray, threads: int) -> None:
        threads = min(threads, len(x) * self.cost // _WORK)
        if threads < 1:
            self._straight(x, y)
        elif self.heavy and min(self._tiles.height(threads), len(x) // threads) < _LOW:
            self._layers.run(x, y, threads)
        else:
            self._tiles.run(x, y, threads)

    def _straight(self, x: np.ndarray, y: np.ndarray) -> None:
        """A small batch: one tile, on the calling thread, in memory that is kept for a few sizes."""
        n = len(x)
        if n not in self._few and len(self._few) >= 4:
            self._few.pop(next(iter(self._few), 0), None)
        free = self._few.setdefault(n, [])
        workspace = _taken(free, n) or Workspace(self._flat if n < _WIDE else self._tiles.program, n)
        workspace.run(x, y)
        free.append(workspace)


def _cost(value: Value) -> int:
    return int(value.operands[1].size) if value.kind == "matmul" else _STEP * value.features


def _order(values: list[Value]) -> Order:
    """Feature-major where operations along short rows take more than the copies and slower products that avoid them."""
    if any(len(value.shape) == 3 for value in values):
        return "rows"
    short = sum(1 for value in values if value.kind == "reduce" or any(_is_row(a) for a in value.operands))
    products = sum(_cost(value) for value in values if value.kind == "matmul")
    return "features" if short * _SPAN > products else "rows"


def _is_row(a: Any) -> bool:
    return isinstance(a, np.ndarray) and a.ndim == 1


class _Tiles:
    """A program over tiles of rows."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._free: list[Workspace] = []

    def height(self, threads: int) -> int:
        """Rows of a tile: so many that a call is long against its overhead, and its operands stay in cache."""
        widest = max((value.features * value.dtype.itemsize for value, _ in self.program.buffers), default=1)
        height = max(cache_size() // widest, _TALL)
        return max(min(height, _MEMORY // (threads * max(self.program.row_bytes, 1))), 1)

    def run(self, x: np.ndarray, y: np.ndarray, threads: int) -> None:
        """Computes the rows y of x."""
        height = self.height(threads)
        count = math.ceil(len(x) / height)
        if threads > 1:
            count = threads * math.ceil(count / threads)
        edges = itertools.pairwise(_edges(len(x), count))
        TEAM.run([functools.partial(self._tile, x, y, *pair, height) for pair in edges], threads)
        del self._free[threads * BLAS.callers :]

    def _tile(self, x: np.ndarray, y: np.ndarray, start: int, stop: int, height: int) -> None:
        workspace = _taken(self._free, stop - start) or Workspace(self.program, height)
        workspace.run(x[start:stop], y[..., start:stop, :])
        self._free.append(workspace)


class _Layers:
    """A pass cut before its products, for few rows through wide layers; in between, arrays are `(features, rows)`.

    Threads share out the features of a product, each with the element-wise operations that follow it.
    """

    def __init__(self, values: list[Value]) -> None:
        self.parts = [_Part(values) for values in _cut(values)]
        ends = itertools.pairwise([values[0], *(part.output for part in self.parts)])
        self.row_bytes = max((_width(a) + _width(b) for a, b in ends), default=1)

    def run(self, x: np.ndarray, y: np.ndarray, threads: int) -> None:
        """Computes the rows y of x."""
        count = math.ceil(len(x) / max(_MEMORY // self.row_bytes, 1))
        for start, stop in itertools.pairwise(_edges(len(x), count)):
            h = np.ascontiguousarray(x[start:stop].T)
            for part in self.parts:
                h = part.run(h, threads)
            np.copyto(y[start:stop], h.T)


class _Part:
    """A product, if there is one, with the element-wise operations after it; or operations over all features."""

    def __init__(self, values: list[Value]) -> None:
        self.output = values[-1]
        self.matrix = values[1].operands[1] if values[1].kind == "matmul" else None
        rest = values if self.matrix is None else values[1:]
        self.whole = _takes_all(rest)
        self.program = Program(rest, "features" if self.whole else "block")
        self._free: list[Workspace] = []

    def run(self, h: np.ndarray, threads: int) -> np.ndarray:
        """What h `(in, rows)` becomes, `(out, rows)`."""
        n = h.shape[1]
        result = np.empty((self.output.features, n), self.output.dtype)
        if self.whole:
            Workspace(self.program, n).run(h.T, result.T)
            return result
        # Features whose numbers fill a quarter of the cache, all threads' buffers keeping to their share of memory.
        buffers = h.dtype.itemsize + sum(value.dtype.itemsize for value, _ in self.program.buffers)
        size = max(min(cache_size() // (4 * h.dtype.itemsize), _MEMORY // (threads * buffers)) // n, 1)
        count = threads * math.ceil(len(result) / (size * threads))
        edges = itertools.pairwise(_edges(len(result), count))
        TEAM.run([functools.partial(self._block, h, result, *pair, size) for pair in edges], threads)
        self._free.clear()
        return result

    def _block(self, h: np.ndarray, result: np.ndarray, start: int, stop: int, size: int) -> None:
        workspace = _taken(self._free, (stop - start) * h.shape[1]) or Workspace(self.program, size * h.shape[1])
        z = h[start:stop] if self.matrix is None else workspace.product(self.matrix.T[start:stop], h)
        workspace.run(z, result[start:stop], start)
        self._free.append(workspace)


def _taken(free: list[Workspace], rows: int) -> Workspace | None:
    """One that no other thread has, if it is large enough."""
    try:
        workspace = free.pop()
    except IndexError:
        return None
    return workspace if workspace.rows >= rows else None


def _width(value: Value) -> int:
    """Bytes of one row."""
    return value.features * value.dtype.itemsize


def _edges(n: int, count: int) -> list[int]:
    """Where n things begin and end that are shared out evenly."""
    return [n * i // count for i in range(count + 1)]


def _cut(values: Sequence[Value]) -> list[list[Value]]:
    """The values in parts of one input each: cut before each product and around what takes all features at once."""
    last = {source.index: value.index for value in values for source in value.sources}
    single = [i for i in range(len(values)) if all(last.get(j, 0) <= i for j in range(i))]  # nothing else goes across
    pieces = [list(values[a : b + 1]) for a, b in itertools.pairwise(single)]
    parts = pieces[:1]
    for piece in pieces[1:]:
        if piece[1].kind == "matmul" or _takes_all(piece) or _takes_all(parts[-1]):
            parts.append(piece)
        else:
            parts[-1].extend(piece[1:])
    return parts


def _takes_all(piece: list[Value]) -> bool:
    return any(value.kind == "reduce" for value in piece[1:])
