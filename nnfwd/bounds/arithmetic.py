"""How a library rounds: unit roundoffs, underflow, and the errors of its own functions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_FORMATS = {
    "float16": (11, -14, 15),
    "bfloat16": (8, -126, 127),
    "float32": (24, -126, 127),
    "float64": (53, -1022, 1023),
}
_ULP = {"exp": 8.0, "expm1": 8.0, "log1p": 8.0, "log": 8.0, "tanh": 8.0, "erfc": 16.0}


@dataclass(frozen=True)
class Arithmetic:
    """How a library rounds in one dtype: unit roundoffs, underflow, and the errors of its functions.

    The defaults are IEEE arithmetic with sums in the dtype itself, and cautious errors for an unmeasured library.
    """

    dtype: str
    u_in: float = 0.0
    """Unit roundoff to which operands of a product are rounded first (2**-10 where cut off to TF32), else 0."""
    u_acc: float | None = None
    """Unit roundoff of the sums of products, None for the dtype's own."""
    flushes: bool = False
    """Whether subnormal numbers may become 0."""
    ulp: Mapping[str, float] = field(default_factory=lambda: _ULP)
    """Largest error of exp, expm1, log1p, log, tanh and erfc, in units in the last place."""

    u: float = field(init=False)
    smallest_normal: float = field(init=False)
    smallest: float = field(init=False)
    largest: float = field(init=False)

    def __post_init__(self) -> None:
        p, low, high = _FORMATS[self.dtype]
        values = {
            "u": 2.0**-p,
            "smallest_normal": 2.0**low,
            "smallest": math.ldexp(1.0, low - p + 1),
            "largest": (2 - 2.0 ** (1 - p)) * 2.0**high,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def u_out(self) -> float:
        """Unit roundoff to which a wide sum is rounded, 0 where sums are in the dtype itself."""
        return 0.0 if self.u_acc is None else self.u

    def dense_error(self, n: int) -> float:
        """c, the relative error of a sum of n products and a bias: `(1 + u_in)^2 (1 + gamma) (1 + u_out)^2 - 1`."""
        k = (n + 1) * (self.u if self.u_acc is None else self.u_acc)
        k = k / (1 - k) if k < 0.5 else k
        return math.expm1(2 * math.log1p(self.u_in) + math.log1p(k) + 2 * math.log1p(self.u_out))

    def holds_operand(self, size: Any) -> Any:
        """Whether a number of this size, or an array of them, stays finite when rounded to an operand of a product."""
        return (1 + 2 * self.u_in) * size <= self.largest

    @property
    def scale_error(self) -> float:
        """The relative error of (x - center) scale + shift: three roundings."""
        return math.expm1(3 * math.log1p(self.u))

    @property
    def quantum(self) -> float:
        """What a single underflow may lose."""
        return self.smallest_normal if self.flushes else self.smallest


def tensor_cores(dtype: str, precision: str) -> dict[str, Any]:
    """How products round where tensor cores may make them, as `u_in` and `u_acc` of an `Arithmetic`.

    Their adder truncates. Operands become TF32 by cutting off, which costs twice as much as rounding.
    """
    if dtype == "float64" or (dtype == "float32" and precision == "highest"):
        return {}
    u_in = {"high": 2.0**-10, "medium": 2.0**-8}[precision] if dtype == "float32" else 0.0
    return {"u_in": u_in, "u_acc": 2.0**-23}


def arithmetic_of(backend: Any, dtype: str, *, precision: str = "highest", device: str | None = None) -> Arithmetic:
    """How a backend rounds on one of its devices (by default the first), cautiously where it does not say."""
    own = getattr(backend, "arithmetic", None)
    if own is None:
        return Arithmetic(dtype, flushes=True)
    return own(dtype, precision=precision, device=device or next(iter(backend.devices()), "cpu"))
