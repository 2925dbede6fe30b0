"""This run against an earlier one: what became slower, as a ratio.

Absolute times drift by a factor of two on a machine that others use too, so times are compared in units of the peer
that was fastest then or, where that one did not run in both, of matrix products at the rate of the same rounds.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nnfwd.benchmark.cases import PUBLISHED, Case, published
from nnfwd.benchmark.report import Report, Result, Timing, short
from nnfwd.errors import DataFileError

LIMIT = 1.25
"""How much slower, in those units, is a regression."""


@dataclass(frozen=True)
class Change:
    """One of our backends in one case, then and now.

    Attributes:
        case, rows, backend: what ran.
        unit: the peer, or `GEMM`, whose time is 1.
        then, now: our time in that unit.
    """

    case: str
    rows: int
    backend: str
    unit: str
    then: float
    now: float

    @property
    def ratio(self) -> float:
        """Now / then: above 1 it became slower."""
        return self.now / self.then

    def __str__(self) -> str:
        return (
            f"{short(self.case):15}{self.rows:>10,}  {self.backend:16}{self.unit:16}{self.then:>10.3g}{self.now:>10.3g}"
            f"{self.ratio:>10.2f}"
        )


HEADER = f"{'case':15}{'rows':>10}  {'nnfwd on':16}{'in units of':16}{'then':>10}{'now':>10}{'now/then':>10}"


@dataclass(frozen=True)
class Earlier:
    """A run whose JSON was kept."""

    path: Path
    machine: dict[str, Any]
    results: tuple[Result, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises `DataFileError` where the file is not what `nnfwd bench --json` prints."""
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["benchmark"] != "nnfwd":
                raise KeyError
            results = tuple(map(_result, kept["cases"]))
            return cls(path, {"threads": int(kept["machine"]["threads"]), **kept["machine"]}, results)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataFileError(f"{path} is not what `nnfwd bench --json` prints") from error

    @property
    def had_peers(self) -> bool:
        """Whether any ran."""
        return any(result.fastest is not None for result in self.results)

    def cases(self, rows: Sequence[int] | None = None) -> list[Case]:
        """The published cases it has, at its rows or at the given ones; those it took of a model are left out."""
        found = {(result.case, result.rows) for result in self.results if result.case in PUBLISHED}
        if not found:
            raise DataFileError(f"{self.path} has no published case: give the MODEL it was measured with")
        return [
            case
            for name in PUBLISHED
            if (own := [n for kept, n in sorted(found) if kept == name])
            for case in published([name], rows or own)
        ]

    def check(self, cases: Sequence[Case]) -> None:
        """Raises `DataFileError` where it has none of the cases: before any of them is measured."""
        if not {(case.name, case.rows) for case in cases} & {(result.case, result.rows) for result in self.results}:
            raise DataFileError(f"{self.path} has none of these cases at these rows: nothing can be compared")

    def changes(self, report: Report) -> Iterator[Change]:
        """Ours in every case of both runs. Raises `DataFileError` where a case is another network now."""
        kept = {(result.case, result.rows): result for result in self.results}
        for now in report.results:
            then = kept.get((now.case, now.rows))
            if then is None:
                continue
            for was, is_now in ((then.network, now.network), (then.dtype, now.dtype)):
                if was != is_now:
                    raise DataFileError(f"{self.path}: {now.case} was {was}, and is {is_now}")
            for own in now.ours:
                before = next((timing for timing in then.ours if timing.name == own.name), None)
                if before is not None:
                    best = then.fastest
                    unit = best.name if best is not None and best.name in own.relative else "GEMM"
                    yield Change(now.case, now.rows, own.name, unit, before.relative[unit], own.relative[unit])

    def notes(self, report: Report) -> Iterator[str]:
        """Where this run differs from the earlier one in more than time."""
        there, here = self.machine, report.machine
        for name in ("processor", "threads", "python", "blas"):
            if there.get(name) != here[name]:
                yield f"{name}: then {there.get(name)}, now {here[name]}"
        releases = there.get("versions", {})
        for name, version in here["versions"].items():
            if name in releases and releases[name] != version:
                yield f"{name}: then {releases[name]}, now {version}"
        have = {(result.case, result.rows) for result in report.results}
        gone = [f"{r.case} ({r.rows:,} rows)" for r in self.results if (r.case, r.rows) not in have]
        if gone:
            yield f"not measured again: {', '.join(gone)}"


def table(changes: Sequence[Change], notes: Sequence[str], path: Path, limit: float) -> str:
    """All changes, what else differs, and the verdict."""
    slower = [change for change in changes if change.ratio > limit]
    lines = ["", f"Against {path}", "", HEADER, *map(str, changes), *notes]
    lines += [f"SLOWER: {c.case}, {c.rows:,} rows, on {c.backend}: {c.ratio:.2f} of the time it took" for c in slower]
    lines += [] if slower else [f"Nothing takes more than {limit:g} of the time it took."]
    return "\n".join(lines)


def _result(kept: dict[str, Any]) -> Result:
    """What `Report.to_dict` made a dict of. Raises `KeyError`, `TypeError` or `ValueError` for anything else."""
    timings = tuple(map(_timing, kept["timings"]))
    names = {timing.name for timing in timings if timing.peer} | {"GEMM"}
    if any(set(timing.relative) != names for timing in timings if not timing.peer):
        raise ValueError
    values = {name: kind(kept[name]) for name, kind in _FIELDS.items()}
    _positive(values["gemm"])
    return Result(**values, timings=timings, failed=dict(kept["failed"]))


_FIELDS: dict[str, Any] = {
    "case": str,
    "rows": int,
    "network": str,
    "dtype": str,
    "flops": int,
    "rounds": int,
    "inner": int,
    "gemm": float,
}


def _timing(kept: dict[str, Any]) -> Timing:
    return Timing(
        name=str(kept["name"]),
        peer=bool(kept["peer"]),
        seconds=_quartiles(kept["seconds"]),
        ratio=None if kept["ratio"] is None else _quartiles(kept["ratio"]),
        error=float("inf") if kept["error"] is None else float(kept["error"]),
        verdict=str(kept["verdict"]),
        relative={str(unit): _positive(value) for unit, value in kept["relative"].items()},
    )


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


def _quartiles(values: Any) -> tuple[float, float, float]:
    low, middle, high = map(_positive, values)
    return low, middle, high
