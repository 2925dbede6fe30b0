"""The errors of the libraries' own functions, measured: what the rows `ULP` of the backends must cover.

    python -m nnfwd.ulp                                     every usable device, beside the rows checked in
    python -m nnfwd.ulp --backend numpy --dtype float32 --exhaustive

A function is evaluated as the activations call it, on the arguments they may call it with, and compared with the exact
value: NumPy's float64 functions for the narrower dtypes (right to 1e-8 ulp of float32), its long double for float64,
and mpmath where neither will do. Errors are in units in the last place, 2 u 2^floor(log2 |exact|). Underflow and
overflow have terms of their own in the bound, so subnormal arguments are left out, and results that are no normal
numbers or within 16 ulp of not being one.

A library has other code for other processors. The rows cover these too, as measured under

    NPY_DISABLE_CPU_FEATURES="X86_V3 X86_V4 AVX512_ICL"   ATEN_CPU_CAPABILITY=default   XLA_FLAGS=--xla_cpu_max_isa=AVX
"""

import argparse
import functools
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import nnfwd
from nnfwd import backend as _backend
from nnfwd.bounds import Arithmetic, arithmetic_of
from nnfwd.erfc import erfc
from nnfwd.errors import DtypeError, NnfwdError
from nnfwd.placement import REAL, dtype_name
from nnfwd.reference import digits

FUNCTIONS = ("exp", "expm1", "log1p", "log", "tanh", "erfc")
_BLOCK = 1 << 18  # numbers at a time: small in memory, and a JAX function is compiled for two shapes at most
_SLOW = 100  # so many fewer points where the exact values come from mpmath


@dataclass(frozen=True)
class Measurement:
    """The largest error found of one function, in one dtype, on one device."""

    name: str
    dtype: str
    error: float
    """In units in the last place; infinite where a result is NaN or infinite."""
    at: float
    """The argument with this error."""
    points: int
    """How many arguments were compared."""
    row: float
    """The checked-in error, which the bound takes."""

    @property
    def exceeds(self) -> bool:
        """Whether the error is beyond its row."""
        return self.error > self.row


def measure(
    adapter: Any, name: str, dtype: str, *, device: str, points: int = 2_000_000, exhaustive: bool = False
) -> Measurement:
    """The largest error of a backend's function `name` in `dtype` on one of its devices, compiled or not.

    float16 and bfloat16 are measured at every value, float32 and float64 at `points` of them (a hundredth where the
    exact values come from mpmath), the same at every call; `exhaustive` takes every value of float32. JAX has float64
    only with x64 enabled.

    Raises:
        DtypeError: where the backend has no such dtype.
    """

    def function(_: Any, x: Any) -> Any:
        return erfc(x, adapter.xp) if name == "erfc" else getattr(adapter.xp, name)(x)

    runs = [functools.partial(function, ())]
    if hasattr(adapter, "compile"):  # a compiler may rewrite: XLA makes exp(a) * exp(b) exp(a + b)
        runs.append(adapter.compile(function, ()))
    arithmetic = Arithmetic(dtype)
    worst, at, compared = 0.0, math.nan, 0
    for x in _arguments(name, dtype, points, exhaustive):
        head, tail = _exact(name, x, dtype)
        kept = _normal(x, arithmetic, margin=0) & _normal(head, arithmetic, margin=16)
        compared += int(kept.sum())
        given = adapter.place(x, dtype=dtype, device=device)
        for run in runs:
            with adapter.scope("medium", given):  # of products, of which there are none
                y = adapter.to_numpy(run(given)).astype("float64")
            error = np.where(kept, _distance(y, head, tail, arithmetic), 0.0)
            i = int(error.argmax())
            if error[i] > worst:
                worst, at = float(error[i]), float(x[i])
    row = arithmetic_of(adapter, dtype, device=device).ulp[name]
    return Measurement(name, dtype, worst, at, compared, row)


