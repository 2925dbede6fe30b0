"""A network as nodes and edges, with the numbers that flow through it."""

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from nnfwd.errors import ShapeError
from nnfwd.forward import trace
from nnfwd.layers import Dense, Layer, to_numpy
from nnfwd.network import Network
from nnfwd.plot.axes import NEGATIVE, POSITIVE, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 12  # nodes of a wide layer that are drawn, half at the top and half at the bottom
LABELLED = 24  # edges up to which each carries its weight


def network(net: Network, x: Any = None, /, *, ax: "Axes | None" = None) -> "Axes":
    """The layers from left to right: every weight an edge, coloured by sign and as wide as it is large.

    Args:
        net: a network, no ensemble, whose first layer has a width.
        x: one input `(in,)`. With it, every node shows its activation, as a number and as its fill.
        ax: where to draw; by default a new figure's.

    Returns:
        The Axes. Of a layer wider than 12 nodes the middle is left out, and the picture says so.

    Raises:
        ShapeError: for an ensemble, a network that takes any width, or an x that is not one input.
        BackendError: where matplotlib is not installed.
    """
    if net.in_features is None or net.chain.members is not None:
        raise ShapeError("a picture needs a single network of known width: give net[i:] from its first Dense layer on")
    columns = [_Column("input", net.in_features, None, None)]
    net = net.to("numpy")
    for i, layer in enumerate(net):
        name = "output" if i == len(net) - 1 else f"hidden {i + 1}"
        columns.append(_Column(name, layer.out_features or columns[-1].width, layer, None))
    if x is not None:
        t = trace(net, x)
        if len(t.x.shape) != 1:
            raise ShapeError(f"x {tuple(t.x.shape)} is not one input: it must be ({net.in_features},)")
        for column, values in zip(columns, (t.x, *t.h), strict=True):
            column.values = to_numpy(values).astype("float64")
    if ax is None:
        rows = max(len(column.shown) for column in columns)
        ax = new_axes(2.3 * len(columns) + 0.6, max(2.6, 0.62 * rows + 1.2))
    for position, column in enumerate(columns):
        column.x = float(position) * 2.6
    edges = sum(len(a.shown) * len(b.shown) for a, b in itertools.pairwise(columns))
    for left, right in itertools.pairwise(columns):
        _edges(ax, left, right, labelled=edges <= LABELLED)
    top = max(column.top for column in columns)
    for column in columns:
        _nodes(ax, column, top, last=column is columns[-1])
    ax.set_xlim(-1.0, columns[-1].x + (2.2 if x is not None else 1.0))
    ax.set_ylim(-top - 1.0, top + 1.5)
    ax.set_aspect("equal")
    ax.axis("off")
    return ax


class _Column:
    """One layer's nodes, and where they stand."""

    def __init__(self, name: str, width: int, layer: Layer | None, values: np.ndarray | None) -> None:
        self.name, self.width, self.layer, self.values, self.x = name, width, layer, values, 0.0
        half = SHOWN // 2
        self.shown = list(range(width)) if width <= SHOWN else [*range(half), *range(width - half, width)]
        slots = len(self.shown) + (1 if self.left_out else 0)
        self.top = (slots - 1) / 2
        self.y = [self.top - i - (1 if self.left_out and i >= half else 0) for i in range(len(self.shown))]

    @property
    def left_out(self) -> int:
        return self.width - len(self.shown)

    @property
    def bias(self) -> np.ndarray | None:
        layer = self.layer
        return to_numpy(layer.bias) if isinstance(layer, Dense) and layer.bias is not None else None


