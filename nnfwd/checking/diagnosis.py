"""What is wrong where something is outside: the smallest case, and the usual faults that would explain it."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from nnfwd.bounds import Arithmetic, Bounded, tensor_cores
from nnfwd.cases import rounded_network
from nnfwd.checking.places import Job, Place, WrongKindError
from nnfwd.checking.report import Failure
from nnfwd.explain import describe
from nnfwd.network import Network
from nnfwd.placement import rounded


def failure(place: Place, wrong: Sequence[Job]) -> Failure:
    """The smallest case that is outside: of few numbers, then of one row, then of few layers."""
    job = min(wrong, key=lambda job: job.x.size + describe(job.network)["parameters"])
    compiled = bool((place.ratio(job) <= 1).all())  # then it is the compiled network that is outside

    def outside(one: Job) -> bool:
        return not (place.ratio(one, compiled=compiled) <= 1).all()

    job = next(filter(outside, _rows(job)), job)
    job = next(filter(outside, _shorter(job, place)), job)
    ratio, bounded = place.ratio(job, compiled=compiled), job.bounded(place.arithmetic)
    index = tuple(int(i) for i in np.unravel_index(int(np.nan_to_num(ratio, nan=np.inf).argmax()), ratio.shape))
    likely = _likely(place, wrong[:20], compiled=compiled)
    try:
        computed = float(place.computed(job, compiled=compiled)[index])
    except WrongKindError as error:
        likely, computed = str(error), float("nan")
    return Failure(
        *(place.name, place.device, place.dtype, place.precision, job.source),
        network=job.network,
        x=job.x,
        index=index,
        computed=computed,
        exact=float(bounded.exact[index]),
        bound=float(bounded.error[index]),
        likely=f"{likely}{', when compiled' if compiled else ''}",
    )


def _rows(job: Job) -> Iterator[Job]:
    """The case with one row."""
    rows = job.x.reshape(-1, job.x.shape[-1])
    return (Job(job.source, job.network, row[None]) for row in itertools.islice(rows, 100))


def _shorter(job: Job, place: Place) -> Iterator[Job]:
    """The case with one layer, its input being what comes before, and with the first layers."""
    for n in range(len(job.network) if len(job.network) > 1 else 0):
        before = Job(job.source, job.network[:n], job.x).bounded(place.arithmetic).exact if n else job.x
        if before.ndim == job.x.ndim:  # else it is an ensemble's, which no layer takes
            yield Job(job.source, job.network[n : n + 1], rounded(before.astype("float64"), place.dtype))
    for n in range(2, len(job.network)):
        yield Job(job.source, job.network[:n], job.x)


def _likely(place: Place, jobs: Sequence[Job], *, compiled: bool) -> str:
    """The first of the usual faults that would explain the results of all these cases."""
    own = place.arithmetic
    try:
        results = [place.computed(job, compiled=compiled) for job in jobs]
    except WrongKindError as error:
        return str(error)

    def explained(bounded: Iterator[Bounded]) -> bool:
        return all((one.ratio(y) <= 1).all() for one, y in zip(bounded, results, strict=True))

    with np.errstate(all="ignore"):
        if explained(Job("", _turned(job.network), job.x).bounded(own) for job in jobs):
            return "a weight taken as (in, out)"
        looser = {"subnormal numbers flushed to 0": dataclasses.replace(own, flushes=True)}
        if place.dtype == "float32":
            for precision, operands in (("high", "TF32"), ("medium", "bfloat16")):
                text = f'products of {operands} numbers: ask for precision="{precision}", or switch them off'
                looser[text] = dataclasses.replace(own, flushes=True, **tensor_cores(place.dtype, precision))
        for text, arithmetic in looser.items():
            if explained(job.bounded(arithmetic) for job in jobs):
                return text
        for narrow in ("float32", "float16", "bfloat16"):
            less = Arithmetic(narrow, flushes=True)
            if less.u > own.u and explained(
                Job("", rounded_network(job.network, narrow), rounded(job.x, narrow)).bounded(less) for job in jobs
            ):
                return f"a computation narrowed to {narrow}"
    return "a fault in this library's or in nnfwd's pass: please report it"


def _turned(net: Network) -> Network:
    """The network with its square weights transposed."""
    parameters = net.parameters
    for layer in parameters:
        weight = layer.get("weight")
        if weight is not None and weight.shape[-1] == weight.shape[-2]:
            layer["weight"] = np.ascontiguousarray(np.swapaxes(weight, -1, -2))
    return net.with_parameters(parameters)
