"""A stand-in for CuPy, built on NumPy, for machines without a GPU.

It proves the spelling of nnfwd_cupy.py, not its behaviour: which names of CuPy are used, with which arguments, and that
every array is where CuPy would want it. Nothing here has run on a GPU; rounding, streams and speed are NumPy's.

There are two devices. Of CuPy's rules it keeps those that can be broken by a spelling:

    new arrays are made on the current device, the operands' devices notwithstanding
    an operation takes arrays of the current device only (CuPy lets others pass, with a warning, where the hardware does)
    nothing becomes a NumPy array by itself
    the current device, and for each device a cuBLAS handle with its math mode, are a thread's own; CUPY_TF32 is read once
    one row times one column is an element-wise product, rounded, and its sum
    in a forked process nothing works

`install()` puts it in the place of `cupy` and `array_api_compat.cupy`, for the whole process: use a process of its own.
"""

import importlib.machinery
import itertools
import operator
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import array_api_compat
import numpy as np

COUNT = 2


class _Thread(threading.local):
    """What CUDA and CuPy keep for each thread: the devices that became current, and cuBLAS handles by device."""

    def __init__(self) -> None:
        self.devices = [0]
        self.handles: dict[int, int] = {}


_thread = _Thread()


class CUDARuntimeError(RuntimeError):
    """What CuPy raises where a call to the CUDA runtime fails."""


_forks: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forks.append(True))


def _cuda_works() -> None:
    if _forks:
        raise CUDARuntimeError("cudaErrorInitializationError: initialization error")


def _count() -> int:
    _cuda_works()
    return COUNT


