"""What `nnfwd.check` found, as a table, as JSON, and in Python."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np

from nnfwd.explain import describe
from nnfwd.layers import mapped
from nnfwd.network import Network

_MANY = 10_000  # numbers of a network, beyond which JSON names it without them


@dataclass(frozen=True)
class Row:
    """One backend on one device in one dtype, on the random networks or on the caller's.

    Attributes:
        backend, version, device, dtype, precision: where and how it ran.
        source: `"random"`, or `"data"` for the caller's network and inputs.
        networks, rows, outputs: how many networks and inputs ran, and how many outputs were compared (those of a
            network that was run compiled as well count twice).
        worst: the largest |error| / bound; infinite for a wrong class, dtype or device.
        quartiles: of |error| / bound, over the outputs that may round and for which something is claimed.
        bound: the median bound, relative to the largest output of its row: what "inside" is worth.
        vacuous: the share of outputs whose bound is no smaller than the largest output of their row.
        unclaimed: the share of outputs that may overflow; networks of huge numbers, drawn on purpose, aside.
        ulp_exceeded: functions of the library less exact than the bound takes them for.
        verdict: `inside`, `OUTSIDE`, `ulp exceeded`, or `failed: ` and the library's own error.
    """

    backend: str
    version: str | None
    device: str
    dtype: str
    precision: str
    source: str
    networks: int
    rows: int
    outputs: int
    worst: float
    quartiles: tuple[float, float, float]
    bound: float
    vacuous: float
    unclaimed: float
    ulp_exceeded: tuple[str, ...]
    verdict: str

    @property
    def place(self) -> str:
        """Backend, device, dtype and, for the caller's network, `data`."""
        return f"{self.backend} {self.device} {self.dtype}{' data' if self.source == 'data' else ''}"

    def __str__(self) -> str:
        return (
            f"{f'{self.backend} {self.version}':22}{self.device:13}{self.dtype:9}{self.source:7}{self.networks:9}"
            f"{self.rows:10,}{self.outputs:11,}{self.worst:8.2f}{self.quartiles[1]:9.1e}{self.bound:9.1e}"
            f"{self.unclaimed:11.1%}  {self.verdict}"
        )


HEADER = (
    f"{'backend':22}{'device':13}{'dtype':9}{'source':7}{'networks':>9}{'rows':>10}{'outputs':>11}{'worst':>8}"
    f"{'median':>9}{'bound':>9}{'unclaimed':>11}  verdict"
)
_LEGEND = """worst, median: |error| / bound of the outputs that may round: inside is <= 1
bound: its median, relative to the largest output of the row
unclaimed: the share of outputs that may overflow (huge numbers, drawn on purpose, aside)"""


@dataclass(frozen=True)
class Failure:
    """The smallest case found that is outside its bound at a place.

    Attributes:
        backend, device, dtype, precision, source: as in `Row`, but source is the regime of a random network.
        network, x: what to run there; `index` is which element of the output.
        computed, exact, bound: of that element.
        likely: what may be wrong there.
    """

    backend: str
    device: str
    dtype: str
    precision: str
    source: str
    network: Network
    x: np.ndarray
    index: tuple[int, ...]
    computed: float
    exact: float
    bound: float
    likely: str

    def __str__(self) -> str:
        layers = ", ".join(map(repr, self.network))
        return (
            f"{self.backend} {self.device} {self.dtype} is outside: {layers}, x {self.x.shape}, element {self.index}: "
            f"computed {self.computed:.9g}, exact {self.exact:.9g} +- {self.bound:.2g} ({self.source}). "
            f"Likely {self.likely}."
        )


@dataclass(frozen=True)
class Report:
    """What `check` found; printed, it is a table.

    Attributes:
        rows: one for each place that ran.
        failures: the smallest case of each place that is outside.
        notes: what could not be run and why, and what to know of the caller's data.
    """

    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]

    @classmethod
    def collected(cls, found: Iterable[Row | Failure | str], show: Callable[[Row], None] | None = None) -> Self:
        """The report of what `checked` yields; `show` gets each row as it comes."""
        kinds: dict[type, list[Any]] = {Row: [], Failure: [], str: []}
        for one in found:
            kinds[type(one)].append(one)
            if show is not None and isinstance(one, Row):
                show(one)
        return cls(*(tuple(kinds[kind]) for kind in (Row, Failure, str)))

    @property
    def ok(self) -> bool:
        """Whether something ran, and everything that ran is inside, by functions as exact as the bound takes them."""
        return bool(self.rows) and all(row.verdict == "inside" for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it: numbers that are not finite are text."""
        return {
            "ok": self.ok,
            "rows": [_plain(asdict(row)) for row in self.rows],
            "failures": [_described(failure) for failure in self.failures],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return "\n".join([HEADER, *map(str, self.rows), self.summary])

    @property
    def summary(self) -> str:
        """What stands below the table: what is outside, what was not run, and the verdict."""
        lines = ["", *map(str, self.failures)]
        lines += [f"{row.place}: {text} (python -m nnfwd.ulp)" for row in self.rows for text in row.ulp_exceeded]
        lines += [
            f"{row.place}: for {row.vacuous:.0%} of the outputs the bound is as large as the outputs themselves: "
            "nothing is shown about these (choose a wider dtype)"
            for row in self.rows
            if row.source == "data" and row.vacuous > 0
        ]
        lines += [*self.notes, _LEGEND, self.verdict]
        return "\n".join(lines)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.rows:
            return "Nothing was checked."
        wrong = [f"{row.place} ({row.verdict.partition(':')[0]})" for row in self.rows if row.verdict != "inside"]
        if wrong:
            return f"NOT all right: {', '.join(wrong)}."
        places = len({(row.backend, row.device) for row in self.rows})
        outputs = sum(row.outputs for row in self.rows)
        return f"All {outputs:,} outputs at {places} place{'s' if places > 1 else ''} are inside their bounds."


def _described(failure: Failure) -> dict[str, Any]:
    values = {f.name: getattr(failure, f.name) for f in fields(failure)} | {"network": repr(failure.network)}
    parameters = [mapped(np.ndarray.tolist, layer) for layer in failure.network.parameters]
    if failure.x.size + describe(failure.network)["parameters"] < _MANY:
        values["parameters"] = parameters
    return _plain(values | {"x": failure.x.tolist()})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
