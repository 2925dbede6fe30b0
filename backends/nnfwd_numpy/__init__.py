"""NumPy, on the CPU.

Known to differ: there is no bfloat16; float16 products are summed in float32 without BLAS, and slow, so float16 is for
storage. Overflow is silent here as everywhere else: what does not fit becomes infinity, without a warning.

`net.compile(backend="numpy", threads=None)`, and `net(x)` for a large x, run over tiles of rows that stay in cache, on
as many threads as NumPy's BLAS has, or as are asked for. While that goes on, BLAS is held to one thread, for the whole
process, SciPy's and PyTorch's too, and set back afterwards. One shape of x gives the same bits every time for the same
number of threads; a single row's products are left to BLAS. A network with a callable of one's own, which may mix rows,
is run whole.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from nnfwd.bounds import Arithmetic
from nnfwd.errors import BackendError, DeviceError, DtypeError

__all__ = ["arithmetic", "compile", "devices", "large", "place", "scope", "threaded", "to_numpy", "xp"]

if hasattr(np, "__array_namespace_info__"):
    xp: Any = np
else:  # NumPy 2.0; otherwise left alone, since it imports all of NumPy, which takes as long again
    import array_api_compat.numpy as xp  # type: ignore[no-redef]


def devices() -> tuple[str, ...]:
    return ("cpu",)


def place(a: Any, /, *, dtype: str, like: Any = None, device: Any = None) -> np.ndarray:
    if dtype == "bfloat16":
        raise DtypeError("numpy has no bfloat16: use float16 or float32, or a backend that has it")
    if device not in (None, "cpu"):
        raise DeviceError(f"numpy has no device {device!r} here: there is cpu")
    return np.asarray(a, dtype=dtype)


def to_numpy(x: Any, /) -> np.ndarray:
    return np.asarray(x)


def scope(precision: str, x: Any, /) -> contextlib.AbstractContextManager[Any]:
    return np.errstate(all="ignore")


def compile(
    forward: Callable[..., np.ndarray], layers: Sequence[Any], /, *, threads: int | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    count = None if threads is None else _count(threads)
    if count is not None and count < 1:
        raise BackendError(
            f"threads is {threads!r}: it must be a positive whole number, or None for as many as BLAS has"
        )
    plain = functools.partial(forward, layers)
    if not all(layer.is_named for layer in layers):
        return plain
    from nnfwd_numpy.tiles import Compiled

    return Compiled(plain, count)


def _count(threads: Any) -> int:
    """A whole number; 0 for what is none."""
    try:
        return 0 if isinstance(threads, bool) else operator.index(threads)
    except TypeError:
        return 0


@contextlib.contextmanager
def threaded(count: int, /) -> Iterator[None]:
    from nnfwd_numpy.threads import BLAS

    holder = object()
    try:
        BLAS.hold(holder, 1, count)
        yield
    finally:
        try:
            BLAS.release(holder)
        except KeyboardInterrupt:  # at the worst of moments, as in `tiles.Pass`
            BLAS.release(holder)
            raise


def large(x: np.ndarray, /) -> bool:
    return x.size >= 1 << 15


def arithmetic(dtype: str, /, *, precision: str, device: str) -> Arithmetic:
    return Arithmetic(dtype, u_acc=2.0**-24 if dtype == "float16" else None, ulp=ULP[dtype])


# Largest errors of NumPy's functions in ulp, by `python -m nnfwd.ulp`: tanh without AVX2, the others with AVX-512.
ULP = {
    "float16": {"exp": 0.62, "expm1": 0.62, "log1p": 0.62, "log": 0.62, "tanh": 0.62, "erfc": 0.62},
    "float32": {"exp": 3.0, "expm1": 3.1, "log1p": 2.2, "log": 3.2, "tanh": 2.6, "erfc": 8.4},
    "float64": {"exp": 1.2, "expm1": 1.2, "log1p": 1.2, "log": 1.2, "tanh": 2.7, "erfc": 7.0},
}
