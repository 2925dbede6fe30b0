"""What was measured: as a table, as JSON, and against an earlier JSON."""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Timing:
    """How one candidate did in one case.

    Attributes:
        name, peer: `"numpy"` and other backends of ours, or a peer.
        seconds: a call's, quartiles over the rounds; the middle one is the median.
        ratio: time / the fastest peer's of the same round, likewise; None where no peer ran.
        error: the largest |error| / bound of the rows compared; infinite for a result of another shape.
        verdict: `inside` or `OUTSIDE`; of a peer `agrees` or, beyond twice our bound, `differs`; `unchecked` where the
            bound is unknown.
        relative: of ours, the median of time / that of each peer, and of matrix products with as many operations
            (`GEMM`), in the same round: what a later run is compared in.
    """

    name: str
    peer: bool
    seconds: Quartiles
    ratio: Quartiles | None
    error: float
    verdict: str
    relative: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        seconds: Sequence[float],
        others: Mapping[str, Sequence[float]],
        products: Sequence[float],
        error: float,
        verdict: str,
    ) -> Self:
        """From the seconds of all rounds: its own, the peers' by name, and those of the matrix products."""
        fastest = [min(times) for times in zip(*others.values(), strict=True)]
        peer = name in others
        units = {} if peer else {**others, "GEMM": products}
        return cls(
            name,
            peer,
            _quartiles(seconds),
            _quartiles(_over(seconds, fastest)) if fastest else None,
            error,
            verdict,
            {unit: _quartiles(_over(seconds, times))[1] for unit, times in units.items()},
        )

    @property
    def median(self) -> float:
        """Seconds."""
        return self.seconds[1]


def _over(seconds: Sequence[float], unit: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(seconds, unit, strict=True)]


def _quartiles(values: Sequence[float]) -> Quartiles:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


@dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
        case, rows, network, dtype: what ran.
        flops: floating-point operations of a call, two a weight and row.
        rounds, inner: how often each candidate was timed, and calls in one such time.
        gemm: FLOP/s of NumPy's matrix product in the same rounds, the median.
        timings: ours first, then the peers'.
        failed: those of ours that raised, and what.
    """

    case: str
    rows: int
    network: str
    dtype: str
    flops: int
    rounds: int
    inner: int
    gemm: float
    timings: tuple[Timing, ...]
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> tuple[Timing, ...]:
        """Our own backends, NumPy first."""
        return tuple(timing for timing in self.timings if not timing.peer)

    @property
    def fastest(self) -> Timing | None:
        """The peer with the least median."""
        return min((timing for timing in self.timings if timing.peer), key=lambda t: t.median, default=None)

    @property
    def wrong(self) -> tuple[str, ...]:
        """What is not right with ours."""
        outside = (f"{t.name} OUTSIDE: {t.error:.3g} times its bound" for t in self.ours if t.verdict == "OUTSIDE")
        return (*outside, *(f"{name} {why}" for name, why in self.failed.items()))

    def rate(self, timing: Timing) -> float:
        """FLOP/s."""
        return self.flops / timing.median

    def share(self, timing: Timing) -> float:
        """Of the rate of NumPy's matrix product."""
        return self.rate(timing) / self.gemm

    def __str__(self) -> str:
        if not self.ours:
            return f"{short(self.case):15}{self.rows:>10,}  {'; '.join(self.wrong) or 'nothing ran'}"
        own, best = self.ours[0], self.fastest
        ratio = "-" if own.ratio is None else f"{own.ratio[1]:.2f}"
        peer = "-" if best is None else f"{shown_time(best.median)}  {best.name}"
        return (
            f"{short(self.case):15}{self.rows:>10,}{shown_time(own.median):>10}{ratio:>8}   {peer:26}"
            f"{self.rate(own) / 1e9:9.3g}{self.share(own):9.1%}  {'; '.join(self.wrong) or own.verdict}"
        )


HEADER = f"{'case':15}{'rows':>10}{'nnfwd':>10}{'ratio':>8}   {'fastest peer':26}{'GFLOP/s':>9}{'of GEMM':>9}  verdict"


