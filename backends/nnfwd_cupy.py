"""CuPy, on NVIDIA GPUs.

Known to differ, from the documentation and the sources of CuPy 14.2 and cuBLAS 13 (nothing here has run on a GPU yet):
subnormal float32 numbers become 0 in element-wise kernels. Precision is a mode of the cuBLAS handle, of which every
thread has one for each device: `scope` sets it and puts it back; "medium" is TF32. Where CUPY_TF32 is set, CuPy asks
for TF32 in every product, which no handle can refuse and no thread unset for itself: "highest" then raises. A process
forked once a GPU is in use is refused. CuPy's current device and stream are used; nothing synchronises but `to_numpy`.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import array_api_compat.cupy
import cupy
import numpy as np

from nnfwd.backend import in_use, refuse_forked
from nnfwd.bounds import Arithmetic, tensor_cores
from nnfwd.errors import BackendError, DtypeError

__all__ = ["arithmetic", "devices", "place", "scope", "to_numpy", "xp"]


# CuPy computes one row times one column as an element-wise product, which it rounds to float16, and its sum.
def _matmul(a: Any, b: Any, /) -> Any:
    if a.dtype == "float16" and a.shape[:-1] == b.shape[1:] == (1,):
        return _matmul(a.astype("float32"), b.astype("float32")).astype("float16")
    return array_api_compat.cupy.matmul(a, b)


xp: Any = types.SimpleNamespace(**{**vars(array_api_compat.cupy), "matmul": _matmul})


def devices() -> tuple[str, ...]:
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:  # no driver, no device, or a forked process
        refuse_forked("cupy")
        return ()
    in_use("cupy")
    return tuple(f"cuda:{i}" for i in range(count))


def place(a: Any, /, *, dtype: str, like: Any = None, device: Any = None) -> Any:
    in_use("cupy")
    if dtype == "bfloat16":
        raise DtypeError("nnfwd does not use CuPy's bfloat16 yet: use float16 or float32, or a backend that has it")
    if isinstance(device, str):
        device = int(device.removeprefix("cuda:"))
    if device is None:
        device = cupy.cuda.Device() if like is None else like.device
    with cupy.cuda.Device(getattr(device, "id", device)):
        return cupy.asarray(a, dtype=dtype)


def to_numpy(x: Any, /) -> np.ndarray:
    in_use("cupy")
    return cupy.asnumpy(x)


# Values of cublasMath_t, for which CuPy has no names: 3 allows TF32, 16 has products of float16 summed in float32.
MATH_MODE = {"highest": 16, "high": 16 | 3, "medium": 16 | 3}


@contextlib.contextmanager
def scope(precision: str, x: Any, /) -> Iterator[None]:
    in_use("cupy")
    with cupy.cuda.Device(x.device.id):  # CuPy computes on the current device, wherever the operands are
        asked = cupy._core.get_compute_type("float32")  # of the whole process
        if precision == "highest" and x.dtype == "float32" and asked == cupy._core._routines_linalg.COMPUTE_TYPE_TF32:
            raise BackendError(
                'precision="highest" was asked for and CuPy is set to TF32: start without CUPY_TF32, '
                'or ask for precision="high"'
            )
        handle = cupy.cuda.get_cublas_handle()  # of this thread and device
        before = cupy.cuda.cublas.getMathMode(handle)
        cupy.cuda.cublas.setMathMode(handle, MATH_MODE[precision])
        try:
            yield
        finally:
            cupy.cuda.cublas.setMathMode(handle, before)


def arithmetic(dtype: str, /, *, precision: str, device: str) -> Arithmetic:
    return Arithmetic(dtype, flushes=dtype == "float32", ulp=ULP[dtype], **tensor_cores(dtype, precision))


# From CUDA's tables of maximum errors, in units in the last place, with room for CuPy's -ftz; not measured yet.
ULP = {
    "float16": {"exp": 1.0, "expm1": 1.0, "log1p": 1.0, "log": 1.0, "tanh": 1.0, "erfc": 1.0},
    "float32": {"exp": 2.0, "expm1": 2.0, "log1p": 2.0, "log": 2.0, "tanh": 3.0, "erfc": 8.0},
    "float64": {"exp": 2.0, "expm1": 2.0, "log1p": 2.0, "log": 2.0, "tanh": 3.0, "erfc": 8.0},
}
