"""Threads, and what the process shares between them: BLAS's own threads, the processors, the cache.

The number of BLAS's threads belongs to the whole process. It is changed when the first call that needs it begins, and
restored when the last one ends, well or not; what else multiplies matrices in that time does so on one thread.
"""

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class _Blas:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._before: list[tuple[Any, int]] = []

    @functools.cached_property
    def _libraries(self) -> list[Any]:
        import threadpoolctl

        return [lib for lib in threadpoolctl.ThreadpoolController().lib_controllers if lib.user_api == "blas"]

    @contextlib.contextmanager
    def on_one_thread(self) -> Iterator[int]:
        """A context in which BLAS runs on one thread; gives the number of threads it has otherwise."""
        with self._lock:
            if self._holders == 0:
                self._before = [(library, library.num_threads) for library in self._libraries]
                for library, count in self._before:
                    if count != 1:
                        library.set_num_threads(1)
            self._holders += 1
            allowed = max((count for _, count in self._before), default=_processors())
        try:
            yield allowed
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self._restore()

    def _restore(self) -> None:
        for library, count in self._before:
            if count != 1:
                library.set_num_threads(count)

    def forked(self) -> None:
        """In a process that was forked while another thread was at work, that thread is no more."""
        self._lock = threading.Lock()
        if self._holders:
            self._holders = 0
            self._restore()


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
        helpers = self._called(left, min(threads, len(jobs)) - 1)
        try:
            _work(left, None)
        finally:
            left.clear()
            started = [helper for helper in helpers if not helper.cancel()]
            concurrent.futures.wait(started)
        for helper in started:
            helper.result()

    def _called(self, left: collections.deque[Callable[[], None]], count: int) -> list[concurrent.futures.Future[None]]:
        if count < 1:
            return []
        with self._lock:
            if self._pool is None or self._size < count:
                self._pool = concurrent.futures.ThreadPoolExecutor(count, "nnfwd")
                self._size = count
            return [self._pool.submit(_work, left, processor) for processor in _others(count)]


def _work(left: collections.deque[Callable[[], None]], processor: int | None) -> None:
    if processor is not None:
        os.sched_setaffinity(0, {processor})
    while True:
        try:
            job = left.popleft()
        except IndexError:
            return
        try:
            job()
        except BaseException:
            left.clear()
            raise


def _others(count: int) -> list[int | None]:
    """Processors for the helpers of the calling thread, where the system lets one choose.

    Left alone, Linux may keep a helper on the processor of the thread that woke it for milliseconds, the others idle.
    """
    here = _current_processor()
    if here is None:
        return [None] * count
    others = sorted(os.sched_getaffinity(0) - {here()})
    return list(itertools.islice(itertools.cycle(others or [None]), count))


@functools.cache
def _current_processor() -> Callable[[], int] | None:
    """A function that tells the processor of the calling thread, None where there is none."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    import ctypes

    return getattr(ctypes.CDLL(None), "sched_getcpu", None)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
