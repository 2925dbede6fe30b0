"""A recorded pass as NumPy calls that write into memory which is there already.

Four orders of the numbers in memory, for one pass:

    rows        (rows, features)   as x comes: nothing is copied, the products are fastest
    features    (features, rows)   every operation runs along long rows, however narrow the network
    vector      (features,)        a single row
    block       (features, rows)   some features of an element-wise part, from `(features, rows)` to the same

In the second and the third, small products take their bias along: with a row of ones below h, z = [W b] [h; 1]. An
operation writes over one of its operands where nothing needs that any more; otherwise into a buffer that is free again.
In the first, what is between two products is done strip by strip, each so low that it stays in the nearest cache.
"""

import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from nnfwd_numpy.recording import ROWS, Value
from nnfwd_numpy.threads import cache_size

Order = Literal["rows", "features", "vector", "block"]
X, Y = -1, -2  # in the place of a buffer's number: the tile of x, the tile of the output
_SMALL = {"features": 1 << 16, "vector": 1 << 19}  # numbers of a weight that is worth a copy with its bias
_COPIES = 12 << 20  # bytes of a program's copies of weights
_WIDE = 32  # numbers from which on a row of constants is faster than one constant
_NARROW = 4096  # numbers up to which BLAS adds up products on one thread
_APART = 16  # numbers between two rows: a power of two would bring them into the same few lines of the cache


class Program:
    """What to allocate and what to call, for any number of rows."""

    def __init__(self, values: Sequence[Value], order: Order) -> None:
        self.order: Order = order
        self.values = list(values)
        self.input, self.output = self.values[0], self.values[-1]
        self.affine: dict[int, tuple[Value, np.ndarray]] = {}  # products that take their bias along
        self.buffers: list[tuple[Value, bool]] = []  # a value of that shape, and whether a row of ones is below
        self.where: dict[int, int] = {}
        self.laid: dict[int, np.ndarray] = {}  # weights as products are fastest
        if order == "rows":
            self._lay()
        elif order != "block":
            self._fold()
        self.single = self._single()
        self._allocate()
        self.parts = self._parts()
        self.passing = self._passing()
        self.row_bytes = sum((v.features + ones) * v.dtype.itemsize * _members(v) for v, ones in self.buffers)

    def _fold(self) -> None:
        """z = W h, then z + b, as one product where the weight is small."""
        uses = _uses(self.values)
        left = _COPIES
        for value in self.values[1:]:
            if value.kind != "ufunc" or value.function is not np.add:
                continue
            z, b = value.operands
            if not isinstance(z, Value) or z is self.input or z.kind != "matmul":
                continue
            if uses[z.index] == [value.index]:
                h, w = z.operands
                fits = w.size <= _SMALL[self.order] and w.nbytes <= left
                if self.order == "vector" and w.shape[1] < _WIDE:
                    fits = fits and w.size <= _WIDE * 128  # one row of few outputs is faster as it lies
                if isinstance(b, np.ndarray) and b.ndim == 1 and fits:
                    self.affine[value.index] = (h, np.asfortranarray(np.vstack([w, b]).T))
                    left -= w.nbytes
        folded = {value.sources[0].index for value in self.values if value.index in self.affine}
        self.values = [value for value in self.values if value.index not in folded]

    def _lay(self) -> None:
        """Weights `(out, in)` as `(in, out)`, which makes products a few hundredths faster, as far as memory goes."""
        left = _COPIES
        for value in self.values[1:]:
            if _is_product(value) and value.operands[1].nbytes <= left:
                self.laid[value.index] = np.ascontiguousarray(value.operands[1])
                left -= value.operands[1].nbytes

    def _single(self) -> set[int]:
        """Values that are one number a row: reductions, and what is made of these alone."""
        found: set[int] = set()
        for value in self.values[1:]:
            if value.kind == "reduce" or (value.kind == "ufunc" and found.issuperset(s.index for s in value.sources)):
                found.add(value.index)
        return found

    def sources(self, value: Value) -> list[Value]:
        if value is self.input:
            return []
        return [self.affine[value.index][0]] if value.index in self.affine else value.sources

    def _allocate(self) -> None:
        last = {source.index: value.index for value in self.values for source in self.sources(value)}
        ones = {h.index for h, _ in self.affine.values()}
        free: dict[Any, list[int]] = {}
        replaced: dict[int, Value] = {}  # what a value is written over
        for value in self.values:
            dying = [s for s in self.sources(value) if last[s.index] == value.index and self.where[s.index] >= 0]
            taken = next((s for s in dying if _key(s) == _key(value) and self._may_replace(s, value)), None)
            if value is self.input and self.order in ("rows", "block"):
                self.where[value.index] = X
            elif taken is not None:
                self.where[value.index] = self.where[taken.index]
                replaced[value.index] = taken
            elif free.get(_key(value)):
                self.where[value.index] = free[_key(value)].pop()
            else:
                self.where[value.index] = len(self.buffers)
                self.buffers.append((value, False))
            if value.index in ones:
                self.buffers[self.where[value.index]] = (self.buffers[self.where[value.index]][0], True)
            for source in dying:
                if source is not taken:
                    free.setdefault(_key(source), []).append(self.where[source.index])
        if self.order in ("rows", "block") and self.where[self.output.index] != X:
            written: Value | None = self.output
            while written is not None:  # what the output is written over need not be anywhere else
                self.where[written.index] = Y
                written = replaced.get(written.index)
        used = sorted({i for i in self.where.values() if i >= 0})
        self.buffers = [self.buffers[i] for i in used]
        self.where = {index: used.index(i) if i >= 0 else i for index, i in self.where.items()}

    def _parts(self) -> list[list[Value]]:
        """The values to compute: each product alone, and what is between two of them."""
        made = (value for value in self.values if value is not self.input)
        return [list(part) for _, part in itertools.groupby(made, lambda value: _is_product(value) and value.index)]

    def _passing(self) -> set[int]:
        """Buffers that hold something from one part to another."""
        part_of = {value.index: i for i, part in enumerate(self.parts) for value in part}
        return {
            self.where[source.index]
            for value in self.values
            for source in self.sources(value)
            if part_of.get(source.index) != part_of[value.index]
        }

    def _may_replace(self, source: Value, value: Value) -> bool:
        if value.kind == "where":  # which fills in the last operand first
            return source is value.operands[2] and source is not value.operands[1]
        return value.kind == "ufunc" and value.index not in self.affine


