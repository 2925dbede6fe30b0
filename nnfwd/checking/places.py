"""Running networks at one device of one backend, and comparing what comes out with the bound."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nnfwd import backend as _backend
from nnfwd import placement, ulp
from nnfwd.bounds import Arithmetic, Bounded, arithmetic_of, array_bound
from nnfwd.checking.report import Row
from nnfwd.network import Network
from nnfwd.placement import dtype_name


class WrongKindError(Exception):
    """A result that is not even of the right library, device or dtype."""


@dataclass
class Job:
    """One network and input, their numbers being of the dtype, and the bounds by arithmetic."""

    source: str
    network: Network
    x: np.ndarray
    compiled: bool = False
    """Whether it is to be run compiled as well."""
    bounds: dict[str, Bounded] = field(default_factory=dict, repr=False)

    def bounded(self, arithmetic: Arithmetic) -> Bounded:
        """The bound in this arithmetic, computed once."""
        key = repr(arithmetic)
        if key not in self.bounds:
            self.bounds[key] = array_bound(self.x, self.network, arithmetic=arithmetic)
        return self.bounds[key]


@dataclass(frozen=True)
class Result:
    """|error| / bound of one job's outputs, plain and, where asked for, compiled."""

    job: Job
    bounded: Bounded
    ratios: tuple[np.ndarray, ...]

    @property
    def inside(self) -> bool:
        return all((ratio <= 1).all() for ratio in self.ratios)

    @property
    def relative(self) -> np.ndarray:
        """The bound relative to the largest output of its row."""
        size = abs(np.nan_to_num(self.bounded.exact.astype("float64"), posinf=0, neginf=0)).max(axis=-1, keepdims=True)
        with np.errstate(all="ignore"):
            return np.where(self.bounded.error == 0, 0.0, self.bounded.error / size)[~self.bounded.unclaimed]


@dataclass(frozen=True)
class Place:
    """One device of one backend, in one dtype and precision."""

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

    def computed(self, job: Job, *, compiled: bool = False) -> np.ndarray:
        """The output at this place, at home. Raises `WrongKindError`."""
        x = self.adapter.place(job.x, dtype=self.dtype, device=self.device)
        if compiled:
            where = {"backend": self.name, "device": self.device, "dtype": self.dtype}
            y = job.network.compile(**where, precision=self.precision)(x)
        else:
            y = job.network(x, precision=self.precision)
        if dtype_name(y.dtype) != self.dtype:
            raise WrongKindError(f"a result of {dtype_name(y.dtype)}, where {self.dtype} was asked for")
        if _backend.of(y) is not self.adapter or placement.device_of(y) != placement.device_of(x):
            raise WrongKindError("a result of another library or on another device than x")
        home: np.ndarray = self.adapter.to_numpy(y)
        return home

    def ratio(self, job: Job, *, compiled: bool = False) -> np.ndarray:
        """|error| / bound for each output, infinite throughout where the result is of the wrong kind."""
        bounded = job.bounded(self.arithmetic)
        try:
            return bounded.ratio(self.computed(job, compiled=compiled))
        except WrongKindError:
            return np.full(bounded.error.shape, np.inf)

    def run(self, job: Job) -> Result:
        """The job's result here."""
        ways = (False, True) if job.compiled else (False,)
        ratios = tuple(self.ratio(job, compiled=compiled) for compiled in ways)
        return Result(job, job.bounded(self.arithmetic), ratios)

    def row(self, source: str, jobs: Sequence[Job]) -> tuple[Row, list[Job]]:
        """All jobs' results as a row of the report, and the jobs that are outside."""
        results: list[Result] = []
        exceeded: tuple[str, ...] = ()
        failed = ""
        try:
            results = [self.run(job) for job in jobs]
            exceeded = self.ulp_exceeded() if source == "random" else ()
        except Exception as error:  # a library may fail in any way, and that is a finding
            failed = f"failed: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
        wrong = [result.job for result in results if not result.inside]
        may_round = [
            ratio[((r.bounded.error > 0) & ~r.bounded.unclaimed) | ~(ratio <= 0)] for r in results for ratio in r.ratios
        ]
        every = np.concatenate([*may_round, np.zeros(0)])
        usual = [result for result in results if result.job.source != "huge"]
        relative = np.concatenate([*(result.relative for result in usual), np.zeros(0)])
        low, middle, high = np.quantile(every, (0.25, 0.5, 0.75), method="nearest") if every.size else (0.0, 0.0, 0.0)
        row = Row(
            backend=self.name,
            version=self.version,
            device=self.device,
            dtype=self.dtype,
            precision=self.precision,
            source=source,
            networks=len(results),
            rows=sum(result.job.x.size // result.job.x.shape[-1] for result in results),
            outputs=sum(ratio.size for result in results for ratio in result.ratios),
            worst=float(every.max(initial=0.0)),
            quartiles=(float(low), float(middle), float(high)),
            bound=float(np.median(relative)) if relative.size else 0.0,
            vacuous=float(np.mean(relative >= 1)) if relative.size else 0.0,
            unclaimed=_share([result.bounded.unclaimed for result in usual]),
            ulp_exceeded=exceeded,
            verdict=failed or ("OUTSIDE" if wrong else "ulp exceeded" if exceeded else "inside"),
        )
        return row, wrong

    def ulp_exceeded(self) -> tuple[str, ...]:
        """The library's functions that are less exact than their rows in the table of ulps."""
        if hasattr(self.adapter, "computed"):  # its arithmetic is that of other places
            return ()
        found = ulp.exceeded(self.adapter, self.dtype, self.device)
        return tuple(f"{m.name} is {m.error:.1f} ulp off at {m.at:.9g}, its row is {m.row}" for m in found)


def _share(masks: Sequence[np.ndarray]) -> float:
    return sum(int(mask.sum()) for mask in masks) / max(sum(mask.size for mask in masks), 1)
