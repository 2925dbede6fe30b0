"""What a bound is for, and what it is: stored numbers, exact values, and how far a computed one may be from each."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from nnfwd.bounds.rows import check_known
from nnfwd.errors import ArrayError, BackendError, DtypeError
from nnfwd.layers import Chain, Layer, leaves, mapped, to_numpy
from nnfwd.placement import accept, rounded
from nnfwd.reference import member


@dataclass(frozen=True, eq=False)
class Bounded:
    """Exact outputs and, element by element, how far a computed one may be from them."""

    exact: np.ndarray
    """The reference `(..., out)`, to within a small share of `error`: float64 or wider floats, or objects: Python's or
    mpmath's numbers."""
    error: np.ndarray
    """float64 `(..., out)`: |computed - exact| is at most this; infinite where overflow is possible."""

    @property
    def unclaimed(self) -> np.ndarray:
        """bool `(..., out)`: True where overflow is possible, and nothing is claimed."""
        return np.isinf(self.error)

    def ratio(self, y: Any, /) -> np.ndarray:
        """|y - exact| / error for a computed array y `(..., out)`, as float64: inside where <= 1.

        0 where nothing is claimed. Where NaN or infinity came in, 0 for the same IEEE class and infinity for another.

        Raises:
            ArrayError: for a y of another shape.
        """
        y = (np.asarray(y) if isinstance(y, list | tuple | int | float) else to_numpy(y)).astype("float64")
        if y.shape != self.exact.shape:
            raise ArrayError(f"y {y.shape} cannot be compared with {self.exact.shape}")
        with np.errstate(all="ignore"):
            value = self.exact.astype("float64")
            both = np.isfinite(value) & np.isfinite(y)
            gap = abs(np.where(both, y, 0.0) - np.where(both, self.exact, 0.0)).astype("float64")
            ratio = np.where(gap == 0, 0.0, gap / self.error)
        same_class = (y == value) | (np.isnan(y) & np.isnan(value))
        return np.where(self.unclaimed, 0.0, np.where(both, ratio, np.where(same_class, 0.0, np.inf)))


@dataclass(frozen=True)
class Stored:
    """The numbers that a computation in one dtype had: an input and a network, as float64."""

    x: np.ndarray
    """`(..., in)`"""
    members: tuple[tuple[Layer, ...], ...]
    """The layers of each member, their arrays float64 NumPy arrays; one member where there is no ensemble."""
    lead: tuple[int, ...]
    """What stands before `out` in the shape of the result."""

    @property
    def out_features(self) -> int:
        """Width of the result."""
        return Chain(self.members[0]).out_features or self.x.shape[-1]

    @classmethod
    def of(cls, x: Any, layers: Any, dtype: str) -> "Stored":
        """What was computed with.

        Raises:
            DtypeError: where a number is not one of the dtype.
            ArrayError: for an activation whose rounding is unknown.
            BackendError: where this thread flushes subnormal numbers, without which there are no exact values.
        """
        if (np.array([2.0**-1074]) * 4 == 0).any():
            raise BackendError(
                "this thread flushes subnormal numbers to 0, and the exact values need them: "
                "switch it off, torch.set_flush_denormal(False)"
            )
        chain = Chain.of(layers)
        check_known(chain.layers)
        rows = to_numpy(accept(x, chain)[0])
        _check_held(rows, dtype, "x")
        members = [chain.layers] if chain.members is None else [member(chain, i) for i in range(chain.members)]
        for i, layer in enumerate(chain.layers):
            for a in leaves(layer.parameters):
                _check_held(to_numpy(a), dtype, f"layer {i}")
        lead = rows.shape[:-1] if chain.members is None else (chain.members, *rows.shape[:-1])
        wide = tuple(
            tuple(layer.rounded(dtype).replace(mapped(_wide, layer.parameters)) for layer in layers)
            for layers in members
        )
        return cls(rows.astype("float64"), wide, lead)


def _wide(a: Any) -> np.ndarray:
    return to_numpy(a).astype("float64")


def _check_held(a: np.ndarray, dtype: str, what: str) -> None:
    if not np.array_equal(rounded(a, dtype), a, equal_nan=True):
        raise DtypeError(f"{what} holds numbers that {dtype} does not: round it to {dtype} first")
