"""How near its bound every backend comes, as `nnfwd.check` found it."""

import math
from typing import TYPE_CHECKING

from nnfwd.checking import Report
from nnfwd.plot.axes import COLOURS, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAST, _MOST = 1e-6, 1e3
"""Ratios beyond these are drawn here: below, most results are exact."""


def agreement(report: Report, /, *, ax: "Axes | None" = None) -> "Axes":
    """|error| / bound at each place and dtype: a bar from the first to the third quartile, the median, the worst.

    Args:
        report: what `nnfwd.check` returned.
        ax: where to draw; by default a new figure's.
    """
    rows = report.rows
    ax = ax or new_axes(7.2, 1.3 + 0.27 * max(len(rows), 1))
    for i, row in enumerate(rows):
        low, middle, high, worst = (min(max(v, _LEAST), _MOST) for v in (*row.quartiles, row.worst))
        inside = row.verdict == "inside"
        colour = COLOURS[0] if inside else COLOURS[1]
        ax.plot([_LEAST, worst], [i, i], color="0.85", linewidth=1, zorder=1)
        ax.plot([low, high], [i, i], color=colour, linewidth=7, alpha=0.45, solid_capstyle="butt", zorder=2)
        ax.plot(middle, i, marker="|", color=colour, markersize=11, markeredgewidth=2, zorder=3)
        mark = "o" if inside else ">" if math.isinf(row.worst) else "X"
        ax.plot(worst, i, marker=mark, color=colour, markersize=6 if inside else 8, zorder=3, clip_on=False)
        if not inside:
            text = row.verdict.partition(":")[0]
            ax.text(1.02, i, text, transform=ax.get_yaxis_transform(), va="center", color=colour)
    ax.axvline(1, color="black", linewidth=1.2)
    ax.set_title("the bound is 1; inside is left of it", fontsize="medium", loc="left")
    ax.set_xscale("log")
    ax.set_xlim(_LEAST, _MOST if any(row.worst > 1 for row in rows) else 10)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_yticks(range(len(rows)), [row.place for row in rows])
    ax.set_xlabel("|error| / bound: quartiles (bar), median (line), worst (dot)")
    ax.grid(axis="x", alpha=0.3)
    return ax