class Device:
    """A device: the current one by default; in a `with` statement it is the current one."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, device: Any = None) -> None:
        self._id = _thread.devices[-1] if device is None else int(device)

    @property
    def id(self) -> int:
        return self._id

    def __int__(self) -> int:
        return self._id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self._id == other._id

    def __repr__(self) -> str:
        return f"<CUDA Device {self._id}>"

    def __enter__(self) -> "Device":
        _cuda_works()
        if self._id not in range(COUNT):
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        _thread.devices.append(self._id)
        return self

    def __exit__(self, *_: object) -> None:
        _thread.devices.pop()


class ndarray:  # noqa: N801, this is CuPy's name
    """An array on a device: a NumPy array that no one is told of, and the number of the device."""

    __array_ufunc__ = None  # NumPy's operators leave it to ours

    def __init__(self, host: Any, on: int | None = None) -> None:
        self._host = np.asarray(host)
        self._on = _thread.devices[-1] if on is None else on

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array."
        )

    @property
    def device(self) -> Device:
        return Device(self._on)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._host.shape

    @property
    def dtype(self) -> np.dtype:
        return self._host.dtype

    @property
    def ndim(self) -> int:
        return self._host.ndim

    def get(self) -> np.ndarray:
        _cuda_works()
        return self._host.copy()

    def astype(self, dtype: Any, copy: bool = True) -> "ndarray":
        return self if not copy and self.dtype == dtype else _launch(np.ndarray.astype, self, dtype=dtype)

    def __getitem__(self, key: Any) -> "ndarray":
        return ndarray(self._host[key], self._on)


def _operand(a: Any) -> Any:
    """What an operation computes with: an array of the current device, or a number."""
    if isinstance(a, ndarray):
        if a._on != _thread.devices[-1]:
            raise ValueError(
                f"The device where the array resides ({a._on}) is different from the current device ({_thread.devices[-1]}). "
                "Peer access is unavailable between these devices."
            )
        return a._host
    if isinstance(a, bool | int | float | np.generic):
        return a
    raise TypeError(f"Unsupported type {type(a)}")


def _launch(function: Callable[..., Any], /, *operands: Any, **options: Any) -> ndarray:
    """A NumPy function as CuPy would run it: from arrays on the current device to a new one there, without warnings."""
    with np.errstate(all="ignore"):
        return ndarray(function(*map(_operand, operands), **options))


def _kernel(function: Callable[..., Any]) -> Callable[..., ndarray]:
    return lambda *operands, **options: _launch(function, *operands, **options)


def _operators() -> Iterator[tuple[str, Callable[..., ndarray]]]:
    for name in ("add", "sub", "mul", "truediv"):
        forwards = getattr(operator, name)
        yield f"__{name}__", lambda a, b, f=forwards: _launch(f, a, b)
        yield f"__r{name}__", lambda a, b, f=forwards: _launch(f, b, a)
    for name in ("lt", "le", "gt", "ge", "neg"):
        yield f"__{name}__", _kernel(getattr(operator, name))


for _name, _function in _operators():
    setattr(ndarray, _name, _function)


def _view(function: Callable[..., Any]) -> Callable[..., ndarray]:
    """A NumPy function that only looks at its array differently: it runs nothing, so the current device is no matter."""
    return lambda a, *args: ndarray(function(a._host, *args), a._on)


def asarray(a: Any, dtype: Any = None) -> ndarray:
    """The array on the current device: itself if it is there already in that dtype."""
    if isinstance(a, ndarray):
        if a._on == _thread.devices[-1] and (dtype is None or a.dtype == dtype):
            return a
        a = a._host
    return ndarray(np.array(a, dtype=dtype))


def asnumpy(a: Any) -> np.ndarray:
    """The array in host memory."""
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


def _astype(a: ndarray, dtype: Any) -> ndarray:
    return a.astype(dtype)


_handles = itertools.count(1)
_modes: dict[int, int] = {}
products: list[tuple[str, int]] = []
"""The dtype and the math mode of every matrix product, in order."""


def get_cublas_handle() -> int:
    """The cuBLAS handle of this thread for the current device."""
    handles, device = _thread.handles, _thread.devices[-1]
    if device not in handles:
        handles[device] = next(_handles)
        _modes[handles[device]] = 0
    return handles[device]


def matmul(a: ndarray, b: ndarray) -> ndarray:
    """The matrix product, noted in `products`."""
    products.append((str(a.dtype), _modes[get_cublas_handle()]))
    return _launch(_row_times_column if a.shape[:-1] == b.shape[1:] == (1,) else np.matmul, a, b)


def _row_times_column(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    rounded = a.ravel() * b.ravel()
    return rounded.sum(dtype=np.result_type(a, np.float32), keepdims=True).astype(a.dtype).reshape(1, 1)


_TBD, _DEFAULT, _TF32 = 0, 1, 7
_compute_types = {"float32": _TBD}


def get_compute_type(dtype: str) -> int:
    """What cuBLAS is asked for in products of this dtype, by the whole process."""
    if _compute_types[dtype] == _TBD:
        _compute_types[dtype] = _TF32 if int(os.getenv("CUPY_TF32", "0")) > 0 else _DEFAULT
    return _compute_types[dtype]


class _Info:
    """The inspection functions of the Array API."""

    def default_dtypes(self) -> dict[str, np.dtype]:
        return {"real floating": np.dtype("float64")}


_runtime = types.SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDeviceCount=_count)
_cublas = types.SimpleNamespace(getMathMode=_modes.__getitem__, setMathMode=_modes.__setitem__)
_linalg = types.SimpleNamespace(COMPUTE_TYPE_TBD=_TBD, COMPUTE_TYPE_DEFAULT=_DEFAULT, COMPUTE_TYPE_TF32=_TF32)
_core = types.SimpleNamespace(
    _routines_linalg=_linalg, get_compute_type=get_compute_type, set_compute_type=_compute_types.__setitem__
)
_cuda = types.SimpleNamespace(Device=Device, cublas=_cublas, get_cublas_handle=get_cublas_handle, runtime=_runtime)
CUPY = {"_core": _core, "asarray": asarray, "asnumpy": asnumpy, "cuda": _cuda, "ndarray": ndarray}
_KERNELS = (
    "abs",
    "exp",
    "expm1",
    "log",
    "log1p",
    "max",
    "maximum",
    "minimum",
    "round",
    "sum",
    "tanh",
    "where",
)
NAMESPACE = {
    **{name: _kernel(getattr(np, name)) for name in _KERNELS},
    "astype": _astype,
    "finfo": np.finfo,
    "float32": np.float32,
    "matmul": matmul,
    "matrix_transpose": _view(np.matrix_transpose),
    "reshape": _view(np.reshape),
    "__array_namespace_info__": _Info,
}


def offered() -> list[str]:
    """Every dotted name the stand-in offers, as the real libraries must have it too."""

    def own(cls: type) -> list[str]:
        return [name for name in vars(cls) if callable(getattr(cls, name)) or not name.startswith("_")]

    return [
        *(f"cupy.{name}" for name in CUPY),
        *(f"cupy.ndarray.{name}" for name in own(ndarray)),
        *(f"cupy._core.{name}" for name in vars(_core)),
        *(f"cupy._core._routines_linalg.{name}" for name in vars(_linalg)),
        *(f"cupy.cuda.{name}" for name in vars(_cuda) if name != "cublas"),
        *(f"cupy.cuda.cublas.{name}" for name in vars(_cublas)),
        *(f"cupy.cuda.Device.{name}" for name in own(Device)),
        *(f"cupy.cuda.runtime.{name}" for name in vars(_runtime)),
        *(f"array_api_compat.cupy.{name}" for name in NAMESPACE),
        *(f"array_api_compat.cupy.__array_namespace_info__.{name}" for name in own(_Info)),
    ]


def install() -> types.ModuleType:
    """Makes `import cupy` and `import array_api_compat.cupy` give the stand-in, and returns the former."""
    if "cupy" in sys.modules:
        raise RuntimeError("cupy is imported already: the stand-in needs a process of its own")
    cupy, namespace = (_module(name, names) for name, names in (("cupy", CUPY), ("array_api_compat.cupy", NAMESPACE)))
    array_api_compat.cupy = namespace  # type: ignore[attr-defined]
    return cupy


def _module(name: str, names: dict[str, Any]) -> types.ModuleType:
    module = sys.modules[name] = types.ModuleType(name, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(names)
    return module
