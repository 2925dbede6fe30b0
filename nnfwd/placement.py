"""Where arrays are: x decides, and only an explicit argument moves data.

`arrive` takes what a caller passed as x and gives the backend and the array to compute with. `own` takes a weight at
construction, `place` puts weights next to x. All three read metadata only (type, shape, dtype, device), so they cost
nothing on a GPU, compute no Dask graph and break no trace.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from nnfwd import backend as _backend
from nnfwd.backend import Array, Backend
from nnfwd.errors import ArrayError, DeviceError, DtypeError, NnfwdError, ShapeError

REAL = ("float16", "bfloat16", "float32", "float64")
INTEGER = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

_dtype_names: dict[tuple[type, Any], str] = {}


def dtype_name(dtype: Any, /) -> str:
    """The name of a dtype of any library, `"float32"` for `numpy.float32`, `torch.float32`, `jax.numpy.float32`."""
    key = (type(dtype), dtype)  # dtypes of two libraries may have one hash, and must not be compared
    name = _dtype_names.get(key)
    if name is None:
        name = _dtype_names[key] = _find_dtype_name(dtype)
    return name


def _find_dtype_name(dtype: Any) -> str:
    if isinstance(dtype, str):
        return dtype
    given = np.dtype(dtype) if isinstance(dtype, type) or callable(dtype) else dtype
    return getattr(given, "name", None) or str(given).rpartition(".")[2]


_find_dtype_name._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as backend._find


def real_dtype(dtype: Any, what: str = "dtype") -> str:
    """The name of a real floating dtype. Raises `DtypeError` for every other."""
    try:
        name = dtype_name(dtype)
    except TypeError:
        name = repr(dtype)
    if name not in REAL:
        raise DtypeError(f"{what} is {name}: it must be one of {', '.join(REAL)}")
    return name


def device_of(x: Array, /) -> Any:
    """The device of an array, None where it has no single one: a tracer, a Dask array, a sharded array."""
    device = getattr(x, "device", None)
    return None if hasattr(device, "device_set") else device


def where(x: Array, /) -> Any:
    """What tells apart where arrays are: one device, or the devices that x is spread over."""
    device = getattr(x, "device", None)
    return getattr(device, "mesh", None) if hasattr(device, "device_set") else str(device)


def rounded(a: np.ndarray, dtype: str, /) -> np.ndarray:
    """An array rounded to the nearest numbers of a dtype, infinite beyond the largest; bfloat16 stands in float32."""
    with np.errstate(all="ignore"):
        if dtype != "bfloat16":
            return a.astype(dtype)
        wide = a.astype("float32")
        bits = wide.view("uint32")
        near = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) & np.uint32(0xFFFF0000)  # ties go to even
        return np.where(np.isfinite(wide), near.view("float32"), wide)


def nearest(value: float, dtype: str) -> float:
    """The number of a dtype nearest to a Python float; infinite beyond the largest."""
    return value if dtype == "float64" or value is None else float(rounded(np.asarray(value), dtype))


nearest._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as backend._find


def widest(dtypes: Sequence[str]) -> str:
    """The narrowest dtype that holds every value of the given real ones (float16 and bfloat16 need float32)."""
    if {"float16", "bfloat16"} <= set(dtypes):
        dtypes = (*dtypes, "float32")
    return max(dtypes, key=REAL.index)


def from_list(a: Any, what: str) -> np.ndarray:
    """A nested list of numbers as a NumPy array. Raises `ShapeError` when it is ragged."""
    _refuse_arrays(a, what)
    try:
        return np.asarray(a)
    except ValueError:
        raise ShapeError(f"{what} is a ragged list: every row must have the same length") from None


def _refuse_arrays(a: Any, what: str) -> None:
    """A list of arrays is not a list of numbers: only plain NumPy rows and scalars are read without a loss."""
    for item in a if isinstance(a, list | tuple) else ():
        if isinstance(item, list | tuple):
            _refuse_arrays(item, what)
        elif hasattr(item, "__array__") and not isinstance(item, np.generic) and type(item) is not np.ndarray:
            library = _backend.name_of(_backend.of(item, f"{what}[...]"))
            raise ArrayError(f"{what} is a list of {library} arrays: stack them first")


def own(a: Any, what: str) -> Array:
    """A weight as a network keeps it.

    NumPy arrays and nested lists are copied and made read-only (integers become float64); arrays of another library are
    immutable or belong to its autograd, and are kept as they are. Raises `DtypeError` unless the values are real.
    """
    if isinstance(a, list | tuple | int | float):
        a = from_list(a, what)
    if hasattr(_backend.of(a, what), "apply"):
        raise ArrayError(f"{what} is a lazy array: write {what}.compute(), a weight is needed whole")
    name = dtype_name(a.dtype)
    if isinstance(a, np.ndarray):
        real_dtype("float64" if name in INTEGER else name, f"{what}.dtype")
        a = _plain(a)
        dtype = np.dtype("float64") if name in INTEGER else a.dtype.newbyteorder("=")
        a = np.array(a, dtype=dtype, order="C", subok=False)
        a.flags.writeable = False
    else:
        real_dtype(name, f"{what}.dtype")
    return a


def parameter(value: Any, what: str) -> Any:
    """A parameter as a layer keeps it: a Python float for one number, else an array `(features,)`, see `own`."""
    if value is None or isinstance(value, bool):
        raise DtypeError(f"{what} is {value!r}: it must be a number or an array (features,)")
    return float(value) if isinstance(value, int | float | np.floating | np.integer) else own(value, what)


class _Takes(Protocol):
    """What can be asked of a network before anything is computed: a `layers.Chain`."""

    dtype: str | None

    def check(self, shape: tuple[int, ...], /) -> None: ...
    def meet(self, adapter: Backend, /) -> None: ...


def default_dtype(adapter: Backend, /) -> str:
    """The real dtype that a library gives a list of floats."""
    return dtype_name(adapter.xp.__array_namespace_info__().default_dtypes()["real floating"])


def accept(x: Any, chain: _Takes, /) -> tuple[Array, str]:
    """x as an array (a nested list as NumPy's) and its dtype's name, refused where the network cannot take it.

    Complex, object, string, structured, extended and 8-bit values are refused.
    """
    if isinstance(x, list | tuple | int | float):
        x = from_list(x, "x")
    _backend.of(x)
    name = dtype_name(x.dtype)
    if name not in REAL and name not in INTEGER:
        raise DtypeError(f"x.dtype is {name}: convert x to a real dtype, {', '.join(REAL)}")
    chain.check(x.shape)
    return x, name


def arrive(
    x: Any, chain: _Takes, adapter: Backend | None = None, /, *, device: Any = None, dtype: Any = None
) -> tuple[Backend, Array, str]:
    """The backend, the array and the dtype name to compute with, for what a caller passed as x.

    x decides all three unless an argument does. Integers and bools take the network's dtype; a nested list takes the
    default real dtype of its library. Whatever is to be refused is refused before anything moves.
    """
    listed = isinstance(x, list | tuple | int | float)
    x, given = accept(x, chain)
    source = _backend.of(x)
    if adapter is None:
        adapter = source
    if dtype is not None:
        want = real_dtype(dtype)
    elif given in REAL and not listed:
        want = given
    else:
        want = (None if listed else chain.dtype) or default_dtype(adapter)
    chain.meet(adapter)
    if adapter is source and device is None and given == want:
        return adapter, x, want
    return adapter, move(x, adapter, dtype=want, device=device), want


def probe(adapter: Backend, dtype: str, device: Any) -> None:
    """Raises where the backend has no such device, or no such dtype there, before anything is moved."""
    _put(np.zeros(1, dtype="float32"), adapter, dtype, device)


def _put(a: Array, adapter: Backend, dtype: str, device: Any) -> Array:
    if isinstance(device, str) and device not in adapter.devices():
        name = _backend.name_of(adapter)
        raise DeviceError(f"{name} has no device {device!r} here: there is {', '.join(adapter.devices())}")
    try:
        return adapter.place(a, dtype=dtype, device=device)
    except NnfwdError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
        if device is None:
            raise
        name = _backend.name_of(adapter)  # each library refuses a device object in a way of its own
        raise DeviceError(f"{name} cannot place {dtype} on device {device!r}: {error}") from error


def move(a: Array, adapter: Backend, *, dtype: str, device: Any = None) -> Array:
    """An array of any library as an array of `adapter`'s, because the caller asked for it by an argument."""
    source = _backend.of(a)
    if source is adapter:
        return adapter.place(a, dtype=dtype, like=a) if device is None else _put(a, adapter, dtype, device)
    if not isinstance(a, np.ndarray):
        probe(adapter, dtype, device)  # before the way home, which may wait for a GPU or compute a graph
        a = source.to_numpy(a)
    return _put(_plain(a), adapter, dtype, device)


def _plain(a: np.ndarray) -> np.ndarray:
    """The array without ml_dtypes' bfloat16, which NumPy's other users do not know; float32 holds it exactly."""
    return a.astype("float32") if dtype_name(a.dtype) == "bfloat16" else a


def place(a: Array, adapter: Backend, dtype: str, like: Array | None, device: Any = None) -> Array:
    """One weight as `dtype`, next to the array `like` (or on `device`).

    Host weights are moved there; a weight that already lives in a library must be of x's library and on x's device.
    """
    if isinstance(a, np.ndarray):
        return adapter.place(a, dtype=dtype, like=like, device=device)
    meet(a, adapter)
    if like is not None:
        meet_device(a, like, adapter)
    return a if dtype_name(a.dtype) == dtype else adapter.place(a, dtype=dtype, like=a)


def meet_device(a: Array, x: Array, adapter: Backend) -> None:
    """Raises `DeviceError` where a weight and x, arrays of one library, are on two devices, or two sets of them."""
    here, there = _devices(a), _devices(x)
    if here is None or there is None or here == there:
        return
    several = [isinstance(devices, set | frozenset) for devices in (here, there)]
    if several[0] and not getattr(x, "committed", True):
        return  # the library takes x there by itself
    names = [", ".join(_names(adapter, devices)) for devices in (here, there)]
    move = "put both on the same devices" if any(several) else f"move one, with device={names[0]!r}"
    raise DeviceError(f"the weights are on {names[0]} and x is on {names[1]}: {move}")


def _devices(x: Array) -> Any:
    """The device of an array, a set where it is spread over several, None where it has none."""
    device = getattr(x, "device", None)
    every = getattr(device, "device_set", None)
    if every is None:
        return device
    return every if len(every) > 1 else next(iter(every))


def meet(a: Array, adapter: Backend) -> None:
    """Raises `ArrayError` where a weight lives in another library than x."""
    home = _backend.of(a)
    if home is not adapter:
        names = _backend.name_of(home), _backend.name_of(adapter)
        raise ArrayError(
            f"the weights are {names[0]} arrays and x is a {names[1]} array: "
            f"move one, with network.to({names[1]!r}) or backend={names[0]!r}"
        )


def device_name(adapter: Backend, x: Array, /) -> str | None:
    """The string of `adapter.devices()` for where x is, None where it is on no single device."""
    device = device_of(x)
    return None if device is None else _names(adapter, device)[0]


def _names(adapter: Backend, devices: Any) -> list[str]:
    """The strings of `adapter.devices()` that mean this device object, or a set of them."""
    among = devices if isinstance(devices, set | frozenset) else [devices]
    one = np.zeros(1, dtype="float32")
    every = adapter.devices()
    found = [n for n in every if device_of(adapter.place(one, dtype="float32", device=n)) in among]
    return found or [str(device) for device in among]
