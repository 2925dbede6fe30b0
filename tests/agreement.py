"""The one comparison: namespace, device, dtype and shape before values, and values inside the derived bound."""

from typing import Any

import numpy as np
from places import Place

from nnfwd.bounds import Bounded
from nnfwd.placement import dtype_name


def check(y: Any, place: Place, dtype: str, bounded: Bounded) -> np.ndarray:
    """Asserts that y was computed at this place and lies inside the bound; returns |y - exact| / error."""
    assert place.holds(y), f"the result is not at {place}"
    assert dtype_name(y.dtype) == dtype
    home = place.adapter.to_numpy(y)
    assert home.shape == bounded.exact.shape
    if place.name != "dask" or not any(n != n for n in y.shape):
        assert tuple(y.shape) == home.shape
    ratio = bounded.ratio(home)
    worst = int(ratio.argmax()) if ratio.size else 0
    assert ratio.size == 0 or ratio.max() <= 1, (
        f"{place} {dtype}: element {worst} is {ratio.ravel()[worst]:.3g} bounds away: "
        f"{home.ravel()[worst]!r} for {bounded.exact.ravel()[worst]!r} +- {bounded.error.ravel()[worst]:.3g}"
    )
    return ratio
