"""Measuring: every candidate of a case in one process, in turn, each held to the bound before it is timed.

Absolute times mean little on a machine that others use too, so what counts is the ratio to the fastest peer of the same
round, and the share of the rate at which this machine multiplies matrices in that round.

Threads of a pool spin for a while after a call (ONNX Runtime's 40 ms, OpenBLAS's 100 ms), and would take their core
from the next candidate, which then looks up to ten times slower than it is. So each measurement waits until the process
is quiet, and begins with calls that are not counted.
"""

import contextlib
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import threadpoolctl

from nnfwd import backend as _backend
from nnfwd.benchmark import peers
from nnfwd.benchmark.cases import Case
from nnfwd.benchmark.report import Result, Timing
from nnfwd.bounds import Arithmetic, Bounded, arithmetic_of, array_bound
from nnfwd.errors import ArrayError, BackendError, DtypeError, NnfwdError, ShapeError
from nnfwd.layers import Dense
from nnfwd.network import Network
from nnfwd.placement import dtype_name

ROUNDS = 15
CHECKED = 16
"""Rows of a case that are held to the bound, spread over all of them."""
SHORTEST = 5e-3
"""Seconds that a measurement lasts at least: shorter calls are repeated, all candidates' as often."""
WARM = 5e-3
"""Seconds of calls that are not counted, before each measurement."""
QUIET = 5e-3
"""Seconds in which the process must do nothing before a measurement: the threads of the candidate before are asleep."""
LONG = 0.1
"""Seconds of a call from which on none is made that is not counted: it would only take time."""
GEMM = 2048
"""Rows and columns of the matrices that tell the machine's own rate."""


@dataclass(frozen=True)
class Candidate:
    """A way of running a case, ready to be called."""

    name: str
    peer: bool
    call: Callable[[Any], Any]
    """It takes `argument`, and is done when it returns."""
    argument: Any
    home: Callable[[Any], np.ndarray]
    arithmetic: Arithmetic
    """How it rounds. Peers promise nothing, and are held to what NumPy's functions make possible."""


Tell = Callable[[str], None]


def benchmarked(
    cases: Sequence[Case],
    *,
    backends: str | Sequence[str] = "all",
    compare: bool = False,
    rounds: int = ROUNDS,
    threads: int,
    tell: Tell = lambda text: None,
) -> Iterator[Result | str]:
    """The result of each case, one by one, and notes on what could not be run.

    Args:
        cases: what to measure.
        backends: names, or `"all"` for those usable here; Dask is left out, whose blocks other backends run.
        compare: whether the peers that are installed run too.
        rounds: how often each candidate is timed.
        threads: of everyone. JAX goes by the cores it may run on, and PyTorch's setting is not taken back.
        tell: is told what is under way.
    """
    if rounds < 1:
        raise ShapeError(f"{rounds} rounds cannot be measured: give a positive number")
    if threads < 1:
        raise ShapeError(f"{threads} threads cannot compute: give a positive number")
    tell("importing the array libraries")
    chosen, notes = _usable(backends)
    yield from notes
    others = []
    if compare:
        others = [peer for peer in peers.PEERS if peer.installed]
        missing = {peer.distribution for peer in peers.PEERS if not peer.installed}
        if missing:
            yield f"peers that are not installed: pip install {' '.join(sorted(missing))}"
    for i, case in enumerate(cases):
        where = f"case {i + 1} of {len(cases)}, {case.name}, {case.rows:,} row{'s' if case.rows > 1 else ''}"
        yield from _Run(case, chosen, others, rounds, threads, lambda text, where=where: tell(f"{where}: {text}")).go()  # type: ignore[misc]


