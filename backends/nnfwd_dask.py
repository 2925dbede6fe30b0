"""Dask arrays: the whole network is one `map_blocks`, each chunk run by the backend of its own array type.

Known to differ: nothing is computed until asked. The feature axis must be one chunk. Arithmetic is that of the chunks.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import array_api_compat.dask.array as xp
import dask.array as da
import numpy as np

from nnfwd import backend
from nnfwd.bounds import Arithmetic, arithmetic_of
from nnfwd.errors import ArrayError, DeviceError, DtypeError, ShapeError
from nnfwd.placement import dtype_name

__all__ = ["apply", "arithmetic", "computed", "devices", "place", "scope", "to_numpy", "xp"]


def devices() -> tuple[str, ...]:
    return ("cpu",)


def place(a: Any, /, *, dtype: str, like: Any = None, device: Any = None) -> da.Array:
    if dtype == "bfloat16":
        raise DtypeError("dask has no bfloat16: use float16 or float32")
    if device not in (None, "cpu"):
        raise DeviceError(f"dask has no device {device!r} here: there is cpu")
    if isinstance(a, da.Array):
        return a.astype(dtype)
    return da.from_array(a.astype(dtype), chunks=(*("auto",) * (a.ndim - 1), -1) if a.size else a.shape)


def to_numpy(x: Any, /) -> np.ndarray:
    home = computed(x)
    return backend.of(home).to_numpy(home)


def computed(x: da.Array, /) -> Any:
    return x.compute()


def scope(precision: str, x: Any, /) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def apply(forward: Callable[..., Any], layers: Any, x: da.Array, /) -> da.Array:
    if x.numblocks[-1] != 1:
        raise ShapeError(f"x has {x.numblocks[-1]} chunks along its features: write x.rechunk({{-1: -1}}) first")
    # The pass over no rows gives the type, dtype and shape of a block, and refuses what a worker would refuse.
    try:
        none = np.zeros((0,) * (x.ndim - 1) + x.shape[-1:])
        meta = forward(backend.of(x._meta).place(none, dtype=dtype_name(x.dtype), like=x._meta), layers)
    except ArrayError as error:
        raise ArrayError(f"{error} (x is a dask array of them)") from None
    lead = x.ndim - 1
    new = ((layers.members,),) if meta.ndim > x.ndim else ()
    return x.map_blocks(
        functools.partial(_block, forward, layers),
        dtype=meta.dtype,
        meta=meta,
        new_axis=0 if new else None,
        chunks=(*new, *x.chunks[:lead], (meta.shape[-1],)),
    )


def _block(forward: Callable[..., Any], layers: Any, block: Any) -> Any:
    return forward(block, layers)


def arithmetic(dtype: str, /, *, precision: str, device: str) -> Arithmetic:
    return arithmetic_of(backend.load("numpy"), dtype, precision=precision)
