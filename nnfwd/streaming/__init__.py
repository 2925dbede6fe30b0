"""Arrays larger than memory, file to file: `stream`."""

import contextlib
import functools
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import nnfwd
from nnfwd import backend as _backend
from nnfwd.errors import ArrayError, BackendError, DataFileError, NnfwdError, ShapeError
from nnfwd.layers import leaves, to_numpy
from nnfwd.network import Network
from nnfwd.streaming import sinks, sources
from nnfwd.streaming.blocks import Executor, Outputs, Plan, outputs
from nnfwd.streaming.journal import Journal, names

_PAUSE = 1.0  # seconds between two looks to the disk, at the least
_SHARE = 9  # and so many times what the last one took: a slow disk is waited for a tenth of the time at most


@dataclass(frozen=True)
class Streamed:
    """What `stream` did."""

    source_shape: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the output."""
    dtype: np.dtype
    kept: int
    """Rows that were there already, from a run that was interrupted."""


def stream(
    net: Network,
    source: Any,
    sink: Any,
    /,
    *,
    backend: Any = "numpy",
    device: Any = None,
    dtype: Any = None,
    precision: str = "highest",
    labels: bool = False,
    workers: int | None = None,
    executor: Executor | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Streamed:
    """Runs a network from file to file in constant memory, and leaves a complete output or none.

    The bytes of the output do not depend on `workers`, on how the source is cut into files or chunks, or on how often
    the run was interrupted: rows are computed in blocks of one height, which the network decides (see `blocks.py`).

    Args:
        net: the network. An activation of your own that mixes rows sees a block of them.
        source: x `(..., in)`: the path of a `.npy`, `.npz` (held in memory whole), `.csv` or `.zarr`, or of a folder of
            `.npy` files, 2.npy before 10.npy; or an array that is read by slices (NumPy's, Zarr's, HDF5's).
            `(..., *net.input_shape)` too.
        sink: the path of the same kinds, by its extension (a folder has none), or an array to assign to, which an
            interruption leaves half-written.
        backend, device, dtype, precision: as `Network.compile`; of text, which has no dtype, the network's.
        labels: writes the class of each row instead of its outputs.
        workers: blocks that are computed at a time; by default one a processor on a CPU.
        executor: computes blocks in other processes: a `concurrent.futures.Executor`, such as that of a Dask client,
            `client.get_executor()`. They read a source that is a path themselves, and send their outputs here.
        resume: goes on with what an interrupted run has left, if it has; its last block is made again and compared.
        force: replaces the sink, or what an interrupted run has left.
        progress: called with the number of rows done and that of all.

    Raises:
        DataFileError: where files are damaged, in the way, of unknown formats or changed meanwhile; where the disk is
            full (what is done is kept, for `resume`); where a resumed run is not the one that was begun.
        ShapeError, DtypeError, ArrayError, DeviceError, BackendError, UnknownNameError: as `feed_forward`.
    """
    if not isinstance(net, Network):
        raise ArrayError(f"net is a {type(net).__name__}: it must be a Network, as nnfwd.load gives one")
    if not callable(progress or print):
        raise ArrayError(f"progress is a {type(progress).__name__}: it must be a function of two numbers")
    if executor is not None and not hasattr(executor, "submit"):
        raise BackendError(
            f"executor is a {type(executor).__name__}: it must have submit(), as concurrent.futures' have"
        )
    rows = sources.opened(source)
    folded = net.input_shape and rows.shape[-len(net.input_shape) :] == net.input_shape
    rows.fold(len(net.input_shape) if folded and net.input_shape else min(len(rows.shape), 1))
    plan = Plan(net, rows, backend=backend, device=device, dtype=dtype, precision=precision, labelled=labels)
    if workers is None:
        workers = getattr(executor, "threads", None) or _backend.usable_cores()
    if not isinstance(workers, int) or workers < 1:
        raise ShapeError(f"workers is {workers}: it must be a whole number, at least 1")
    blocks = functools.partial(outputs, plan, workers=workers, executor=executor)
    tell = progress or (lambda done, total: None)
    kept = 0
    with plan.threaded(workers):
        if isinstance(sink, str | os.PathLike):
            facts = _facts(plan, precision)
            kept = _to_file(plan, blocks, Path(sink).resolve(), facts, tell, resume=resume, force=force)
        elif resume:
            raise DataFileError("resume goes on with a file: a sink that is an array has no journal")
        else:
            target = sinks.Target(sink, plan.layout)
            if isinstance(source, np.ndarray) and isinstance(sink, np.ndarray) and np.may_share_memory(source, sink):
                raise ArrayError("the sink shares memory with the source: give another array")
            _Writing(plan, target, None)(blocks, tell)
    return Streamed(rows.shape, plan.layout.shape, plan.layout.dtype, kept)


Blocks = Callable[[int], Outputs]
Progress = Callable[[int, int], object]


def _to_file(
    plan: Plan, blocks: Blocks, path: Path, facts: dict[str, Any], tell: Progress, *, resume: bool, force: bool
) -> int:
    """Writes a file or a folder; gives the number of rows that were there already."""
    _check_name(path, plan.source)
    partial = names(path)[1]
    sink = sinks.sink(partial, path, plan.layout, plan.source.parts, plan.height)
    if force and path.is_dir():
        _check_replaced(path, sink)
    if resume and not plan.source.is_known:
        raise DataFileError("resume goes on with a file: an array as the source may be another one by now")
    if not (resume and partial.exists()):
        sinks.check_room(path, partial, plan.layout)
    with contextlib.closing(Journal(path, facts, resume=resume, force=force)) as journal:
        kept = plan.layout.rows if journal.complete else journal.rows
        if not journal.complete:
            writing = _Writing(plan, sink, journal)
            try:
                with contextlib.closing(sink):
                    writing(blocks, tell)
                journal.finish()
            except BaseException as error:
                # What a fresh run has made of an input that is to be mended is worth nothing.
                if not journal.rows or (not kept and isinstance(error, ShapeError | sources.InputFileError)):
                    journal.discard()
                raise
        return kept


class _Writing:
    """Writes what is left of an output to its sink, and keeps its journal, if it has one."""

    def __init__(self, plan: Plan, sink: sinks.Sink, journal: Journal | None) -> None:
        self._plan, self._sink = plan, sink
        self._journal = journal if sink.keeps and plan.source.is_known else None
        self._first = 0 if journal is None else journal.rows
        self._output = "the sink" if journal is None else str(journal.output)
        self._sound = True  # whether all that the sink was told to do was done

    def __call__(self, blocks: Blocks, tell: Progress) -> None:
        plan = self._plan
        try:
            with self._told():
                self._begin()
            tell(self._first, plan.layout.rows)
            self._blocks(blocks, tell)
            if not plan.source.is_at_rest():
                raise sources.changed(plan.source.name)
            self._keep()
            with self._told():
                self._sink.finish()
        except BaseException as error:
            self._stopped(error)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Around what the sink and the journal do. After a failure there, nothing more is said to be on the disk."""
        self._sound = False
        yield
        self._sound = True

    def _begin(self) -> None:
        """Makes what is written to, or opens what an interrupted run has left, if that is what it should be."""
        plan, journal = self._plan, self._journal
        if journal is None or not journal.rows:
            self._sink.begin()
            return
        self._sink.resume(journal.rows, journal.state)
        i = (journal.rows - 1) // plan.height
        block = plan.block()
        plan.read(i, block)
        y = plan.compute(block)
        chosen = (*(slice(None),) * len(plan.layout.members), slice(0, journal.rows - i * plan.height))
        if not self._sink.holds(i * plan.height, y[chosen]):
            raise DataFileError(
                f"{journal.partial}: its last rows are computed otherwise here: resume where it was begun "
                "(processor, threads, libraries), or begin anew with force (--force)"
            )

    def _blocks(self, blocks: Blocks, tell: Progress) -> None:
        plan, total = self._plan, self._plan.layout.rows
        pause, last = _PAUSE, time.monotonic()
        first = plan.blocks if self._first == total else self._first // plan.height
        with contextlib.closing(blocks(first)) as made:
            for start, y in made:
                with self._told():
                    self._sink.write(start, y)
                tell(start + y.shape[len(plan.layout.members)], total)
                if (now := time.monotonic()) - last > pause:
                    self._keep()
                    last = time.monotonic()
                    pause = max(_PAUSE, _SHARE * (last - now))

    def _keep(self) -> None:
        """Notes what is on the disk."""
        if self._journal is not None:
            with self._told():
                rows = self._sink.flush()
                self._journal.note(rows, self._sink.state())

    def _stopped(self, error: BaseException) -> NoReturn:
        """Raises the error of a run that ended too soon, saying what is left of it."""
        plan, journal = self._plan, self._journal
        if isinstance(error, NnfwdError | OSError) and self._sound and not plan.source.is_at_rest():
            raise sources.changed(plan.source.name) from error
        if isinstance(error, DataFileError | ShapeError):
            raise error
        where = plan.source.name if self._sound else self._output
        if self._sound:
            try:
                self._keep()
            except OSError as full:  # what was noted before holds
                error.add_note(f"after it: {full}")
        left = "nothing was written"
        if journal is not None and journal.rows:
            left = f"{journal.rows:,} of {plan.layout.rows:,} rows are kept in {journal.partial}"
            left += ": go on with resume (--resume)"
        if isinstance(error, OSError):
            raise DataFileError(f"{where}: {error.strerror or error}; {left}") from error
        error.add_note(left)
        raise error


def _check_name(path: Path, source: sources.Source) -> None:
    """Raises `DataFileError` where an output may not have this name."""
    folder = not path.suffix
    if path.name.startswith("-"):
        raise DataFileError(f"{path.name} is no name for an output: a run writes files, give one such as y.npy")
    if not folder and path.suffix.lower() not in sinks.WRITTEN:
        raise DataFileError(
            f"{path}: no format {path.suffix} here: use {', '.join(sinks.WRITTEN)}, or no extension for a folder"
        )
    if not path.parent.is_dir():
        raise DataFileError(f"{path}: the folder {path.parent} does not exist")
    for here, file in itertools.product(names(path), (file.resolve() for file in source.files)):
        if here == file or here.is_relative_to(file) or file.is_relative_to(here):
            raise DataFileError(f"{here} is read from: choose another name for the output")
    if path.exists() and path.is_dir() != (folder or path.suffix.lower() == ".zarr"):
        raise DataFileError(f"{path} is a {'folder' if path.is_dir() else 'file'}: choose another name")


def _check_replaced(path: Path, sink: sinks.Sink) -> None:
    """Raises `DataFileError` where a folder holds what an output of this kind would not."""
    for entry in sorted(path.iterdir()):
        group = entry.name == "zarr.json" and b'"node_type": "array"' not in entry.read_bytes()
        if entry.name not in sink.entries or group or entry.is_dir() != (entry.name == "c"):
            raise DataFileError(f"{path} holds {entry.name}, which this run would not make: choose another name")


def _facts(plan: Plan, precision: str) -> dict[str, Any]:
    """What makes two runs the same."""
    source, layout = plan.source, plan.layout
    return {
        "nnfwd": nnfwd.__version__,
        "network": _digest(plan.net),
        "input": f"{Path(source.name).name}, {source.shape} {source.dtype}, {source.fingerprint}",
        "output": f"{layout.shape} {layout.dtype}",
        "backend": f"{plan.backend} {_backend.version(plan.backend)}",
        "NumPy": np.__version__,
        "device": plan.device,
        "dtype": plan.dtype,
        "precision": precision,
        "block": plan.height,
    }


def _digest(net: Network) -> str:
    """One number for the contents of a network."""
    digest = hashlib.sha256(repr(net.classes).encode())
    for layer in net:
        digest.update(repr((type(layer).__name__, layer.activation.name, layer.scalars)).encode())
        for a in map(to_numpy, leaves(layer.parameters)):
            digest.update(f"{a.shape} {a.dtype}".encode() + a.tobytes())
    return digest.hexdigest()
