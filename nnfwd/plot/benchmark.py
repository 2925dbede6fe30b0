"""Times of a benchmark as bars, the fastest peer being 1."""

import math
from typing import TYPE_CHECKING

from nnfwd.benchmark.report import Report, Result, Timing
from nnfwd.plot.axes import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS = ("#0072b2", "#56b4e9", "#003f63", "#9fd3f2")
_PEERS = ("#d55e00", "#e69f00", "#cc79a7", "#009e73", "#777777", "#bdbdbd")
_MOST = 4.0
"""Longer bars are cut off here, and say how long they are."""


def benchmark(report: Report, /, *, ax: "Axes | None" = None) -> "Axes":
    """A group of bars a case, a bar a candidate: time / the fastest peer's of the same round.

    Where no peer ran, the bars are the share of the machine's own
    rate of matrix products instead.

    Args:
        report: what was measured.
        ax: where to draw; by default a new figure's.
    """
    candidates, results = report.candidates, report.results
    compared = any(timing.peer for timing in candidates)
    bars = max(len(candidates), 1)
    every = [v for r in results for c in candidates if (v := _value(r, c.name, compared)) is not None]
    most = min(_MOST, 1.05 * max(every, default=1.0)) if compared else math.inf
    ax = ax or new_axes(max(8.4, 1.2 + 0.085 * len(results) * (bars + 2)), 4.2)
    width = 0.86 / bars
    for i, candidate in enumerate(candidates):
        colours = _PEERS if candidate.peer else _OURS
        rank = sum(other.peer == candidate.peer for other in candidates[:i])
        found = {
            j: value
            for j, result in enumerate(results)
            if (value := _value(result, candidate.name, compared)) is not None
        }
        places = [j + (i + 0.5) * width - 0.43 for j in found]
        ax.bar(
            places,
            [min(value, most) for value in found.values()],
            width * 0.92,
            color=colours[rank % len(colours)],
            label=candidate.name if candidate.peer else f"nnfwd on {candidate.name}",
            zorder=2,
        )
        for place, value in zip(places, found.values(), strict=True):
            if value > most:
                ax.text(place, most * 1.01, f"{value:.3g}", rotation=90, ha="center", va="bottom", fontsize=6)
    if compared:
        ax.axhline(1, color="black", linewidth=1.2, zorder=3)
        ax.set_ylim(0, most)
        ax.set_ylabel("time / fastest peer (below 1 is faster)")
    else:
        ax.set_ylabel("share of this machine's rate of matrix products, %")
    ax.set_xticks(range(len(results)), [f"{r.case}\n{r.rows:,}" for r in results], fontsize=8)
    ax.set_xlim(-0.6, len(results) - 0.4)
    for j in range(1, len(results)):
        ax.axvline(j - 0.5, color="0.9", linewidth=0.8, zorder=0)
    ax.grid(axis="y", alpha=0.3, zorder=0)
    ax.set_axisbelow(True)
    ax.tick_params(axis="x", length=0)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if candidates:
        above = (0, 1.07 if compared else 1.02)
        ax.legend(fontsize=7.5, frameon=False, ncols=5, loc="lower left", bbox_to_anchor=above, borderaxespad=0)
    return ax


def _value(result: Result, name: str, compared: bool) -> float | None:
    """What a candidate's bar shows: the ratio, or the share in per cent."""
    timing: Timing | None = next((t for t in result.timings if t.name == name), None)
    if timing is None:
        return None
    if compared:
        return None if timing.ratio is None else timing.ratio[1]
    return 100 * result.share(timing)
