"""The pass, recorded: what it does to one array, step by step.

The pass is run once with a stand-in for x, which knows its shape and dtype and writes down every operation that is
asked of it. What comes out is the pass itself as a list of steps, and says nothing of layers; `program.py` makes calls
of it that write into memory that is there already.
"""

from collections.abc import Callable
from typing import Any, NoReturn, cast

import numpy as np


class _Rows:
    """Stands in a shape for the number of rows, which is not known yet."""

    def __repr__(self) -> str:
        return "rows"


ROWS = _Rows()
Shape = tuple[Any, ...]
"""`(ROWS, features)`, or `(members, ROWS, features)` for an ensemble."""


class Value(np.lib.mixins.NDArrayOperatorsMixin):
    """One array of the recorded pass: x, or what a step makes of earlier values and constants.

    Attributes:
        kind: `input`, `ufunc`, `matmul`, `reduce` (over the features), `where` or `cast`.
        function: the ufunc; of a reduction the one it repeats.
        operands: values, arrays and Python numbers.
    """

    __slots__ = ("dtype", "function", "index", "kind", "operands", "shape", "tape")
    __hash__ = object.__hash__  # == records a comparison

    def __init__(
        self, tape: "list[Value]", shape: Shape, dtype: Any, kind: str, function: Any = None, operands: Any = ()
    ) -> None:
        self.tape, self.shape, self.dtype = tape, shape, np.dtype(dtype)
        self.kind, self.function, self.operands = kind, function, tuple(operands)
        self.index = len(tape)
        tape.append(self)

    @property
    def sources(self) -> "list[Value]":
        """The operands that are values, each once."""
        return list({a.index: a for a in self.operands if isinstance(a, Value)}.values())

    @property
    def features(self) -> int:
        return int(self.shape[-1])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def _next(self, kind: str, shape: Shape, dtype: Any, function: Any, operands: Any) -> "Value":
        return Value(self.tape, shape, dtype, kind, function, operands)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *operands: Any, **options: Any) -> "Value":
        if method != "__call__" or options or ufunc.nout != 1:
            _refuse(f"{ufunc.__name__}.{method} with {sorted(options)}")
        given = [type(a) if isinstance(a, int | float) else a.dtype for a in operands]
        dtype = ufunc.resolve_dtypes((*given, None))[-1]
        if ufunc is np.matmul:
            h, w = operands
            if not isinstance(h, Value) or isinstance(w, Value):
                _refuse("a product that is not of a value and a constant")
            return self._next("matmul", (*(w.shape[:-2] or h.shape[:-2]), ROWS, w.shape[-1]), dtype, ufunc, operands)
        return self._next("ufunc", _broadcast(operands), dtype, ufunc, operands)

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, options: Any) -> "Value":
        set_options = {name: value for name, value in options.items() if value is not None}
        if function in _REDUCTIONS and set_options == {"axis": -1, "keepdims": True}:
            return self._next("reduce", (*self.shape[:-1], 1), self.dtype, _REDUCTIONS[function], args)
        if function is np.where:
            a = next(a for a in args[1:] if isinstance(a, Value))
            return self._next("where", _broadcast(args), a.dtype, None, args)
        if function is np.round:
            return cast("Value", np.rint(args[0]))
        if function is getattr(np, "astype", None):
            return self._next("cast", self.shape, args[1], None, args[:1])
        return _refuse(function.__name__)

    def astype(self, dtype: Any, **_: Any) -> "Value":  # NumPy 2.0
        return self._next("cast", self.shape, dtype, None, (self,))


_REDUCTIONS = {np.max: np.maximum, np.sum: np.add}


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(f"the pass asks for {what}, which cannot be recorded")


def _broadcast(operands: Any) -> Shape:
    """The shape of an operation on values, arrays and numbers, each element of the result on those beside it."""
    shapes = [getattr(a, "shape", ()) for a in operands]
    shape: list[Any] = []
    for axis in range(-max(map(len, shapes)), 0):
        sizes = {s[axis] for s in shapes if len(s) >= -axis} - {1}
        if len(sizes) > 1:
            _refuse(f"an operation on shapes {shapes}")
        shape.append(sizes.pop() if sizes else 1)
    return tuple(shape)


def record(forward: Callable[[Any], Any], width: int, dtype: Any) -> list[Value]:
    """The values of a pass over x `(rows, width)`, x first, in the order they are made; the output is the last.

    Raises `NotImplementedError` where the pass does something that no step stands for.
    """
    tape: list[Value] = []
    x = Value(tape, (ROWS, width), dtype, "input")
    output = forward(x)
    needed = {x.index, output.index}
    for value in reversed(tape[: output.index + 1]):
        if value.index in needed:
            needed.update(source.index for source in value.sources)
    kept = [value for value in tape if value.index in needed]
    for i, value in enumerate(kept):
        value.index = i
    return kept