def _edges(ax: "Axes", left: _Column, right: _Column, *, labelled: bool) -> None:
    from matplotlib.collections import LineCollection

    layer = right.layer
    if isinstance(layer, Dense):
        weights = to_numpy(layer.weight).astype("float64")
        pairs = [(j, i) for j in range(len(left.shown)) for i in range(len(right.shown))]
        sizes = [float(weights[right.shown[i], left.shown[j]]) for j, i in pairs]
    else:  # element by element
        pairs = [(i, i) for i in range(len(right.shown))]
        sizes = [1.0] * len(pairs)
        labelled = False
    largest = max(map(abs, sizes)) or 1.0
    for sign, colour, style in ((1, POSITIVE, "-"), (-1, NEGATIVE, (0, (4, 2)))):
        some = [(pair, size) for pair, size in zip(pairs, sizes, strict=True) if (size < 0) == (sign < 0)]
        lines = [[(left.x, left.y[j]), (right.x, right.y[i])] for (j, i), _ in some]
        widths = [0.25 + 2.5 * abs(size) / largest for _, size in some]
        alphas = [0.25 + 0.6 * abs(size) / largest for _, size in some]
        if lines:
            ax.add_collection(
                LineCollection(lines, colors=colour, linewidths=widths, linestyles=[style], alpha=alphas, zorder=1)
            )
    if labelled:
        placed: list[tuple[float, float]] = []
        for (j, i), size in zip(pairs, sizes, strict=True):
            at = _free((left.x, left.y[j]), (right.x, right.y[i]), 0.3 + 0.2 * (i % 3), placed)
            placed.append(at)
            colour = POSITIVE if size >= 0 else NEGATIVE
            box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
            ax.text(*at, f"{size:.3g}", color=colour, fontsize=8, ha="center", va="center", bbox=box, zorder=2)


def _free(
    start: tuple[float, float], end: tuple[float, float], wish: float, placed: list[tuple[float, float]]
) -> tuple[float, float]:
    """Where on an edge a label stands clear of those placed: as near as can be to the share `wish` of its length."""
    best, best_gap = start, -1.0
    for share in sorted((0.2 + 0.025 * k for k in range(25)), key=lambda share: abs(share - wish)):
        at = (start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]))
        gap = min((max(abs(at[0] - x) / 0.52, abs(at[1] - y) / 0.26) for x, y in placed), default=9.0)
        if gap >= 1:
            return at
        if gap > best_gap:
            best, best_gap = at, gap
    return best


