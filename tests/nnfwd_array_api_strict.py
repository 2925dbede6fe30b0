"""array-api-strict, as a stranger would write a backend: the standard and nothing else, on pretend devices."""

import array_api_strict as xp
import numpy as np

from nnfwd.errors import DtypeError


def _by_name():
    return {repr(d).split("'")[1]: d for d in xp.__array_namespace_info__().devices()}


def devices():
    return tuple(_by_name())


def place(a, /, *, dtype, like=None, device=None):
    device = like.device if device is None and like is not None else _by_name().get(device, device)
    if dtype not in xp.__array_namespace_info__().dtypes(device=device):
        raise DtypeError(f"array_api_strict has no {dtype} on {device}")
    return xp.asarray(a, dtype=getattr(xp, dtype), device=device)


def to_numpy(x, /):
    return np.asarray(xp.asarray(x, device=xp.Device("CPU_DEVICE")))


def scope(precision, x, /):
    return np.errstate(all="ignore")  # it is NumPy underneath, which would warn of overflow


def arithmetic(dtype, /, *, precision, device):
    from nnfwd_numpy import arithmetic  # it is NumPy underneath

    return arithmetic(dtype, precision=precision, device="cpu")
