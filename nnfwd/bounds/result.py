"""What a bound is: exact values, and how far a computed one may be from each."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from nnfwd.errors import ArrayError


@dataclass(frozen=True)
class Bounded:
    """Exact outputs and, element by element, how far a computed one may be from them."""

    exact: np.ndarray
    """The reference: float64, wider floats, or Python's or mpmath's numbers as objects."""
    error: np.ndarray
    """float64, of the same shape: |computed - exact| is at most this; infinite where overflow is possible."""

    @property
    def unclaimed(self) -> np.ndarray:
        """True where overflow is possible, and nothing is claimed."""
        return np.isinf(self.error)

    def ratio(self, y: Any, /) -> np.ndarray:
        """|y - exact| / error for a computed NumPy array y of the same shape: inside where <= 1.

        0 where nothing is claimed. Where NaN or infinity came in, 0 for the same IEEE class and infinity for another.

        Raises:
            ArrayError: for a y of another shape.
        """
        y = np.asarray(y)
        if y.shape != self.exact.shape:
            raise ArrayError(f"y {y.shape} cannot be compared with {self.exact.shape}")
        y = y.astype("float64")
        value = self.exact.astype("float64")
        finite = np.isfinite(value)
        exact = np.where(finite, self.exact, np.zeros_like(self.exact))
        with np.errstate(all="ignore"):
            distance = np.where(np.isfinite(y), abs(np.where(np.isfinite(y), y, 0.0) - exact).astype("float64"), np.inf)
            ratio = np.where(distance == 0, 0.0, distance / self.error)
            same_class = (y == value) | (np.isnan(y) & np.isnan(value))
        ratio = np.where(finite, ratio, np.where(same_class, 0.0, np.inf))
        return np.where(self.unclaimed, 0.0, ratio)