def _nodes(ax: "Axes", column: _Column, top: float, *, last: bool) -> None:
    from matplotlib.patches import Circle

    values = None if column.values is None else column.values[column.shown]
    shades = _shades(values)
    bias = column.bias
    for i, (node, y) in enumerate(zip(column.shown, column.y, strict=True)):
        fill = "white" if shades is None else str(1 - 0.85 * shades[i])
        ax.add_patch(Circle((column.x, y), 0.36, facecolor=fill, edgecolor="#333333", linewidth=1.2, zorder=3))
        if values is not None and last:
            ax.text(column.x + 0.5, y, f"{values[i]:.8g}", fontsize=9, ha="left", va="center", zorder=4)
        elif values is not None and shades is not None:
            ink = "white" if shades[i] > 0.55 else "black"
            text = _number(float(values[i]))
            size = 8.5 if len(text) < 7 else 7.2
            ax.text(column.x, y, text, fontsize=size, color=ink, ha="center", va="center", zorder=4)
        if bias is not None and len(column.shown) <= 6:
            text = f"b = {float(bias[node]):.3g}"
            ax.text(column.x, y - 0.41, text, fontsize=7, color="#555555", ha="center", va="top", zorder=4)
    if column.left_out:
        gap = (column.y[SHOWN // 2 - 1] + column.y[SHOWN // 2]) / 2
        ax.text(column.x, gap, f"{column.left_out} more", fontsize=8, color="#555555", ha="center", va="center")
    function = "" if column.layer is None else f"\n{column.layer.activation!r}"
    if column.layer is not None and not isinstance(column.layer, Dense):
        function = f"\n{column.layer!r}"
    ax.text(column.x, top + 0.62, f"{column.name}{function}", fontsize=9, ha="center", va="bottom")


def _shades(values: np.ndarray | None) -> np.ndarray | None:
    """Each value's darkness, from 0 to 1 within its layer."""
    if values is None:
        return None
    finite = values[np.isfinite(values)]
    low, high = (min(0.0, finite.min()), finite.max()) if finite.size else (0.0, 1.0)
    spread = high - low or 1.0
    return np.nan_to_num(np.clip((values - low) / spread, 0, 1))


def _number(value: float) -> str:
    if value == 0 or 1 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1 else f"{value:.0e}"


def node(x: Any, w: Any, b: float = 0.0, /, *, activation: Any = "sigmoid", ax: "Axes | None" = None) -> "Axes":
    """One node: its inputs on weighted edges, their sum z, the activation and the output h, with the numbers.

    Args:
        x: the inputs `(in,)`.
        w: their weights `(in,)`.
        b: the bias.
        activation: a name, an `activations.Function` or a callable `f(x, /, *, xp)`.
        ax: where to draw; by default a new figure's.

    Raises:
        ShapeError: where x and w differ in length.
    """
    from matplotlib.patches import Circle, FancyArrowPatch

    net = Network([Dense([list(w)], [b], activation)])
    t = trace(net, list(x))
    z, h = float(t.z[0][0]), float(t.y[0])
    inputs, weights = [float(v) for v in x], [float(v) for v in w]
    n = len(inputs)
    ax = ax or new_axes(7.4, max(2.6, 0.75 * (n + 1) + 0.8))
    slots = [(n / 2 - i) for i in range(n + 1)]  # the inputs, and below them the 1 that carries the bias
    largest = max(*map(abs, weights), abs(b)) or 1.0
    for i, y in enumerate(slots):
        bias = i == n
        size = b if bias else weights[i]
        colour = POSITIVE if size >= 0 else NEGATIVE
        style = "-" if size >= 0 else (0, (4, 2))
        ax.plot([0.4, 3.0], [y, 0], color=colour, linestyle=style, linewidth=0.8 + 2.5 * abs(size) / largest, zorder=1)
        at = (0.4 + 0.42 * 2.6, y * (1 - 0.42))
        box = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}
        label = f"b = {b:.4g}" if bias else f"w = {size:.4g}"
        ax.text(*at, label, color=colour, fontsize=9, ha="center", va="center", bbox=box, zorder=2)
        edge = "#888888" if bias else "#333333"
        ax.add_patch(Circle((0, y), 0.38, facecolor="white", edgecolor=edge, linewidth=1.2, zorder=3))
        ax.text(0, y, "1" if bias else f"{inputs[i]:.4g}", fontsize=10, ha="center", va="center", zorder=4)
        ax.text(-0.55, y, "" if bias else f"x{_small_digits(i + 1)}", fontsize=9, ha="right", va="center")
    ax.add_patch(Circle((3.5, 0), 0.62, facecolor="#f2f2f2", edgecolor="#333333", linewidth=1.4, zorder=3))
    ax.text(3.5, 0, "Σ", fontsize=17, ha="center", va="center", zorder=4)
    ax.text(3.5, -0.78, f"z = {z:.8g}", fontsize=10, ha="center", va="top")
    ax.add_patch(Circle((5.9, 0), 0.62, facecolor="#f2f2f2", edgecolor="#333333", linewidth=1.4, zorder=3))
    ax.text(5.9, 0, "f", fontsize=15, style="italic", ha="center", va="center", zorder=4)
    ax.text(5.9, -0.78, repr(net[0].activation), fontsize=10, ha="center", va="top")
    for start, end in ((4.12, 5.28), (6.52, 7.4)):
        ax.add_patch(FancyArrowPatch((start, 0), (end, 0), arrowstyle="-|>", mutation_scale=14, color="#333333"))
    ax.text(7.5, 0, f"h = {h:.8g}", fontsize=11, ha="left", va="center", weight="bold")
    ax.set_xlim(-1.1, 9.4)
    ax.set_ylim(min(slots[-1] - 0.6, -1.3), max(slots[0] + 0.6, 1.0))
    ax.set_aspect("equal")
    ax.axis("off")
    return ax


def _small_digits(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
