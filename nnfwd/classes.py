"""From the outputs of a classifier to its classes."""

from typing import Any

import numpy as np

from nnfwd.errors import ShapeError
from nnfwd.layers import to_numpy
from nnfwd.network import Network


def labels(network: Network, y: Any, /) -> np.ndarray:
    """The class of each row of outputs, `(..., out)` to `(...)`: the one of the largest output.

    Of a single output, the probability of the second class, it is the second where that is over 1/2. A row with a NaN
    in it has no class.

    Args:
        network: one with `classes`.
        y: its output, of any library, or a nested list.

    Returns:
        A NumPy array of strings or numbers.

    Raises:
        ShapeError: where the network has no classes, y does not fit them, or a row holds NaN.
    """
    if network.classes is None:
        raise ShapeError("the network has no classes: write nnfwd.Network(layers, classes=[...])")
    home = to_numpy(y) if hasattr(y, "dtype") else np.asarray(y)
    width = network.out_features or len(network.classes)
    if home.ndim == 0 or home.shape[-1] != width:
        raise ShapeError(f"y {home.shape} must be (..., {width})")
    if np.isnan(home).any():
        raise ShapeError(f"y has NaN in {np.isnan(home).any(axis=-1).sum()} rows: they have no class")
    chosen = (home[..., 0] > 0.5).astype("int64") if width == 1 else home.argmax(axis=-1)
    return np.asarray(network.classes)[chosen]
