"""Threads, and what the process shares between them: BLAS's own threads, the processors, the cache.

The number of BLAS's threads belongs to the whole process. It is changed when the first call that needs it begins, and
restored when the last one ends, well or not; what else multiplies matrices in that time does so on one thread.

A process may be forked when no pass runs. While one does, OpenBLAS itself may wait for ever in the fork.
"""

import collections
import concurrent.futures
import contextlib
import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from nnfwd.backend import usable_cores


class _Blas:
    """The number of BLAS's threads. `hold` and `release` may be interrupted anywhere, and be repeated."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: dict[object, int] = {}  # and on how many threads they make passes at a time
        self._libraries: list[Any] | None = None
        self._before: list[tuple[Any, int]] | None = None  # what is to be restored; None where nothing is

    def hold(self, holder: object, wanted: int | None, callers: int = 1) -> int:
        """Puts BLAS on one thread until `release`; gives the number wanted, by default the one it has otherwise."""
        with self._lock:
            if self._libraries is None:
                import threadpoolctl

                found = threadpoolctl.ThreadpoolController().lib_controllers
                self._libraries = [library for library in found if library.user_api == "blas"]
            self._holders[holder] = callers
            if self._before is None:
                self._before = [(library, library.num_threads) for library in self._libraries]
                for library, count in self._before:
                    if count != 1:
                        library.set_num_threads(1)
            return wanted or max([count for _, count in self._before] or [usable_cores()])

    def release(self, holder: object) -> None:
        """Sets back what `hold` found, after the last holder."""
        with self._lock:
            self._holders.pop(holder, None)
            if not self._holders and self._before is not None:
                for library, count in self._before:
                    if count != 1:
                        library.set_num_threads(count)
                self._before = None

    @property
    def callers(self) -> int:
        """How many passes a holder makes at a time."""
        with self._lock:
            return max(self._holders.values(), default=1)

    def forked(self) -> None:
        """In a process that was forked while another thread was at work, that thread is no more."""
        self._lock = threading.Lock()
        self._holders.clear()
        self.release(None)


class _Team:
    """Threads that help the calling one."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forgets all threads, as a forked process must."""
        self._lock = threading.Lock()
        self._size = 0
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def run(self, jobs: Sequence[Callable[[], None]], threads: int) -> None:
        """Runs all jobs, each once, on the calling thread and its helpers; raises what one of them raised."""
        left = collections.deque(jobs)
        helpers: list[concurrent.futures.Future[None]] = []
        try:
            self._call(helpers, left, min(threads, len(jobs)) - 1)
            _work(left, None)
        finally:
            left.clear()
            started = [helper for helper in helpers if not helper.cancel()]
            concurrent.futures.wait(started)
        for helper in started:
            helper.result()

    def _call(
        self, helpers: list[concurrent.futures.Future[None]], left: collections.deque[Callable[[], None]], count: int
    ) -> None:
        if count < 1:
            return
        with self._lock:
            if self._pool is None or self._size < count:
                self._pool = concurrent.futures.ThreadPoolExecutor(count, "nnfwd")
                self._size = count
            with contextlib.suppress(RuntimeError):  # at the end of the program no thread is started any more
                helpers.extend(self._pool.submit(_work, left, where) for where in _others(count))


def _work(left: collections.deque[Callable[[], None]], where: set[int] | None) -> None:
    """Does what is left; on these processors, if any are named."""
    if where is not None:
        with contextlib.suppress(OSError):  # a sandbox may not allow it
            os.sched_setaffinity(0, where)
    while True:
        try:
            job = left.popleft()
        except IndexError:
            return
        job()


def _others(count: int) -> Sequence[set[int] | None]:
    """Processors for the helpers of the calling thread, the next ones after its own, where the system lets one choose.

    Left alone, Linux may keep a helper on the processor of the thread that woke it for milliseconds, the others idle.
    """
    current = _current_processor()
    if current is None:
        return [None] * count
    here, allowed = current(), os.sched_getaffinity(0)
    others = sorted(allowed - {here}, key=lambda processor: (processor < here, processor))
    return [{others[i % len(others)]} if others else allowed for i in range(count)]


@functools.cache
def _current_processor() -> Callable[[], int] | None:
    """A function that tells the processor of the calling thread, None where there is none."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    import ctypes

    return getattr(ctypes.CDLL(None), "sched_getcpu", None)


@functools.cache
def cache_size() -> int:
    """Bytes of a processor's second-level cache; a usual size where the system does not say."""
    with contextlib.suppress(OSError, ValueError), open("/sys/devices/system/cpu/cpu0/cache/index2/size") as file:
        return int(file.read().strip().removesuffix("K")) << 10
    return 1 << 20


BLAS = _Blas()
TEAM = _Team()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=TEAM.begin)
    os.register_at_fork(after_in_child=BLAS.forked)