def _usable(backends: str | Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Backends and their devices, one of each kind; and what is to be said of the others."""
    named = None if backends == "all" else [backends] if isinstance(backends, str) else list(backends)
    found, notes = [], []
    for name in named or [info.name for info in _backend.backends() if info.version is not None]:
        try:
            adapter = _backend.load(name)
        except BackendError as error:
            if named is not None:
                raise
            notes.append(f"not run: {error}")
            continue
        if hasattr(adapter, "apply"):
            if named is not None:
                raise BackendError(f"{name} hands its blocks on to other backends: measure those")
            continue
        kinds = {device.partition(":")[0]: device for device in reversed(adapter.devices())}
        found += [(name, device) for device in kinds.values()]
    if not found:
        raise BackendError("there is nothing to measure: no backend is usable here")
    return sorted(found, key=lambda place: place[0] != "numpy"), notes


class _Run:
    """One case, from its weights to its result; what it builds is let go of at the end."""

    def __init__(
        self,
        case: Case,
        backends: Sequence[tuple[str, str]],
        others: Sequence[peers.Peer],
        rounds: int,
        threads: int,
        tell: Tell,
    ) -> None:
        self.case, self.backends, self.others = case, backends, others
        self.rounds, self.threads, self.tell = rounds, threads, tell
        self.notes: list[str] = []
        self.failed: dict[str, str] = {}
        self.bounds: dict[str, Bounded] = {}

    def go(self) -> Iterator[Result | str]:
        self.tell("making the network")
        self.net, self.x = self.case.build()
        self.dtype = dtype_name(self.x.dtype)
        self.rows = np.unique(np.linspace(0, len(self.x) - 1, CHECKED).astype(int))
        candidates = list(self.candidates())
        # Libraries load their own BLAS and OpenMP when they are imported, so this comes after.
        with threadpoolctl.threadpool_limits(limits=self.threads):
            checked = [(candidate, *self.check(candidate)) for candidate in candidates]
            running = [candidate for candidate, error, _ in checked if error is not None]
            seconds, rates, inner = self.timed(running)
        flops = (
            2 * sum(int(np.prod(layer.weight.shape)) for layer in self.net if isinstance(layer, Dense)) * len(self.x)
        )
        others = {candidate.name: seconds[candidate.name] for candidate in running if candidate.peer}
        products = [max(flops, 1) / rate for rate in rates]
        timings = [
            Timing.of(candidate.name, seconds[candidate.name], others, products, error, verdict)
            for candidate, error, verdict in checked
            if error is not None
        ]
        yield from self.notes
        yield Result(
            case=self.case.name,
            rows=self.case.rows,
            network=_described(self.net),
            dtype=self.dtype,
            flops=flops,
            rounds=self.rounds,
            inner=inner,
            gemm=float(np.median(rates)),
            timings=tuple(timings),
            failed=self.failed,
        )
        peers.release()
        gc.collect()

    def candidates(self) -> Iterator[Candidate]:
        """Ours and the peers, built; one that cannot be is a note, or a failure where it is ours."""
        for name, device in self.backends:
            self.tell(f"compiling for {name}")
            label = name if device.partition(":")[0] == "cpu" else f"{name} {device}"
            try:
                yield self.ours(name, device, label)
            except (DtypeError, BackendError) as error:
                self.notes.append(f"{self.case.name}: {label} is left out: {error}")
            except Exception as error:  # a library may fail in any way, and that is a finding
                self.failed[label] = f"failed: {_line(error)}"
        numpy = arithmetic_of(_backend.load("numpy"), self.dtype, precision="highest", device="cpu")
        for peer in self.others:
            self.tell(f"setting up {peer.name}")
            try:
                call, argument = peer.prepare(self.net, self.x, self.threads)
            except (peers.InexpressibleError, NnfwdError) as error:
                self.notes.append(f"{self.case.name}: {peer.name} is left out: {error}")
            except Exception as error:  # torch.compile finds no compiler, a release has another interface
                self.notes.append(f"{self.case.name}: {peer.name} is left out: it failed, {_line(error)}")
            else:
                yield Candidate(peer.name, True, call, argument, np.asarray, numpy)

    def ours(self, name: str, device: str, label: str) -> Candidate:
        adapter = _backend.load(name)
        options: dict[str, Any] = {"threads": self.threads} if name == "numpy" else {}
        if device != adapter.devices()[0]:  # a device that is named is looked at in every call
            options["device"] = device
        run = self.net.compile(backend=name, dtype=self.dtype, **options)
        argument = adapter.place(self.x, dtype=self.dtype, device=device)
        arithmetic = arithmetic_of(adapter, self.dtype, precision="highest", device=device)
        if isinstance(argument, np.ndarray):
            return Candidate(label, False, run, argument, np.asarray, arithmetic)
        if device.partition(":")[0] == "cpu":  # where reading a result waits for it, and is no copy
            return Candidate(label, False, lambda x: adapter.to_numpy(run(x)), argument, np.asarray, arithmetic)
        return Candidate(label, False, _to_completion(run, adapter), argument, adapter.to_numpy, arithmetic)

    def check(self, candidate: Candidate) -> tuple[float | None, str]:
        """The largest |error| / bound on some rows, and what to say of it. None where it does not run at all."""
        self.tell(f"checking {candidate.name}")
        try:
            y = candidate.home(candidate.call(candidate.argument))
        except Exception as error:  # as in `candidates`
            if not candidate.peer:
                self.failed[candidate.name] = f"failed: {_line(error)}"
            else:
                self.notes.append(f"{self.case.name}: {candidate.name} is left out: it failed, {_line(error)}")
            return None, ""
        try:
            bounded = self.bounded(candidate.arithmetic)
        except ArrayError as error:  # an activation of the caller's own
            self.say(f"{self.case.name}: nothing is checked, {error}")
            return 0.0, "unchecked"
        try:
            worst = float(bounded.ratio(np.asarray(y)[..., self.rows, :]).max(initial=0.0))
        except (ArrayError, IndexError):
            worst = math.inf
        if candidate.peer:
            return worst, "agrees" if worst <= 2 else "differs"
        return worst, "inside" if worst <= 1 and dtype_name(y.dtype) == self.dtype else "OUTSIDE"

    def say(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def bounded(self, arithmetic: Arithmetic) -> Bounded:
        """The bound of the rows that are compared, computed once for each arithmetic."""
        key = repr(arithmetic)
        if key not in self.bounds:
            self.bounds[key] = array_bound(self.x[self.rows], self.net, arithmetic=arithmetic)
        return self.bounds[key]

    def timed(self, candidates: Sequence[Candidate]) -> tuple[dict[str, list[float]], list[float], int]:
        """Seconds of a call in each round, the rate of matrix products (FLOP/s), and calls a measurement."""
        product, operations = peers.gemm(GEMM, "float32" if self.dtype == "float16" else self.dtype)  # BLAS has none
        seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
        rates = []
        with _no_collections():
            self.tell("warming up")
            alone = {candidate.name: _alone(candidate) for candidate in candidates}
            inner = math.ceil(SHORTEST / min(alone.values(), default=SHORTEST))
            for i in range(self.rounds):
                self.tell(f"round {i + 1} of {self.rounds}")
                for c in candidates:
                    _rest()
                    if alone[c.name] < LONG:
                        _seconds(c.call, c.argument, math.ceil(WARM / alone[c.name]))
                    seconds[c.name].append(_seconds(c.call, c.argument, inner))
                _rest()
                rates.append(operations / _seconds(lambda _: product(), None, 1))
        return seconds, rates, inner


def _rest() -> None:
    """Waits until no thread of the process is spinning, or half a second."""
    for _ in range(math.ceil(0.5 / QUIET)):
        before = time.process_time()
        time.sleep(QUIET)
        if time.process_time() - before < QUIET / 10:
            return


def _seconds(call: Callable[[Any], Any], argument: Any, times: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in itertools.repeat(None, times):
        call(argument)
    return (time.perf_counter() - start) / times


def _alone(candidate: Candidate) -> float:
    """Seconds of one call, roughly."""
    first = _seconds(candidate.call, candidate.argument, 1)
    return first if first > LONG else min(first, *(_seconds(candidate.call, candidate.argument, 1) for _ in range(3)))


def _to_completion(run: Callable[[Any], Any], adapter: _backend.Backend) -> Callable[[Any], Any]:
    """`run`, back when the result is there: one of its rows comes home, after all that was started before."""

    def call(x: Any) -> Any:
        y = run(x)
        adapter.to_numpy(y[..., :1, :])
        return y

    return call


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _described(net: Network) -> str:
    """`784-512-10 relu, softmax`"""
    widths = [net.in_features, *(layer.out_features for layer in net if layer.out_features is not None)]
    return f"{'-'.join(map(str, widths))} {', '.join(layer.activation.name for layer in net)}"


def _line(error: Exception) -> str:
    """`KeyError: 7`: the text alone may say nothing."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
