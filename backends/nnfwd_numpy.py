"""NumPy, on the CPU.

Known to differ: there is no bfloat16; float16 products are summed in float32 without BLAS, and slow, so float16 is for
storage. Overflow is silent here as everywhere else: what does not fit becomes infinity, without a warning.
"""

import contextlib
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from nnfwd.bounds import Arithmetic
from nnfwd.errors import DeviceError, DtypeError

__all__ = ["arithmetic", "devices", "place", "scope", "to_numpy", "xp"]


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


def arithmetic(dtype: str, /, *, precision: str, device: str) -> Arithmetic:
    return Arithmetic(dtype, u_acc=2.0**-24 if dtype == "float16" else None, ulp=ULP[dtype])


# Largest errors of NumPy's functions in ulp, by `python -m nnfwd.ulp`: tanh without AVX2, the others with AVX-512.
ULP = {
    "float16": {"exp": 0.62, "expm1": 0.62, "log1p": 0.62, "log": 0.62, "tanh": 0.62, "erfc": 0.62},
    "float32": {"exp": 3.0, "expm1": 3.1, "log1p": 2.2, "log": 3.2, "tanh": 2.6, "erfc": 8.4},
    "float64": {"exp": 1.2, "expm1": 1.2, "log1p": 1.2, "log": 1.2, "tanh": 2.7, "erfc": 7.0},
}
