"""`nnfwd.check`: every backend of this machine, held to the bound on the caller's data and on random networks."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nnfwd import backend as _backend
from nnfwd import placement
from nnfwd.bounds.rows import check_known
from nnfwd.cases import POOL, REGIMES, SPECIALS, Case, rounded_network
from nnfwd.checking.diagnosis import failure
from nnfwd.checking.places import Job, Place
from nnfwd.checking.report import HEADER, Failure, Report, Row
from nnfwd.errors import ArrayError, DeviceError, DtypeError, ShapeError
from nnfwd.layers import Layer
from nnfwd.network import Network
from nnfwd.placement import rounded

__all__ = ["DTYPES", "HEADER", "NETWORKS", "Failure", "Report", "Row", "check", "checked"]

DTYPES = ("float32", "float64", "float16", "bfloat16")
NETWORKS = 150
"""Networks drawn for each dtype; every fifteenth is run compiled as well."""


def check(
    net: Any = None,
    x: Any = None,
    /,
    *,
    backends: str | Sequence[str] = "all",
    dtypes: Any = DTYPES,
    precision: str = "highest",
) -> Report:
    """Runs every usable backend and device, and compares every output with the bound derived for that very input.

    150 networks are drawn at random for each dtype, always the same (ordinary, cancelling, tiny, huge and small-integer
    numbers; every activation). It takes less than a minute, most of it JAX compiling. JAX takes part in float64 where
    x64 is enabled (`nnfwd check` enables it).

    Args:
        net: a network, or a sequence of layers, to run besides, as `net(x)` and compiled; it has rows of its own.
        x: `(..., in)`, inputs for it: an array of any library, or nested lists; by default 64 standard normal rows.
        backends: names, or `"all"` for those that are usable here.
        dtypes: one or several to compute in; those that a backend has not are named in the report.
        precision: of matrix products, as in `feed_forward`.

    Returns:
        A `Report`: a row a backend, device and dtype, and the smallest case of each that is outside.

    Raises:
        ShapeError, DtypeError, ArrayError, UnknownNameError: for an x the network does not take, for unknown names.
        BackendError: for a backend that was named and is not usable here.
    """
    return Report.collected(checked(net, x, backends=backends, dtypes=dtypes, precision=precision))


def checked(net: Any, x: Any, *, backends: Any, dtypes: Any, precision: str) -> Iterator[Row | Failure | str]:
    """What `check` collects, one by one: rows, failures, and notes."""
    _backend.check_precision(precision)
    names = [placement.real_dtype(d, "dtypes") for d in (dtypes if isinstance(dtypes, list | tuple) else [dtypes])]
    given = _given(net, x)
    chosen = [backends] if isinstance(backends, str) and backends != "all" else backends
    if not names or not chosen:
        raise ShapeError("there is nothing to check: name at least one backend and one dtype")
    infos = _backend.backends(devices=True)
    if chosen != "all":
        for name in chosen:
            _backend.load(name)
        infos = tuple(info for info in infos if info.name in chosen)
    yield from (f"not run: {info.name}, {info.status}" for info in infos if not info.devices)
    for dtype in dict.fromkeys(names):
        jobs = {"random": _random(dtype)}
        if given is not None:
            jobs["data"] = [Job("data", rounded_network(given[0], dtype), rounded(given[1], dtype), compiled=True)]
            yield from _notes(given[1], jobs["data"][0].x, dtype)
        for place in (Place(i.name, i.version, device, dtype, precision) for i in infos for device in i.devices or ()):
            try:
                placement.probe(place.adapter, dtype, place.device)
            except (DtypeError, DeviceError) as error:
                yield f"not run: {place.name} {place.device} {dtype}, {error}"
                continue
            for source, some in jobs.items():
                row, wrong = place.row(source, some)
                yield row
                if wrong:
                    yield failure(place, wrong)


def _given(net: Any, x: Any) -> tuple[Network, np.ndarray] | None:
    if net is None:
        if x is not None:
            raise ShapeError("x needs a network to go through: check(net, x)")
        return None
    if not isinstance(net, Network):
        if not isinstance(net, list | tuple) or not all(isinstance(layer, Layer) for layer in net):
            raise ArrayError(f"net is a {type(net).__name__}: it must be a Network or a list of layers")
        net = Network(net)
    check_known(net)
    if x is None:
        x = np.random.default_rng(0).standard_normal((64, net.in_features or 8))
    x, _ = placement.accept(x, net.chain)
    if 0 in x.shape:
        raise ShapeError(f"x {tuple(x.shape)} has no rows: there is nothing to check")
    return net.to("numpy"), _backend.of(x).to_numpy(x).astype("float64")


def _notes(x: np.ndarray, narrow: np.ndarray, dtype: str) -> Iterator[str]:
    lost = int((np.isinf(narrow) & np.isfinite(x)).sum())
    if lost:
        yield f"{lost:,} of {x.size:,} numbers of x are beyond the largest {dtype}, and infinite there"
    if dtype == "float64" and not np.isfinite(x).all():
        yield f"{int((~np.isfinite(x)).sum()):,} of {x.size:,} numbers of x are NaN or infinite"


def _random(dtype: str) -> list[Job]:
    signatures = [signature for signature in POOL if 0 not in signature.lead]
    specials = ("none", "none", "none", *SPECIALS)
    jobs = []
    for i, signature, regime, special in zip(
        range(NETWORKS), itertools.cycle(signatures), itertools.cycle(REGIMES), itertools.cycle(specials), strict=False
    ):
        case = Case(signature, dtype, regime, special, seed=i)
        jobs.append(Job(regime, case.network, case.x, compiled=i % 15 == 0))
    return jobs