def _is_product(value: Value) -> bool:
    return value.kind == "matmul"


def _key(value: Value) -> tuple[Any, ...]:
    return (value.shape, value.dtype)


def _members(value: Value) -> int:
    return int(value.shape[0]) if len(value.shape) == 3 else 1


def _uses(values: Sequence[Value]) -> dict[int, list[int]]:
    uses: dict[int, list[int]] = {value.index: [] for value in values}
    for value in values[1:]:
        for source in value.sources:
            uses[source.index].append(value.index)
    return uses


class Workspace:
    """The memory of one program for up to so many rows, and the calls that work in it. For one thread at a time.

    For the order "block", `rows` is how many numbers the largest block has.
    """

    def __init__(self, program: Program, rows: int) -> None:
        self.program, self.rows = program, rows
        self.arrays = [self._array(value, ones) for value, ones in program.buffers]
        self._bound: dict[tuple[int, ...], _Bound] = {}
        # Overflow is silent: a context that is entered at little cost, unlike np.errstate.
        self._context = contextvars.Context()
        self._context.run(lambda: np.seterr(all="ignore"))

    def _array(self, value: Value, ones: bool) -> np.ndarray:
        order = self.program.order
        if order == "rows":
            return np.empty([self.rows if n is ROWS else n for n in value.shape], value.dtype)
        if order == "block":
            return np.empty(self.rows, value.dtype)
        apart = () if order == "vector" else (self.rows + _APART,)
        array = np.empty((value.features + ones, *apart), value.dtype)
        array[value.features :] = 1
        return array

    def _bind(self, shape: tuple[int, ...]) -> "_Bound":
        """The calls for a tile x of this shape; those of a few are kept."""
        found = self._bound.get(shape)
        if found is None:
            if len(self._bound) >= 4:
                del self._bound[next(iter(self._bound))]
            found = self._bound[shape] = _Bound(self, shape)
        return found

    def run(self, x: np.ndarray, y: np.ndarray, first: int = 0) -> None:
        """Computes the rows y of x. Both are two-dimensional; y of an ensemble `(members, rows, out)`.

        For the order "block", x and y are `(features, rows)`, and `first` is the number of their first feature.
        """
        self._context.run(self._bind(x.shape), x, y, first)

    def product(self, w: np.ndarray, h: np.ndarray) -> np.ndarray:
        """w h, silently."""
        return self._context.run(np.matmul, w, h)

    def row(self, shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
        """In the order "vector", what takes x of this shape, whose axes are 1 but for the last, to its output."""
        bound = self._bind((1, shape[-1]))
        bound.last = bound.last.reshape((*shape[:-1], self.program.output.features))
        return functools.partial(self._context.run, bound.row)  # type: ignore[call-arg]


class _Tile:
    """Stands for a strip of x or y, until they are known."""

    def __init__(self, which: int, strip: slice) -> None:
        self.which, self.strip = which, strip


class _Column:
    """Stands for some of the numbers `(features,)` of a constant, as a column."""

    def __init__(self, a: np.ndarray) -> None:
        self.a = a


class _Bound:
    """The calls of a program in one workspace for a tile x of a fixed shape."""

    def __init__(self, workspace: Workspace, shape: tuple[int, ...]) -> None:
        self.program, self.shape, self.arrays = workspace.program, shape, workspace.arrays
        self.n = shape[1] if self.program.order == "block" else shape[0]
        self.constants: dict[Any, np.ndarray] = {}
        self.calls: list[Callable[[], Any]] = []
        self.open: list[tuple[int, Callable[..., Any], tuple[Any, ...]]] = []  # calls whose operands each tile has anew
        every = slice(self.n)
        program = self.program
        if program.order == "features":
            self._add(_copy_transposed, (self._at(program.input, every), _Tile(X, every)))
        for part in program.parts:
            for strip in self._strips(part):
                for value in part:
                    self._add(*self._call(value, strip))
        if program.where[program.output.index] == X:
            self._add(np.copyto, (_Tile(Y, slice(None)), _Tile(X, slice(None))))
        elif program.order == "features":
            self._add(_copy_transposed, (_Tile(Y, every), self._at(program.output, every)))
        elif program.order == "vector":
            self.first, self.last = self._at(program.input, every), self._at(program.output, every)

    def __call__(self, x: np.ndarray, y: np.ndarray, first: int) -> None:
        def known(a: Any) -> Any:
            if isinstance(a, _Column):
                return a.a[first : first + len(x), None]
            if isinstance(a, _Tile):
                return x[a.strip] if a.which == X else y[..., a.strip, :]
            return a

        for i, function, arguments in self.open:
            self.calls[i] = functools.partial(function, *map(known, arguments))
        for call in self.calls:
            call()
        for i, _, _ in self.open:
            self.calls[i] = _nothing  # which keeps neither x nor y alive

    def row(self, x: np.ndarray) -> np.ndarray:
        self.first[...] = x
        for call in self.calls:
            call()
        return self.last.copy()

    def _strips(self, part: list[Value]) -> Iterator[slice]:
        height = self.n
        if self.program.order == "rows" and part[0].kind != "matmul":
            widest = max(value.features * value.dtype.itemsize * _members(value) for value in part)
            height = max(cache_size() // (4 * widest), _WIDE)
        count = max(round(self.n / max(height, 1)), 1)
        edges = (self.n * i // count for i in range(count + 1))
        return (slice(*pair) for pair in itertools.pairwise(edges))

    def _add(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if any(isinstance(a, _Column | _Tile) for a in arguments):
            self.open.append((len(self.calls), function, arguments))
        self.calls.append(functools.partial(function, *arguments))

    def _at(self, value: Value, strip: slice, *, ones: bool = False) -> Any:
        """Where a strip of a value stands, with the ones below it where a product takes the bias along."""
        order, i = self.program.order, self.program.where[value.index]
        if i < 0:
            return _Tile(i, slice(None) if order == "block" else strip)
        array = self.arrays[i]
        if order == "block":
            return array[: math.prod(self.shape)].reshape(self.shape)
        if order == "rows":
            passing = i in self.program.passing
            return array[..., strip if passing else slice(strip.stop - strip.start), :]
        if order == "vector" and value.index in self.program.single:
            return array[:1].reshape(())  # as the other operand of an operation three times as fast as (1,)
        inside = array if ones else array[: value.features]
        return inside[:, : self.n] if order == "features" else inside

    def _call(self, value: Value, strip: slice) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        order, out = self.program.order, self._at(value, strip)
        product = np.dot if order == "vector" else np.matmul
        if value.index in self.program.affine:
            h, weight = self.program.affine[value.index]
            return product, (weight, self._at(h, strip, ones=True), out)
        if value.kind == "matmul":
            h, w = value.operands
            if order == "rows":
                return np.matmul, (self._at(h, strip), self.program.laid.get(value.index, w), out)
            return product, (w.T, self._at(h, strip), out)
        if value.function is np.negative:  # NumPy 2.4 negates the wrong numbers of some strided arrays
            return np.multiply, (self._at(value.sources[0], strip), self._operand(-1.0, value, strip), out)
        operands = [self._operand(a, value, strip) for a in value.operands]
        if value.kind == "reduce" and order == "vector":
            if value.function is np.add and value.sources[0].features <= _NARROW:  # in half the time of a reduction
                return np.dot, (*operands, np.ones(value.sources[0].features, value.dtype), out)
            return value.function.reduce, (*operands, 0, None, out)
        if value.kind == "reduce":
            return value.function.reduce, (*operands, -1 if order == "rows" else 0, None, out, True)
        if value.kind == "where":
            last = value.operands[2]
            inside = isinstance(last, Value) and self.program.where[last.index] == self.program.where[value.index]
            return (_where_inside, (*operands[:2], out)) if inside else (_where, (*operands, out))
        if value.kind == "cast":
            return _cast, (*operands, out)
        if value.function in _BY_NAME:  # these take `out` by name only
            if isinstance(out, _Tile):
                return _BY_NAME[value.function], (*operands, out)
            return functools.partial(value.function, out=out), tuple(operands)
        return value.function, (*operands, out)

    def _operand(self, a: Any, value: Value, strip: slice) -> Any:
        """An operand where it stands, or a constant in the shape and dtype in which NumPy is fastest."""
        order = self.program.order
        if isinstance(a, Value):
            return self._at(a, strip)
        if isinstance(a, np.ndarray):
            if order == "block":
                return _Column(a)
            return a[:, None] if order == "features" and a.ndim == 1 else a
        dtype = value.sources[0].dtype if value.kind == "ufunc" else value.dtype
        shape: tuple[int, ...] = ()
        if order == "vector":
            shape = (value.features,)
        elif value.function in (np.maximum, np.minimum):
            length = value.features if order == "rows" else self.n
            shape = (length,) if length >= _WIDE else ()
        key = (a, math.copysign(1, a), dtype, shape)
        if key not in self.constants:
            self.constants[key] = np.full(shape, a, dtype)
        return self.constants[key]


def _nothing() -> None:
    pass


def _copy_transposed(to: np.ndarray, a: np.ndarray) -> None:
    np.copyto(to, a.T)


def _cast(a: np.ndarray, out: np.ndarray) -> None:
    np.copyto(out, a, casting="unsafe")


def _where(condition: np.ndarray, a: Any, b: Any, out: np.ndarray) -> None:
    np.copyto(out, b)
    np.copyto(out, a, where=condition)


def _where_inside(condition: np.ndarray, a: Any, out: np.ndarray) -> None:
    np.copyto(out, a, where=condition)


def _maximum(a: Any, b: Any, out: np.ndarray) -> None:
    np.maximum(a, b, out=out)


def _minimum(a: Any, b: Any, out: np.ndarray) -> None:
    np.minimum(a, b, out=out)


_BY_NAME = {np.maximum: _maximum, np.minimum: _minimum}
