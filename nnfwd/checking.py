"""`nnfwd.check`: every backend of this machine, held to the bound on the caller's data and on random networks."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nnfwd import backend as _backend
from nnfwd import placement, ulp
from nnfwd.bounds import Arithmetic, Bounded, arithmetic_of, array_bound, looped_bound, tensor_cores
from nnfwd.cases import POOL, REGIMES, SPECIALS, Case
from nnfwd.errors import NnfwdError, ShapeError
from nnfwd.network import Network
from nnfwd.placement import dtype_name, rounded

DTYPES = ("float32", "float64", "float16", "bfloat16")
NETWORKS = 200
"""Networks drawn for each dtype."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One backend on one device in one dtype."""

    backend: str
    version: str | None
    device: str
    dtype: str
    precision: str
    networks: int
    """Networks run."""
    rows: int
    """Inputs run, over all networks."""
    elements: int
    """Outputs compared."""
    worst: float
    """Largest |error| / bound; infinite for a wrong class, dtype or device."""
    quartiles: tuple[float, float, float]
    """Of |error| / bound, over the outputs that could have rounded and for which something is claimed."""
    unclaimed: float
    """Share of elements for which overflow is possible, huge numbers drawn on purpose aside."""
    ulp_exceeded: tuple[str, ...]
    """Functions of the library found less exact than the bound takes them for."""
    verdict: str
    """`inside`, `OUTSIDE`, or `failed: ` and the library's own error."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """The smallest case found that is outside its bound at a place."""

    backend: str
    device: str
    dtype: str
    precision: str
    source: str
    """`data`, or the regime the network was drawn in."""
    network: Network
    x: np.ndarray
    index: tuple[int, ...]
    """Which element of the output."""
    computed: float
    exact: float
    bound: float
    likely: str
    """What may be wrong there."""

    def __str__(self) -> str:
        layers = ", ".join(map(repr, self.network))
        return (
            f"{self.backend} {self.device} {self.dtype} is outside: {layers}, x {self.x.shape}, element {self.index}: "
            f"computed {self.computed:.9g}, exact {self.exact:.9g} +- {self.bound:.2g} ({self.source}). "
            f"Likely {self.likely}."
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check` found; printed, it is a table."""

    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]
    not_run: tuple[str, ...]
    """What could not be run, and why."""

    @property
    def ok(self) -> bool:
        """Whether something ran, and everything that ran is inside."""
        return bool(self.rows) and all(row.verdict == "inside" for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it; infinite ratios are None."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        for row in rows:
            row["worst"] = row["worst"] if np.isfinite(row["worst"]) else None
        failures = [
            {f.name: getattr(failure, f.name) for f in dataclasses.fields(failure)}
            | {"network": repr(failure.network), "x": failure.x.tolist()}
            | {k: repr(getattr(failure, k)) for k in ("computed", "exact", "bound")}
            for failure in self.failures
        ]
        return {"ok": self.ok, "rows": rows, "failures": failures, "not_run": list(self.not_run)}

    def __str__(self) -> str:
        return "\n".join([HEADER, *map(line, self.rows), self.summary])

    @property
    def summary(self) -> str:
        """What stands below the table: what is outside, what was not run, and the verdict."""
        lines = ["", *map(str, self.failures)]
        lines += [
            f"{row.backend} {row.device} {row.dtype}: {text} (python -m nnfwd.ulp)"
            for row in self.rows
            for text in row.ulp_exceeded
        ]
        lines += [f"not run: {text}" for text in self.not_run]
        lines.append("worst, median: |error| / bound of the outputs that may round: inside is <= 1")
        lines.append("unclaimed: share of outputs that may overflow (huge numbers, drawn on purpose, aside)")
        elements = sum(row.elements for row in self.rows)
        places = len({(row.backend, row.device) for row in self.rows})
        outside = [row for row in self.rows if row.verdict != "inside"]
        if not self.rows:
            lines.append("Nothing was checked.")
        elif outside:
            lines.append(f"NOT all inside: {', '.join(f'{r.backend} {r.device} {r.dtype}' for r in outside)}.")
        else:
            lines.append(f"All {elements:,} outputs at {places} places are inside their bounds.")
        return "\n".join(lines)


HEADER = (
    f"{'backend':22}{'device':13}{'dtype':10}{'networks':>8}{'rows':>9}{'outputs':>10}{'worst':>8}{'median':>9}"
    f"{'unclaimed':>11}  verdict"
)


def line(row: Row) -> str:
    """A row as it is printed."""
    return (
        f"{f'{row.backend} {row.version}':22}{row.device:13}{row.dtype:10}{row.networks:8}{row.rows:9,}"
        f"{row.elements:10,}{row.worst:8.2f}{row.quartiles[1]:9.1e}{row.unclaimed:11.1%}  {row.verdict}"
    )


def check(
    net: Network | None = None,
    x: Any = None,
    /,
    *,
    backends: str | Sequence[str] = "all",
    dtypes: Sequence[Any] = DTYPES,
    precision: str = "highest",
) -> Report:
    """Runs every usable backend and device, and compares every output with the bound derived for that very input.

    Args:
        net: a network to run besides those that are drawn at random (ordinary, cancelling, tiny, huge and small-integer
            numbers; every activation). It is run as `net(x)` and compiled.
        x: `(..., in)`, inputs for it: an array of any library, or nested lists; by default 64 standard normal rows.
        backends: names, or `"all"` for those that are usable here.
        dtypes: to compute in; those that a backend has not are named in the report.
        precision: of matrix products, as in `feed_forward`.

    Returns:
        A `Report`: a row a backend, device and dtype, and the smallest case of each that is outside.

    Raises:
        ShapeError, DtypeError, ArrayError, UnknownNameError: for an x the network does not take, for unknown names.
        BackendError: for a backend that was named and is not usable here.
    """
    rows, failures, not_run = [], [], []
    for found in checked(net, x, backends=backends, dtypes=dtypes, precision=precision):
        if isinstance(found, str):
            not_run.append(found)
        else:
            rows.append(found[0])
            failures += [found[1]] if found[1] is not None else []
    return Report(tuple(rows), tuple(failures), tuple(not_run))


def checked(
    net: Network | None, x: Any, *, backends: str | Sequence[str], dtypes: Sequence[Any], precision: str
) -> Iterator[tuple[Row, Failure | None] | str]:
    """What `check` collects, one by one: a row and its failure, or a line about what was not run."""
    _backend.check_precision(precision)
    names = [placement.real_dtype(dtype, "dtypes") for dtype in dtypes]
    if net is None and x is not None:
        raise ShapeError("x needs a network to go through: check(net, x)")
    given = None if net is None else _given(net, x)
    if backends != "all":
        backends = [backends] if isinstance(backends, str) else list(backends)
        for name in backends:
            _backend.load(name)
    infos = [info for info in _backend.backends(devices=True) if backends == "all" or info.name in backends]
    yield from (f"{info.name}, {info.status}" for info in infos if not info.devices)
    for dtype in names:
        jobs = _jobs(dtype, given)
        for place in (_Place(i.name, i.version, device, dtype, precision) for i in infos for device in i.devices or ()):
            try:
                placement.probe(place.adapter, dtype, place.device)
                yield place.judge(jobs)
            except NnfwdError as error:  # there is no such dtype, or the library is set against the precision: it says
                yield f"{place.name} {place.device} {dtype}, {error}"


def _given(net: Network, x: Any) -> tuple[Network, np.ndarray]:
    if x is None:
        x = np.random.default_rng(0).standard_normal((64, net.in_features or 8))
    x, _ = placement.accept(x, net.chain)
    looped_bound(
        np.zeros((1, x.shape[-1])), _rounded(net, "float32"), arithmetic=Arithmetic("float32")
    )  # can be bounded
    if 0 in x.shape:
        raise ShapeError(f"x {tuple(x.shape)} has no rows: there is nothing to check")
    return net, _backend.of(x).to_numpy(x).astype("float64")


@dataclasses.dataclass
class _Job:
    """One network and input, their numbers being of the dtype, and the bounds by arithmetic."""

    source: str
    network: Network
    x: np.ndarray
    bounds: dict[str, Bounded] = dataclasses.field(default_factory=dict)

    def bounded(self, arithmetic: Arithmetic) -> Bounded:
        key = repr(arithmetic)
        if key not in self.bounds:
            self.bounds[key] = array_bound(self.x, self.network, arithmetic=arithmetic)
        return self.bounds[key]

    @property
    def size(self) -> int:
        return self.x.size + sum(a.size for layer in self.network.parameters for a in _arrays(layer))


def _arrays(parameters: dict[str, Any]) -> list[Any]:
    return [a for v in parameters.values() for a in (v.values() if isinstance(v, dict) else (v,))]


def _jobs(dtype: str, given: tuple[Network, np.ndarray] | None) -> list[_Job]:
    jobs = [] if given is None else [_Job("data", _rounded(given[0], dtype), rounded(given[1], dtype))]
    specials = ("none", "none", "none", *SPECIALS)
    for i, signature, regime, special in zip(
        range(NETWORKS), itertools.cycle(POOL), itertools.cycle(REGIMES), itertools.cycle(specials)
    ):
        case = Case(signature, dtype, regime, special, seed=i)
        if case.x.size:
            jobs.append(_Job(regime, case.network, case.x))
    return jobs


def _rounded(net: Network, dtype: str) -> Network:
    """The network with its arrays rounded to a dtype, as NumPy arrays."""

    def move(a: Any) -> Any:
        return {k: move(v) for k, v in a.items()} if isinstance(a, dict) else rounded(a, dtype)

    return net.to("numpy").with_parameters([move(layer) for layer in net.to("numpy").parameters])


class _Outside(Exception):  # noqa: N818
    """A result that is not even of the right library, device or dtype."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """One device of one backend, in one dtype."""

    name: str
    version: str | None
    device: str
    dtype: str
    precision: str

    @functools.cached_property
    def adapter(self) -> Any:
        return _backend.load(self.name)

    @functools.cached_property
    def arithmetic(self) -> Arithmetic:
        return arithmetic_of(self.adapter, self.dtype, precision=self.precision, device=self.device)

    def judge(self, jobs: Sequence[_Job]) -> tuple[Row, Failure | None]:
        ratios, wrong, verdict = [], [], "inside"
        done = elements = unclaimed = usual = 0
        exceeded: tuple[str, ...] = ()
        try:
            exceeded = self.ulp_exceeded()
        except Exception as error:  # see below
            verdict = _failed(error)
        for job in jobs:
            try:
                found = [self.ratio(job)]
                if job.source == "data":
                    found.append(self.ratio(job, compiled=True))
            except NnfwdError:
                raise
            except Exception as error:  # a library may fail in any way, and that is a finding
                verdict = _failed(error)
                continue
            done += 1
            bounded = job.bounded(self.arithmetic)
            for ratio in found:
                ratios.append(ratio[(bounded.error > 0) & ~bounded.unclaimed | (ratio > 0)])
                elements += ratio.size
            if job.source != "huge":
                usual += bounded.error.size
                unclaimed += int(bounded.unclaimed.sum())
            if max(ratio.max() for ratio in found) > 1:
                wrong.append(job)
        claimed = np.concatenate(ratios) if ratios else np.zeros(0)
        every = claimed if claimed.size else np.zeros(1)
        failure = self.failure(wrong) if wrong else None
        row = Row(
            backend=self.name,
            version=self.version,
            device=self.device,
            dtype=self.dtype,
            precision=self.precision,
            networks=done,
            rows=sum(job.x.size // job.x.shape[-1] for job in jobs),
            elements=elements,
            worst=float(every.max()),
            quartiles=tuple(float(q) for q in np.quantile(every, (0.25, 0.5, 0.75), method="nearest")),  # type: ignore[arg-type]
            unclaimed=unclaimed / max(usual, 1),
            ulp_exceeded=exceeded,
            verdict="OUTSIDE" if wrong else verdict,
        )
        return row, failure

    def ulp_exceeded(self) -> tuple[str, ...]:
        if hasattr(self.adapter, "apply"):  # its arithmetic is that of another place
            return ()
        found = ulp.exceeded(self.adapter, self.dtype, self.device)
        return tuple(f"{m.name} is {m.error:.1f} ulp off at {m.at:.9g}, its row is {m.row}" for m in found)

    def computed(self, job: _Job, *, compiled: bool = False) -> np.ndarray:
        """The output at this place, at home. Raises `_Outside` where it is of another library, device or dtype."""
        x = self.adapter.place(job.x, dtype=self.dtype, device=self.device)
        if compiled:
            run = job.network.compile(backend=self.name, device=self.device, dtype=self.dtype, precision=self.precision)
            y = run(x)
        else:
            y = job.network(x, precision=self.precision)
        if dtype_name(y.dtype) != self.dtype:
            raise _Outside(f"a result of {dtype_name(y.dtype)}, where {self.dtype} was asked for")
        if _backend.of(y) is not self.adapter or placement.device_of(y) != placement.device_of(x):
            raise _Outside("a result of another library or on another device than x")
        home: np.ndarray = self.adapter.to_numpy(y)
        return home

    def ratio(self, job: _Job, *, compiled: bool = False) -> np.ndarray:
        """|error| / bound for each element, infinite throughout where the result is of the wrong kind."""
        bounded = job.bounded(self.arithmetic)
        try:
            return bounded.ratio(self.computed(job, compiled=compiled))
        except _Outside:
            return np.full(bounded.error.shape, np.inf)

    def failure(self, wrong: Sequence[_Job]) -> Failure:
        """The smallest case that is outside, the caller's data first: of fewer rows, of fewer layers."""
        likely = self.likely(wrong[:20])
        job = min(wrong, key=lambda job: (job.source != "data", job.size))
        compiled = self.ratio(job).max() <= 1  # then it is the compiled network that is outside
        if not compiled:
            job = next((one for one in self.smaller(job) if self.ratio(one).max() > 1), job)
            job = next((one for one in self.shorter(job) if self.ratio(one).max() > 1), job)
        ratio, bounded = self.ratio(job, compiled=compiled), job.bounded(self.arithmetic)
        index = tuple(int(i) for i in np.unravel_index(int(ratio.argmax()), ratio.shape))
        try:
            computed = float(self.computed(job, compiled=compiled)[index])
        except _Outside as error:
            likely, computed = str(error), float("nan")
        if compiled:
            likely += ", in the compiled network alone"
        place = (self.name, self.device, self.dtype, self.precision, job.source)
        exact, bound = float(bounded.exact[index]), float(bounded.error[index])
        return Failure(*place, job.network, job.x, index, computed, exact, bound, likely)

    def smaller(self, job: _Job) -> Iterator[_Job]:
        """The case with one row."""
        rows = job.x.reshape(-1, job.x.shape[-1])
        return (_Job(job.source, job.network, rows[i : i + 1]) for i in range(min(len(rows), 1000)))

    def shorter(self, job: _Job) -> Iterator[_Job]:
        """The case with one layer, its input being what comes before, and with the first layers."""
        for n in range(len(job.network)):
            before = _Job(job.source, job.network[:n], job.x).bounded(self.arithmetic).exact if n else job.x
            if before.ndim == job.x.ndim:  # else it is an ensemble's, which no layer takes
                yield _Job(job.source, job.network[n : n + 1], rounded(before.astype("float64"), self.dtype))
        for n in range(1, len(job.network)):
            yield _Job(job.source, job.network[:n], job.x)

    def likely(self, jobs: Sequence[_Job]) -> str:
        """The first of the usual faults that would explain the results of all these cases."""
        own = self.arithmetic
        try:
            results = [self.computed(job, compiled=self.ratio(job).max() <= 1) for job in jobs]
        except _Outside as error:
            return str(error)

        def explained(bounded: Iterator[Bounded]) -> bool:
            return all(one.ratio(y).max() <= 1 for one, y in zip(bounded, results, strict=True))

        with np.errstate(all="ignore"):
            if explained(_Job("", _turned(job.network), job.x).bounded(own) for job in jobs):
                return "a weight taken as (in, out)"
            looser = {"subnormal numbers flushed to 0": dataclasses.replace(own, flushes=True)}
            if self.dtype == "float32":
                for precision, operands in (("high", "TF32"), ("medium", "bfloat16")):
                    text = f'products of {operands} numbers: ask for precision="{precision}", or switch them off'
                    looser[text] = dataclasses.replace(own, flushes=True, **tensor_cores(self.dtype, precision))
            for text, arithmetic in looser.items():
                if explained(job.bounded(arithmetic) for job in jobs):
                    return text
            for narrow in ("float32", "float16", "bfloat16"):
                less = Arithmetic(narrow, flushes=True)
                if less.u > own.u and explained(
                    _Job("", _rounded(job.network, narrow), rounded(job.x, narrow)).bounded(less) for job in jobs
                ):
                    return f"a computation narrowed to {narrow}"
        return "a function less exact than its row in the table of ulps, or a fault in this pass: please report it"


def _failed(error: Exception) -> str:
    return f"failed: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"


def _turned(net: Network) -> Network:
    """The network with its square weights transposed."""
    parameters = net.parameters
    for layer in parameters:
        weight = layer.get("weight")
        if weight is not None and weight.shape[-1] == weight.shape[-2]:
            layer["weight"] = np.ascontiguousarray(np.swapaxes(weight, -1, -2))
    return net.with_parameters(parameters)