def exceeded(adapter: Any, dtype: str, device: str, points: int = 20_000) -> list[Measurement]:
    """The measurements of a backend's functions on one of its devices that are beyond their rows."""
    found = (measure(adapter, name, dtype, device=device, points=points) for name in FUNCTIONS)
    return [m for m in found if m.exceeds]


def _distance(y: np.ndarray, head: np.ndarray, tail: np.ndarray | float, arithmetic: Arithmetic) -> np.ndarray:
    """The distance of y from the exact head + tail in units in the last place, infinite for NaN."""
    with np.errstate(all="ignore"):
        unit = np.ldexp(arithmetic.u, np.frexp(head)[1])
        return np.nan_to_num(np.abs((y - head) - tail) / unit, nan=math.inf, posinf=math.inf)


def _normal(x: np.ndarray, arithmetic: Arithmetic, *, margin: int) -> np.ndarray:
    """Where numbers are normal, and stay so with an error of `margin` ulp."""
    wide, size = 2 * margin * arithmetic.u, np.abs(x)
    return (size >= arithmetic.smallest_normal * (1 + wide)) & (size <= arithmetic.largest * (1 - wide))


def _exact(name: str, x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray | float]:
    """The exact values of a function at x as sums of two float64."""
    if _needs_digits(name, dtype):
        m = digits()
        exact = [getattr(m, name)(m.number(v)) for v in x.tolist()]
        head = np.array([float(v) for v in exact])
        return head, np.array([float(v - h) for v, h in zip(exact, head.tolist(), strict=True)])
    if dtype == "float64":
        wide = getattr(np, name)(x.astype(np.longdouble))
        head = wide.astype("float64")
        return head, (wide - head).astype("float64")
    if name == "erfc":
        return np.fromiter(map(math.erfc, x.tolist()), "float64", x.size), 0.0
    return getattr(np, name)(x.astype("float64")), 0.0


def _needs_digits(name: str, dtype: str) -> bool:
    return dtype == "float64" and (name == "erfc" or np.finfo(np.longdouble).nmant < 63)


def _domain(name: str, arithmetic: Arithmetic) -> tuple[float, float]:
    """The ends of what the activations call a function with, as far as results are normal and still change."""
    low, high = math.log(arithmetic.smallest_normal), math.log(arithmetic.largest)
    return {
        "exp": (low, high),
        "expm1": (-40.0, high),  # above 0 in celu with a negative alpha
        "log1p": (0.0, 1.0),
        "log": (1.0, 2.0**15),  # a sum of so many exponentials
        "tanh": (-20.0, 20.0),
        "erfc": (-6.0, math.sqrt(-low)),
    }[name]