@dataclass(frozen=True)
class Report:
    """All results; printed, it is a table.

    Attributes:
        machine: what ran it: `machine.machine`.
        results: one a case.
        notes: what could not be run and why.
    """

    machine: dict[str, Any]
    results: tuple[Result, ...]
    notes: tuple[str, ...]

    @classmethod
    def collected(
        cls,
        machine: dict[str, Any],
        found: Iterable[Result | str],
        show: Callable[[Result], None] = lambda result: None,
    ) -> Self:
        """The report of what `benchmarked` yields; `show` gets each result as it comes."""
        results, notes = [], []
        for one in found:
            if isinstance(one, str):
                notes.append(one)
            else:
                results.append(one)
                show(one)
        return cls(machine, tuple(results), tuple(dict.fromkeys(notes)))

    @property
    def ok(self) -> bool:
        """Whether something of ours ran in every case, and all of it is inside its bound."""
        return bool(self.results) and all(result.ours and not result.wrong for result in self.results)

    @property
    def geometric_mean(self) -> float | None:
        """Of the ratios of our first backend (NumPy) to the fastest peer."""
        ratios = [own.ratio[1] for result in self.results for own in result.ours[:1] if own.ratio is not None]
        return statistics.geometric_mean(ratios) if ratios else None

    @property
    def candidates(self) -> tuple[Timing, ...]:
        """Each candidate once, ours before the peers, in the order of the case that most of them ran."""
        results = sorted(self.results, key=lambda result: -len(result.timings))
        every = {timing.name: timing for result in results for timing in result.timings}
        return tuple(sorted(every.values(), key=lambda timing: timing.peer))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it: numbers that are not finite are null."""
        results = []
        for result in self.results:
            plain = asdict(result)
            for timing in plain["timings"]:
                timing["error"] = timing["error"] if math.isfinite(timing["error"]) else None
                timing["gflops"] = result.flops / timing["seconds"][1] / 1e9
                timing["of_gemm"] = result.flops / timing["seconds"][1] / result.gemm
            results.append(plain | {"fastest_peer": None if result.fastest is None else result.fastest.name})
        return {
            "benchmark": "nnfwd",
            "ok": self.ok,
            "machine": self.machine,
            "geometric_mean": self.geometric_mean,
            "cases": results,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return "\n".join([described_machine(self.machine), "", HEADER, *map(str, self.results), self.summary])

    @property
    def summary(self) -> str:
        """What stands below the table: every candidate's times and ratios, what differs, what was not run."""
        lines = [""]
        if len(self.candidates) > 1:
            lines += ["Median times", "", *self._matrix(lambda timing: shown_time(timing.median)), ""]
        if any(timing.peer for timing in self.candidates):
            lines += ["Ratios to the fastest peer of the same round, medians", "", *self._matrix(_ratio), ""]
        lines += [
            f"{result.case}, {result.rows:,} rows: {timing.name} differs by {timing.error:.3g} times our bound"
            for result in self.results
            for timing in result.timings
            if timing.verdict == "differs"
        ]
        lines += [*self.notes, ""] if self.notes else []
        lines += self._legend()
        return "\n".join(lines)

    def _matrix(self, cell: Callable[[Timing], str]) -> Iterator[str]:
        """A row a case, a column a candidate."""
        heads = [_head(timing.name) for timing in self.candidates]
        widths = [max(9, *(len(part) + 1 for part in head)) for head in heads]
        ours = sum(width for width, timing in zip(widths, self.candidates, strict=True) if not timing.peer)
        peers = any(timing.peer for timing in self.candidates)
        yield f"{'':25}{'nnfwd on':>{ours}}{' | peers' if peers else ''}"
        for line, start in enumerate((" " * 25, f"{'case':15}{'rows':>10}")):
            if line or any(head[0] for head in heads):
                yield start + "".join(f"{head[line]:>{width}}" for head, width in zip(heads, widths, strict=True))
        for result in self.results:
            found = {timing.name: cell(timing) for timing in result.timings}
            row = zip((found.get(timing.name, "-") for timing in self.candidates), widths, strict=True)
            yield f"{short(result.case):15}{result.rows:>10,}" + "".join(f"{text:>{width}}" for text, width in row)

    def _legend(self) -> Iterator[str]:
        ours = next((result.ours[0].name for result in self.results if result.ours), None)
        if ours is not None:
            yield f"nnfwd: compiled for {ours}; medians of {self.results[0].rounds} rounds, all candidates in turn"
        yield "of GEMM: the share of this machine's own rate of matrix products, in the same rounds"
        yield "verdict: some rows of the result are compared with their rounding-error bound before anything is timed"
        if self.geometric_mean is not None:
            yield "ratio: time / the fastest peer's of the same round; below 1 nnfwd is faster"
            yield f"geometric mean of the ratios: {self.geometric_mean:.2f}"


def _head(name: str) -> tuple[str, str]:
    """A name on two lines, the first empty where one is enough: `torch.` and `compile`."""
    first, cut, second = re.match(r"(.*?)([ .-]|$)(.*)", name).groups() if len(name) > 8 else ("", "", name)  # type: ignore[union-attr]
    return (f"{first}{cut}".rstrip(), second) if second else ("", name)


def _ratio(timing: Timing) -> str:
    return "-" if timing.ratio is None else f"{timing.ratio[1]:.2f}"


def short(name: str) -> str:
    """A name as the table has room for it."""
    return name if len(name) < 15 else f"{name[:7]}..{name[-5:]}"


def shown_time(seconds: float) -> str:
    """Three digits and a unit: `4.92 ms`."""
    unit, size = next((u for u in _UNITS if seconds >= u[1]), _UNITS[-1])
    value = seconds / size
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def described_machine(machine: dict[str, Any]) -> str:
    """One or two lines: what was measured on, and with which releases."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''} of {machine['cores']} cores"
    return f"{machine['processor']}, {threads}, Python {machine['python']}\n{versions}; {machine['blas']}"
