"""An array library that computes as some GPUs do: NumPy underneath, and what a device does to the numbers on top.

    tensor_cores   operands of float32 products cut off to TF32, or rounded to bfloat16, where the precision allows it; products
                   summed one by one in float32 by an adder that truncates; subnormal numbers become 0
    flushing       subnormal numbers become 0, in and out of every operation
    reversed       sums run from the last term to the first
    blocked        sums run in blocks of seven
    broken         computes as `fault` says, and says that it computes as NumPy does

It follows the array API standard as far as a pass goes.
"""

import contextlib
import contextvars
import types
from dataclasses import dataclass
from typing import Any

import numpy as np

DEVICES = ("tensor_cores", "flushing", "reversed", "blocked")
precision: contextvars.ContextVar[str] = contextvars.ContextVar("precision", default="highest")
fault: contextvars.ContextVar[str] = contextvars.ContextVar("fault", default="")
FAULTS = ("tf32", "bfloat16", "float32", "flushing", "transposed", "narrowed", "naive softplus", "tanh-gelu")

float16, float32, float64, bool = np.dtype("float16"), np.dtype("float32"), np.dtype("float64"), np.dtype("bool")


@contextlib.contextmanager
def set_to(variable: "contextvars.ContextVar[str]", value: str) -> Any:
    """The variable with another value, for the time of a block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@dataclass(frozen=True, eq=False)
class Array:
    """A NumPy array on a device."""

    a: np.ndarray
    device: str

    shape = property(lambda self: self.a.shape)
    ndim = property(lambda self: self.a.ndim)
    size = property(lambda self: self.a.size)
    dtype = property(lambda self: self.a.dtype)

    def __array_namespace__(self, api_version: str | None = None) -> types.ModuleType:
        import emulated

        return emulated

    def __getitem__(self, key: Any) -> "Array":
        return Array(self.a[key], self.device)


def _operator(name: str, f: Any) -> None:
    setattr(Array, f"__{name}__", lambda self, other: _apply(f, self, other))
    setattr(Array, f"__r{name}__", lambda self, other: _apply(f, other, self))


for _name, _f in {"add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.divide, "pow": np.power}.items():
    _operator(_name, _f)
for _name, _f in {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}.items():
    setattr(Array, f"__{_name}__", lambda self, other, f=_f: _apply(f, self, other))
Array.__neg__ = lambda self: _apply(np.negative, self)


def _apply(f: Any, *operands: Any) -> Array:
    (device,) = {x.device for x in operands if isinstance(x, Array)}
    values = [x.a if isinstance(x, Array) else x for x in operands]
    narrow = _does("float32", device) and any(v.dtype == "float64" for v in values if isinstance(v, np.ndarray))
    if narrow:
        values = [v.astype("float32") if isinstance(v, np.ndarray) and v.dtype == "float64" else v for v in values]
    y = np.asarray(f(*(_flushed(v, device) for v in values)))
    return Array(_flushed(y.astype("float64") if narrow and y.dtype == "float32" else y, device), device)


def _does(what: str, device: str) -> "np.bool":
    return np.bool(device == "broken" and fault.get() == what)


def _flushed(a: Any, device: str) -> Any:
    flushes = device in ("tensor_cores", "flushing") or _does("flushing", device)
    if not flushes or not isinstance(a, np.ndarray) or a.dtype.kind != "f":
        return a
    return np.where(np.abs(a) < np.finfo(a.dtype).tiny, np.copysign(0, a).astype(a.dtype), a)


def _operand(a: np.ndarray, bits: int) -> np.ndarray:
    """float32 values without their last bits: cut off for TF32 (13), rounded for bfloat16 (16)."""
    whole = a.view("uint32") + np.uint32(0x7FFF if bits == 16 else 0)
    return np.where(np.isfinite(a), (whole & np.uint32(0xFFFFFFFF << bits & 0xFFFFFFFF)).view("float32"), a)


def matmul(x: Array, y: Array, /) -> Array:
    a, b, device = _flushed(x.a, x.device), _flushed(y.a, y.device), x.device
    assert y.device == device
    bits = {"highest": 0, "high": 13, "medium": 16}[precision.get()] if device == "tensor_cores" else 0
    bits = 13 if _does("tf32", device) else 16 if _does("bfloat16", device) else bits
    if a.dtype == "float32" and bits:
        a, b = (_operand(np.ascontiguousarray(v), bits) for v in (a, b))
    if _does("transposed", device) and b.shape[-2] == b.shape[-1]:
        b = np.swapaxes(b, -1, -2)
    if _does("float32", device):
        z = np.matmul(a.astype("float32"), b.astype("float32")).astype(a.dtype)
    elif device == "tensor_cores" and (bits or a.dtype == "float16"):
        z = _truncating(a, b)
    elif device in ("reversed", "blocked") and a.dtype != "float16":
        z = _in_order(a, b, device)
    else:
        z = np.matmul(a, b)
    if _does("narrowed", device):
        z = z.astype("float16")
    return Array(_flushed(z, device), device)


def _truncating(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    z = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]))
    for j in range(a.shape[-1]):
        z = z + a[..., :, j, None].astype("float64") * b[..., j, None, :].astype("float64")
        cut = (z.view("uint64") & np.uint64(0xFFFFFFFFE0000000)).view("float64")
        z = np.where(np.isfinite(z), cut, z)
        z = np.where(np.abs(z) > np.finfo("float32").max, np.copysign(np.inf, z), z)
    return z.astype(a.dtype)


def _in_order(a: np.ndarray, b: np.ndarray, device: str) -> np.ndarray:
    n = a.shape[-1]
    blocks = [[j] for j in reversed(range(n))]
    if device == "blocked":
        blocks = [list(range(n))[start : start + 7] for start in range(0, n, 7)]
    z = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), a.dtype)
    for block in blocks:
        z = z + np.matmul(a[..., block], b[..., block, :])
    return z


def matrix_transpose(x: Array, /) -> Array:
    return Array(np.swapaxes(x.a, -1, -2), x.device)


def reshape(x: Array, /, shape: tuple[int, ...]) -> Array:
    return Array(x.a.reshape(shape), x.device)


def _named(f: Any) -> Any:
    return lambda *operands: _apply(f, *operands)


exp, expm1, log, tanh = map(_named, (np.exp, np.expm1, np.log, np.tanh))
maximum, minimum, where, abs, round = map(_named, (np.maximum, np.minimum, np.where, np.abs, np.round))


def log1p(x: Array, /) -> Array:
    return _apply((lambda a: np.log(1 + a)) if _does("naive softplus", x.device) else np.log1p, x)


def max(x: Array, /, *, axis: int, keepdims: Any = False) -> Array:
    return _apply(lambda a: np.max(a, axis=axis, keepdims=keepdims), x)


def sum(x: Array, /, *, axis: int, keepdims: Any = False) -> Array:
    return _apply(lambda a: np.sum(a, axis=axis, keepdims=keepdims), x)


def astype(x: Array, dtype: np.dtype, /) -> Array:
    return Array(_flushed(x.a.astype(dtype), x.device), x.device)


def asarray(a: Any, /, *, dtype: Any = None, device: str | None = None) -> Array:
    if isinstance(a, Array):
        device, a = device or a.device, a.a
    return Array(np.array(a, dtype=dtype), device or DEVICES[0])


finfo = np.finfo
isdtype = np.isdtype


def __array_namespace_info__() -> Any:  # noqa: N807
    return types.SimpleNamespace(
        devices=lambda: DEVICES,
        default_device=lambda: DEVICES[0],
        default_dtypes=lambda *, device=None: {"real floating": float64},
        dtypes=lambda *, device=None, kind=None: {"float16": float16, "float32": float32, "float64": float64},
    )
