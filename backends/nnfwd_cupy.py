"""CuPy, on NVIDIA GPUs.

Known to differ, from CuPy's documentation (nothing here has run on a GPU yet): subnormal float32 numbers become 0 in
element-wise kernels; TF32 is off unless an environment variable of CuPy's turns it on; counting devices raises where
there is no driver. CuPy's current device and stream are used; nothing synchronises but `to_numpy`.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import array_api_compat.cupy as xp
import cupy
import numpy as np

from nnfwd.bounds import Arithmetic, tensor_cores
from nnfwd.errors import BackendError, DtypeError

__all__ = ["arithmetic", "devices", "place", "scope", "to_numpy", "xp"]


def devices() -> tuple[str, ...]:
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:  # no driver, or no device
        return ()
    return tuple(f"cuda:{i}" for i in range(count))


def place(a: Any, /, *, dtype: str, like: Any = None, device: Any = None) -> Any:
    if dtype == "bfloat16":
        raise DtypeError("nnfwd does not use CuPy's bfloat16 yet: use float16 or float32, or a backend that has it")
    if isinstance(device, str):
        device = int(device.removeprefix("cuda:"))
    if device is None:
        device = cupy.cuda.Device() if like is None else like.device
    with cupy.cuda.Device(getattr(device, "id", device)):
        return cupy.asarray(a, dtype=dtype)


def to_numpy(x: Any, /) -> np.ndarray:
    return cupy.asnumpy(x)


@contextlib.contextmanager
def scope(precision: str, x: Any, /) -> Iterator[None]:
    if precision == "highest" and x.dtype == "float32" and int(os.environ.get("CUPY_TF32", "0")):
        raise BackendError(
            'precision="highest" was asked for and CUPY_TF32 is set: unset it before starting, '
            'or ask for precision="high"'
        )
    with cupy.cuda.Device(x.device.id):  # CuPy computes on the current device, wherever the operands are
        yield


def arithmetic(dtype: str, /, *, precision: str, device: str) -> Arithmetic:
    return Arithmetic(dtype, flushes=dtype == "float32", ulp=ULP[dtype], **tensor_cores(dtype, precision))


# From CUDA's tables of maximum errors, in units in the last place, with room for CuPy's -ftz; not measured yet.
ULP = {
    "float16": {"exp": 1.0, "expm1": 1.0, "log1p": 1.0, "log": 1.0, "tanh": 1.0, "erfc": 1.0},
    "float32": {"exp": 2.0, "expm1": 2.0, "log1p": 2.0, "log": 2.0, "tanh": 3.0, "erfc": 8.0},
    "float64": {"exp": 2.0, "expm1": 2.0, "log1p": 2.0, "log": 2.0, "tanh": 3.0, "erfc": 8.0},
}
