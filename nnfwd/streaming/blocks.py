"""Rows in blocks of one height, so that every row is always computed in the same place of a block of the same shape.

Row i is row i mod height of block i // height, and the last block is filled up: whatever reads the rows, on as many
workers as one likes, in however many tries, the same bytes come out. Each block is computed on one thread where the
backend lets one choose (NumPy), several blocks at a time.
"""

import collections
import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nnfwd import backend as _backend
from nnfwd import placement
from nnfwd.classes import labels
from nnfwd.errors import BackendError, ShapeError
from nnfwd.network import Network
from nnfwd.streaming.sinks import Layout
from nnfwd.streaming.sources import Source

_NUMBERS = 1 << 22  # of a block: its inputs, widest layer and outputs together
_HIGHEST = 1 << 16
_TOGETHER = 8  # blocks of a task that another process does
_BYTES = 16 << 20  # of the outputs of one


class Plan:
    """How a network makes blocks of outputs from a source. It travels to other processes.

    Raises:
        ShapeError, DtypeError, ArrayError, DeviceError, BackendError, UnknownNameError: as `feed_forward`, and for
            labels of a network without classes.
    """

    def __init__(
        self, net: Network, source: Source, *, backend: Any, device: Any, dtype: Any, precision: str, labelled: bool
    ) -> None:
        net.chain.check((*source.lead, source.width) if source.shape else ())
        if labelled and net.classes is None:
            raise ShapeError("the network holds no classes: leave labels (--labels) out")
        adapter = _backend.load(backend)
        self.backend = _backend.name_of(adapter)
        if hasattr(adapter, "apply"):
            raise BackendError(f"{self.backend} hands blocks on to other libraries: name one, such as numpy")
        if dtype is None and not source.states_dtype:
            dtype = net.dtype
        none = np.zeros((0, source.width), source.dtype)
        _, none, self.dtype = placement.arrive(none, net.chain, adapter, device=device, dtype=dtype)
        self.net, self.source, self._labelled = net, source, labelled
        self._width = source.width
        threads = {"threads": 1} if "threads" in _backend.compile_options(adapter) else {}
        self._run = net.compile(backend=backend, device=device, dtype=self.dtype, precision=precision, **threads)
        made = self._run(none)
        self.device = placement.device_name(adapter, made)
        home = adapter.to_numpy(made)
        if labelled:
            home = labels(net, home)
        members = () if net.chain.members is None else (net.chain.members,)
        self.layout = Layout(members, source.lead, () if labelled else home.shape[-1:], home.dtype)
        self.height = _height(net, source.width, made.shape[-1])
        given = placement.dtype_name(source.dtype)
        cast = given in placement.REAL and self.dtype != "bfloat16"  # otherwise the backend casts
        self._dtype = np.dtype(self.dtype if cast else given)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"source": self.source if self.source.travels else None}

    @property
    def adapter(self) -> _backend.Backend:
        """The backend, which is a module and does not travel."""
        return _backend.load(self.backend)

    @property
    def blocks(self) -> int:
        return -(-self.layout.rows // self.height)

    def block(self) -> "Block":
        """Memory for a block of inputs and outputs."""
        layout = self.layout
        x = np.ones((self.height, self._width), self._dtype)
        return Block(x, np.ones((*layout.members, self.height, *layout.tail), layout.dtype))

    def read(self, i: int, block: "Block", /) -> None:
        """Puts the inputs of block i where they belong."""
        start = i * self.height
        block.rows = n = min(self.height, self.layout.rows - start)
        with np.errstate(all="ignore"):  # as `placement.rounded`
            self.source.read_into(start, start + n, block.x[:n])
        block.x[n:] = block.x[n - 1]

    def rows(self, i: int) -> np.ndarray:
        """The inputs of block i as the source has them."""
        return self.source.read(i * self.height, min((i + 1) * self.height, self.layout.rows))

    def start(self, block: "Block", /) -> Any:
        """Begins with the outputs of a block; some libraries return before they are made."""
        return self._run(self.adapter.place(block.x, dtype="bfloat16") if self.dtype == "bfloat16" else block.x)

    def finish(self, block: "Block", y: Any, /) -> np.ndarray:
        """The outputs that were begun with, `(*members, rows, *tail)`; they are good until the block is used again."""
        y = self.adapter.to_numpy(y)[..., : block.rows, :]
        rows = (*(slice(None),) * len(self.layout.members), slice(block.rows))
        block.y[rows] = labels(self.net, y) if self._labelled else y
        return block.y[rows]

    def compute(self, block: "Block", /) -> np.ndarray:
        """The outputs of a block, as `finish`."""
        return self.finish(block, self.start(block))

    @property
    def is_threaded(self) -> bool:
        """Whether blocks are computed on threads of ours; other libraries have their own, or a GPU."""
        return hasattr(self.adapter, "threaded")

    def threaded(self, count: int) -> contextlib.AbstractContextManager[Any]:
        """A context around all computing, on so many threads."""
        context: Callable[[int], Any] = getattr(self.adapter, "threaded", contextlib.nullcontext)
        return context(count)

    def computed(self, first: int, last: int) -> np.ndarray:
        """The outputs of the blocks from `first` up to `last`, one after another."""
        block, found = self.block(), []
        with self.threaded(1):
            for i in range(first, last):
                self.read(i, block)
                found.append(self.compute(block).copy())
        return np.concatenate(found, axis=len(self.layout.members))

    def given(self, blocks: list[np.ndarray]) -> np.ndarray:
        """The outputs of blocks whose rows were read elsewhere."""
        block, found = self.block(), []
        with self.threaded(1):
            for x in blocks:
                block.rows = len(x)
                with np.errstate(all="ignore"):
                    block.x[: len(x)] = x
                block.x[len(x) :] = block.x[len(x) - 1]
                found.append(self.compute(block).copy())
        return np.concatenate(found, axis=len(self.layout.members))


@dataclass
class Block:
    """Memory for one block, which is used again and again."""

    x: np.ndarray
    """`(height, width)`"""
    y: np.ndarray
    """`(*members, height, *tail)`"""
    rows: int = 0
    """How many of them count."""


def _height(net: Network, width: int, out: int) -> int:
    """Rows of a block: a power of two, which the network decides alone."""
    members = net.chain.members or 1
    widest = max((layer.out_features or 0 for layer in net), default=0)
    height = min(max(_NUMBERS // (width + members * (widest + out)), 1), _HIGHEST)
    return 1 << (height.bit_length() - 1)


Outputs = Generator[tuple[int, np.ndarray], None, None]


class Executor(Protocol):
    """Where blocks may be computed instead of here: `concurrent.futures.Executor` and the like."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        """Something with `result()` and `cancel()`."""


def outputs(plan: Plan, first: int, *, workers: int, executor: Executor | None) -> Outputs:
    """The blocks from `first` on, in order: the row where one starts, and its outputs, good until the next one."""
    if executor is not None:
        return _elsewhere(plan, first, workers, executor)
    return _on_threads(plan, first, workers) if plan.is_threaded else _in_turn(plan, first)


def _on_threads(plan: Plan, first: int, workers: int) -> Outputs:
    """One thread reads, some compute, the caller writes. The blocks go round: no memory is taken on the way."""
    with _threads(1, "nnfwd-read") as reader, _threads(workers, "nnfwd-block") as pool:

        def compute(block: Block, read: Future[None]) -> np.ndarray:
            read.result()
            return plan.compute(block)

        free = [plan.block() for _ in range(workers + 2)]
        pending: collections.deque[tuple[int, Block, Future[np.ndarray]]] = collections.deque()
        for i in itertools.count(first):
            while free and i + len(pending) < plan.blocks:
                block, j = free.pop(), i + len(pending)
                pending.append((j, block, pool.submit(compute, block, reader.submit(plan.read, j, block))))
            if not pending:
                return
            _, block, outcome = pending.popleft()
            yield i * plan.height, outcome.result()
            free.append(block)


def _in_turn(plan: Plan, first: int) -> Outputs:
    """One thread reads; the caller, whose settings of the library hold, begins with a block before it ends the last."""
    with _threads(1, "nnfwd-read") as reader:
        free = [plan.block() for _ in range(4)]
        read: collections.deque[tuple[Block, Future[None]]] = collections.deque()
        begun: collections.deque[tuple[int, Block, Any]] = collections.deque()
        for i in itertools.count(first):
            while free and i + len(read) < plan.blocks:
                block, j = free.pop(), i + len(read)
                read.append((block, reader.submit(plan.read, j, block)))
            if read:
                block, outcome = read.popleft()
                outcome.result()
                begun.append((i, block, plan.start(block)))
            if len(begun) > 1 or not read:
                if not begun:
                    return
                ready, block, y = begun.popleft()
                yield ready * plan.height, plan.finish(block, y)
                free.append(block)


@contextlib.contextmanager
def _threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that drop what they have not begun with when the block ends."""
    pool = ThreadPoolExecutor(count, name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _elsewhere(plan: Plan, first: int, workers: int, executor: Executor) -> Outputs:
    """Other processes read blocks themselves, where they can, and compute them."""
    made = math.prod(plan.layout.members) * plan.layout.row_bytes * plan.height  # bytes of the outputs of one
    together = max(min(_TOGETHER, _BYTES // made), 1)

    def submit(i: int) -> tuple[int, Any]:
        last = min(i + together, plan.blocks)
        if plan.source.travels:
            return i * plan.height, executor.submit(Plan.computed, plan, i, last)
        return i * plan.height, executor.submit(Plan.given, plan, [plan.rows(j) for j in range(i, last)])

    pending: collections.deque[tuple[int, Any]] = collections.deque()
    left = iter(range(first, plan.blocks, together))
    try:
        pending.extend(map(submit, itertools.islice(left, 2 * workers)))
        while pending:
            start, outcome = pending.popleft()
            yield start, outcome.result()
            pending.extend(map(submit, itertools.islice(left, 1)))
    finally:
        for _, outcome in pending:
            outcome.cancel()
