"""Activation functions, and what a weight and a bias do to one, as curves."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nnfwd import activations as _activations
from nnfwd.activations import Function
from nnfwd.forward import feed_forward
from nnfwd.layers import Activation, Dense
from nnfwd.plot.axes import COLOURS, LINES, new_axes
from nnfwd.reference import is_vector

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID = np.arange(-80, 81) / 10
"""The tutorial's x: from -8 to 8 in steps of 0.1."""

# What the gallery shows, grouped by the values each function takes.
RANGES = {
    "from 0 to 1": ("sigmoid", "hard_sigmoid", "softmax"),
    "from -1 to 1": ("tanh", "hard_tanh", "softsign"),
    "from 0 upwards": ("relu", "thresholded_relu", "softplus", "exp"),
    "bounded below": ("elu", "selu", "celu", "silu", "hard_silu", "mish", "gelu", "gelu_tanh"),
    "other limits": ("relu6", "clip", "log_sigmoid", "log_softmax"),
    "all numbers": ("identity", "leaky_relu", "prelu"),
}
_EXAMPLES = {"prelu": {"negative_slope": 0.25}, "clip": {"lower": -2.0, "upper": 3.0}}


def activation(function: Any = "sigmoid", /, *, ax: "Axes | None" = None) -> "Axes":
    """An activation function f(x) for x from -8 to 8.

    Args:
        function: a name, an `activations.Function` or a callable `f(x, /, *, xp)` of numbers one by one.
        ax: where to draw; by default a new figure's.
    """
    chosen = _activations.get(function)
    ax = ax or new_axes(5.2, 3.6)
    ax.plot(GRID, _values(chosen), color=COLOURS[0])
    ax.set_xlabel("x")
    ax.set_ylabel("f(x)")
    ax.set_title(repr(chosen))
    ax.grid(alpha=0.3)
    return ax


def activations(*, ax: "Axes | None" = None) -> "Axes":
    """Every activation with its derivative, grouped by the values it takes.

    softmax and log_softmax are drawn for the first of two classes, of which the second has x = 0. Small pictures in
    `ax`, one an activation: `ax.child_axes`.
    """
    columns = 4
    rows: list[tuple[str, tuple[str, ...]]] = []
    for title, names in RANGES.items():
        for start in range(0, len(names), columns):
            rows.append((title if start == 0 else "", names[start : start + columns]))
    ax = ax or new_axes(2.1 * columns, 1.95 * len(rows))
    ax.axis("off")
    for i, (title, names) in enumerate(rows):
        bottom = 1 - (i + 1) / len(rows)
        ax.text(-0.062, bottom + 0.42 / len(rows), title, rotation=90, ha="center", va="center", weight="bold")
        for j, name in enumerate(names):
            box = (j / columns, bottom + 0.12 / len(rows), 0.82 / columns, 0.68 / len(rows))
            _small(ax.inset_axes(box), name, first=(i, j) == (0, 0))
    return ax


def _small(ax: "Axes", name: str, *, first: bool) -> None:
    function = _activations.named(name)(**_EXAMPLES.get(name, {}))
    values = _values(function)
    step = 1e-6
    slope = (_values(function, GRID + step) - _values(function, GRID - step)) / (2 * step)
    slope[np.abs(slope) > 1 / step / 10] = np.nan  # across a jump there is none
    ax.plot(GRID, slope, color=COLOURS[1], linestyle=LINES[1], linewidth=1.1, label="f'(x)")
    ax.plot(GRID, values, color=COLOURS[0], linewidth=1.7, label="f(x)")
    settings = ", ".join(f"{value:.3g}" for value in function.parameters.values())
    ax.set_title(f"{name}({settings})" if settings else name, fontsize=8.5)
    low, high = max(values.min(), -4.0), values.max() if values.max() <= 6 else 4.0
    low, high = min(low, np.nanmin(slope), -0.2), max(high, min(np.nanmax(slope), 4.0), 1.2)
    ax.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    ax.set_xlim(-8, 8)
    ax.tick_params(labelsize=6.5)
    ax.locator_params(axis="y", nbins=4)
    ax.axhline(0, color="#888888", linewidth=0.5, zorder=0)
    ax.axvline(0, color="#888888", linewidth=0.5, zorder=0)
    if first:
        ax.legend(fontsize=6.5, loc="upper left", frameon=False)


def weight_effect(
    weights: Sequence[float] = (0.5, 1.0, 2.0), /, *, activation: Any = "sigmoid", ax: "Axes | None" = None
) -> "Axes":
    """What a weight does: h_w(x) = f(w x) for several weights; a larger one makes the step steeper."""
    ax = ax or new_axes(5.2, 3.6)
    for i, w in enumerate(weights):
        _curve(ax, i, f"w = {w:g}", Dense([[w]], None, activation))
    return _finish(ax, "h_w(x)")


def bias_effect(
    biases: Sequence[float] = (-8.0, 0.0, 8.0),
    /,
    *,
    weight: float = 5.0,
    activation: Any = "sigmoid",
    ax: "Axes | None" = None,
) -> "Axes":
    """What a bias does: h_wb(x) = f(w x + b) for several biases and one weight; it moves the step to x = -b / w."""
    ax = ax or new_axes(5.2, 3.6)
    for i, b in enumerate(biases):
        _curve(ax, i, f"b = {b:g}", Dense([[weight]], [b], activation))
    return _finish(ax, "h_wb(x)")


def _curve(ax: "Axes", i: int, label: str, layer: Dense) -> None:
    y = feed_forward(GRID[:, None], [layer])[:, 0]
    ax.plot(GRID, y, color=COLOURS[i % len(COLOURS)], linestyle=LINES[i % len(LINES)], label=label)


def _finish(ax: "Axes", name: str) -> "Axes":
    ax.set_xlabel("x")
    ax.set_ylabel(name)
    ax.legend(loc="upper left")
    ax.grid(alpha=0.3)
    return ax


def _values(function: Function, x: np.ndarray = GRID) -> np.ndarray:
    if is_vector(function):
        pair = np.stack([x, np.zeros_like(x)], axis=-1)
        return feed_forward(pair, [Activation(function)])[:, 0]
    return feed_forward(x[:, None], [Activation(function)])[:, 0]
