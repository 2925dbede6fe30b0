"""Arrays larger than memory, file to file: `stream`."""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import nnfwd
from nnfwd import backend as _backend
from nnfwd.errors import DataFileError, NnfwdError, ShapeError
from nnfwd.layers import leaves, to_numpy
from nnfwd.network import Network
from nnfwd.streaming import sinks, sources
from nnfwd.streaming.blocks import Executor, Plan, outputs
from nnfwd.streaming.journal import Journal

_PAUSE = 1.0  # seconds between two looks to the disk, at the least


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
            `.npy` files; or an array that is read by slices (NumPy's, Zarr's, HDF5's). `(..., *net.input_shape)` too.
        sink: the path of the same kinds, by its extension (a folder has none), or an array to assign to.
        backend, device, dtype, precision: as `feed_forward`; of text, which has no dtype, the network's.
        labels: writes the class of each row instead of its outputs.
        workers: blocks that are computed at a time; by default one a processor on a CPU.
        executor: computes blocks in other processes: a `concurrent.futures.Executor`, or what a backend offers for a
            cluster. They read the source themselves where it is a path, and send outputs here.
        resume: goes on with what an interrupted run has left, if it has; its last block is made again and compared.
        force: replaces the sink, or what an interrupted run has left.
        progress: called with the number of rows done and that of all.

    Raises:
        DataFileError: where files are damaged, in the way, of unknown formats or changed meanwhile; where the disk is
            full (what is done is kept, for `resume`); where a resumed run is not the one that was begun.
        ShapeError, DtypeError, ArrayError, DeviceError, BackendError, UnknownNameError: as `feed_forward`.
    """
    rows = sources.opened(source)
    folded = net.input_shape and rows.shape[-len(net.input_shape) :] == net.input_shape
    rows.fold(len(net.input_shape) if folded and net.input_shape else min(len(rows.shape), 1))
    plan = Plan(net, rows, backend=backend, device=device, dtype=dtype, precision=precision, labelled=labels)
    if workers is None:
        workers = getattr(executor, "threads", None) or _backend.usable_cores()
    if workers < 1:
        raise ShapeError(f"workers is {workers}: it must be at least 1")
    run = _Run(plan, workers, executor, progress or (lambda done, total: None))
    kept = 0
    with plan.threaded(workers):
        if isinstance(sink, str | os.PathLike):
            kept = _to_file(run, Path(sink), _facts(plan, precision, run.before), resume=resume, force=force)
        elif resume:
            raise DataFileError("resume goes on with a file: a sink that is an array has no journal")
        else:
            run(sinks.Target(sink, plan.layout), 0, lambda: None)
    return Streamed(rows.shape, plan.layout.shape, plan.layout.dtype, kept)


class _Run:
    """Writes outputs, block by block."""

    def __init__(
        self, plan: Plan, workers: int, executor: Executor | None, progress: Callable[[int, int], object]
    ) -> None:
        self.plan, self._workers, self._executor, self._progress = plan, workers, executor, progress
        self.before = plan.source.fingerprint()

    def __call__(self, sink: sinks.Sink, rows: int, keep: Callable[[], None]) -> None:
        """From row `rows` on; calls `keep` from time to time, and at the end."""
        plan, total = self.plan, self.plan.layout.rows
        self._progress(rows, total)
        try:
            self._blocks(sink, rows, keep)
        except (NnfwdError, OSError) as error:
            if not self._is_at_rest():
                raise sources.changed(plan.source.name) from error
            raise
        if not self._is_at_rest():
            raise sources.changed(plan.source.name)
        keep()
        sink.finish()

    def _is_at_rest(self) -> bool:
        """Whether the source is what it was."""
        try:
            return self.plan.source.fingerprint() == self.before
        except OSError:  # it is gone
            return False

    def _blocks(self, sink: sinks.Sink, rows: int, keep: Callable[[], None]) -> None:
        plan, total = self.plan, self.plan.layout.rows
        first = plan.blocks if rows == total else rows // plan.height
        pause, last = _PAUSE, time.monotonic()
        with contextlib.closing(outputs(plan, first, workers=self._workers, executor=self._executor)) as blocks:
            for start, y in blocks:
                sink.write(start, y)
                self._progress(start + y.shape[len(plan.layout.members)], total)
                if (now := time.monotonic()) - last > pause:
                    keep()
                    last = time.monotonic()
                    pause = max(_PAUSE, 9 * (last - now))  # a slow disk is waited for a tenth of the time at most


def _to_file(run: _Run, path: Path, facts: dict[str, Any], *, resume: bool, force: bool) -> int:
    """Writes a file or a folder; gives the number of rows that were there already."""
    _check_name(path, run.plan.source, force=force)
    with contextlib.closing(Journal(path, facts, resume=resume, force=force)) as journal:
        if journal.complete:
            return run.plan.layout.rows
        kept = journal.rows
        try:
            plan = run.plan
            sink = sinks.sink(journal.partial, path, plan.layout, plan.source.parts, plan.height)
            with contextlib.closing(sink):
                _begin(plan, sink, journal)
                _write(run, sink, journal)
            journal.finish()
        except BaseException:
            if not journal.rows:
                journal.discard()
            raise
        return kept


def _begin(plan: Plan, sink: sinks.Sink, journal: Journal) -> None:
    """Makes what is written to, or opens what an interrupted run has left."""
    if not journal.rows:
        sinks.check_room(journal.output, plan.layout)
        sink.begin()
        return
    sink.resume(journal.rows, journal.state)
    i = (journal.rows - 1) // plan.height
    block = plan.block()
    plan.read(i, block)
    y = plan.compute(block)
    chosen = (*(slice(None),) * len(plan.layout.members), slice(0, journal.rows - i * plan.height))
    if not sink.holds(i * plan.height, y[chosen]):
        raise DataFileError(
            f"{journal.partial}: its last rows are computed otherwise here: resume where it was begun "
            "(processor, threads, libraries), or begin anew with force (--force)"
        )


def _write(run: _Run, sink: sinks.Sink, journal: Journal) -> None:
    """Writes all rows that are left; what becomes of those that are there when it fails, depends on why."""

    def keep() -> None:
        if sink.keeps:
            journal.note(sink.flush(), sink.state())

    try:
        run(sink, journal.rows, keep)
    except (DataFileError, ShapeError):  # the input is to be mended, and what was made of it is worth nothing
        journal.discard()
        raise
    except BaseException as error:
        try:
            keep()
        except OSError as full:  # what was noted before holds
            error.add_note(f"after it: {full}")
        stopped = _stopped(error, journal, run.plan.layout.rows)
        if stopped is error:
            raise
        raise stopped from error


def _stopped(error: BaseException, journal: Journal, total: int) -> BaseException:
    """The error of a run that ended too soon, which says what is left of it."""
    left = "nothing was written"
    if journal.rows:
        left = f"{journal.rows:,} of {total:,} rows are kept in {journal.partial}: go on with resume (--resume)"
    if isinstance(error, OSError):
        return DataFileError(f"{journal.output}: {error.strerror or error}; {left}")
    error.add_note(left)
    return error


def _check_name(path: Path, source: sources.Source, *, force: bool) -> None:
    """Raises `DataFileError` where an output may not have this name."""
    folder = not path.suffix
    if not folder and path.suffix.lower() not in sinks.WRITTEN:
        raise DataFileError(
            f"{path}: no format {path.suffix} here: use {', '.join(sinks.WRITTEN)}, or no extension for a folder"
        )
    if not path.absolute().parent.is_dir():
        raise DataFileError(f"{path}: the folder {path.parent} does not exist")
    here = path.resolve()
    for file in (file.resolve() for file in source.files):
        if here == file or here.is_relative_to(file) or file.is_relative_to(here):
            raise DataFileError(f"{path} is read from: choose another name for the output")
    if path.exists() and path.is_dir() != (folder or path.suffix.lower() == ".zarr"):
        raise DataFileError(f"{path} is a {'folder' if path.is_dir() else 'file'}: choose another name")
    if force and path.is_dir():
        foreign = next((p for p in sorted(path.iterdir()) if not _is_output(p, folder)), None)
        if foreign is not None:
            raise DataFileError(f"{path} holds {foreign.name}, which no run of ours made: choose another name")


def _is_output(path: Path, folder: bool) -> bool:
    return path.suffix == ".npy" if folder else path.name in ("zarr.json", "c", ".zarray", ".zattrs")


def _facts(plan: Plan, precision: str, before: str) -> dict[str, Any]:
    """What makes two runs the same."""
    source, layout = plan.source, plan.layout
    name = _backend.name_of(plan.adapter)
    return {
        "nnfwd": nnfwd.__version__,
        "network": _digest(plan.net),
        "input": f"{Path(source.name).name}, {source.shape} {source.dtype}, {before}",
        "output": f"{layout.shape} {layout.dtype}",
        "backend": f"{name} {_backend.version(name)}",
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
