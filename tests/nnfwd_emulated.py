"""The backend of `emulated`: what nnfwd says of GPUs, held to arithmetic that does as they do."""

from typing import Any

import emulated as xp
import numpy as np

from nnfwd.bounds import Arithmetic, tensor_cores
from nnfwd.errors import DtypeError


def devices() -> tuple[str, ...]:
    return (*xp.DEVICES, "broken") if xp.fault.get() else xp.DEVICES


def place(a: Any, /, *, dtype: str, like: Any = None, device: Any = None) -> xp.Array:
    if dtype == "bfloat16":
        raise DtypeError("emulated has no bfloat16")
    if isinstance(a, xp.Array):
        return xp.asarray(a, dtype=dtype, device=device)
    return xp.asarray(a, dtype=dtype, device=device or (like.device if like is not None else devices()[0]))


def to_numpy(x: xp.Array, /) -> np.ndarray:
    return x.a


class scope:  # noqa: N801
    """NumPy's warnings held, and the precision said to the library."""

    def __init__(self, precision: str, x: xp.Array) -> None:
        self.held, self.said = np.errstate(all="ignore"), xp.set_to(xp.precision, precision)

    def __enter__(self) -> None:
        self.held.__enter__()
        self.said.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.said.__exit__(*error)
        self.held.__exit__(*error)


def arithmetic(dtype: str, /, *, precision: str, device: str) -> Arithmetic:
    from nnfwd_numpy import ULP

    if device == "tensor_cores":
        return Arithmetic(dtype, flushes=True, ulp=ULP[dtype], **tensor_cores(dtype, precision))
    wide = 2.0**-24 if dtype == "float16" else None
    return Arithmetic(dtype, u_acc=wide, flushes=device == "flushing", ulp=ULP[dtype])