def _arguments(name: str, dtype: str, points: int, exhaustive: bool) -> Iterator[np.ndarray]:
    """Blocks of numbers of the dtype between the ends of the domain (bfloat16 in float32 arrays)."""
    arithmetic = Arithmetic(dtype)
    low, high = _domain(name, arithmetic)
    every = _Floats(dtype, low, high, arithmetic.smallest_normal)
    if dtype in ("float16", "bfloat16") or (exhaustive and dtype == "float32"):
        for start in range(0, every.count, _BLOCK):
            yield every[np.arange(start, min(start + _BLOCK, every.count), dtype="uint64")]
        return
    # A third spread over the interval, a third over its floats, a third over those that are not tiny.
    large = _Floats(dtype, low, high, arithmetic.u)
    rng = np.random.default_rng(0)
    points = max(points // _SLOW, 1) if _needs_digits(name, dtype) else points
    for start in range(0, points, _BLOCK):
        third, rest = divmod(min(_BLOCK, points - start), 3)
        uniform = rng.uniform(low, high, third + rest).astype(dtype)
        spread = (floats[rng.integers(floats.count, size=third, dtype="uint64")] for floats in (every, large))
        yield np.concatenate([uniform, *spread])


class _Floats:
    """All floats of a dtype in [low, high] of magnitude `least` or more: first the positive ones, then the negative."""

    def __init__(self, dtype: str, low: float, high: float, least: float) -> None:
        self._stored = "float32" if dtype == "bfloat16" else dtype
        self._unsigned = np.dtype(f"uint{8 * np.dtype(self._stored).itemsize}")
        self._shift = 16 if dtype == "bfloat16" else 0
        self._positive, self._negative = self._between(low, high, least), self._between(-high, -low, least)
        self.count = len(self._positive) + len(self._negative)

    def __getitem__(self, i: np.ndarray) -> np.ndarray:
        negative = i >= len(self._positive)
        bits = np.where(negative, i - len(self._positive) + self._negative.start, i + self._positive.start)
        x = (bits.astype(self._unsigned) << self._shift).view(self._stored)
        return np.where(negative, -x, x)

    def _between(self, low: float, high: float, least: float) -> range:
        """The bits of the floats in [low, high] that are `least` or more: they are in the order of the floats."""
        if high < least:
            return range(0)
        first, last = (
            int(np.array(end, self._stored).view(self._unsigned)) >> self._shift for end in (max(low, least), high)
        )
        return range(first, last + 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1 where a measurement is beyond its row."""
    parser = argparse.ArgumentParser(
        prog="python -m nnfwd.ulp",
        description="Measure the errors of the libraries' own functions, in ulp, beside the rows checked in.",
    )
    parser.add_argument("--backend", metavar="NAME", nargs="+", help="by default every usable one but dask")
    parser.add_argument("--dtype", metavar="DTYPE", nargs="+", choices=REAL, default=REAL, help="by default all")
    parser.add_argument(
        "--points", metavar="N", type=int, default=2_000_000, help="arguments of each function (default: %(default)s)"
    )
    parser.add_argument("--exhaustive", action="store_true", help="every value of float32")
    options = parser.parse_args(arguments)
    if options.points < 1:
        parser.error(f"--points {options.points}: it must be at least 1")
    names = options.backend
    if names is None:  # the arithmetic of Dask is that of its chunks
        names = [info.name for info in nnfwd.backends(devices=True) if info.devices and info.name != "dask"]
    status = 0
    for name in names:
        try:
            adapter = _backend.load(name)
        except NnfwdError as error:
            parser.error(str(error))
        for device in adapter.devices():
            for dtype in options.dtype:
                if not _has(adapter, dtype, device):
                    print(f"\n{name} {device} has no {dtype} here")
                else:
                    status |= _report(adapter, dtype, device, options.points, options.exhaustive)
    return status


def _report(adapter: Any, dtype: str, device: str, points: int, exhaustive: bool) -> int:
    print(f"\n{_backend.name_of(adapter)} {device} {dtype}", flush=True)
    rows, status, width = {}, 0, 24 if dtype == "float64" else 16
    for name in FUNCTIONS:
        m = measure(adapter, name, dtype, device=device, points=points, exhaustive=exhaustive)
        flag = "  EXCEEDED" if m.exceeds else ""
        print(
            f"  {name:6}{m.error:8.3f} ulp at {m.at:<{width}.{width - 7}g}{m.points:11} points   row {m.row:5}{flag}",
            flush=True,
        )
        rows[name] = _row(m.error, dtype)
        status |= m.exceeds
    print(f'    to cover this machine:  "{dtype}": {json.dumps(rows)},', flush=True)
    return status


def _row(error: float, dtype: str) -> float:
    """A row for a measured error: at most a quarter more, but never less than correct rounding makes likely."""
    return max(0.62 if dtype in ("float16", "bfloat16") else 1.2, float(np.floor(12.5 * error)) / 10)


def _has(adapter: Any, dtype: str, device: str) -> bool:
    try:
        return dtype_name(adapter.place(np.zeros(1, "float32"), dtype=dtype, device=device).dtype) == dtype
    except DtypeError:
        return False


if __name__ == "__main__":
    os.environ["JAX_ENABLE_X64"] = "1"
    sys.exit(main())
