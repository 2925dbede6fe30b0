"""PyTorch, on a CPU or a GPU, with its autograd and under `torch.compile(fullgraph=True)`.

Known to differ: the precision of float32 products is a setting of the whole process, seen by every thread. It is read
and never changed: a setting looser than the precision asked for raises, naming the call to make. So does autocast,
under which a product would not have the dtype of its operands. bfloat16 products flush subnormal numbers to 0. A
process forked once CUDA is in use is refused CUDA; on a CPU, one forked once PyTorch's threads are in use waits for
ever in a large product, unless it calls `torch.set_num_threads(1)` first.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import array_api_compat.torch
import numpy as np
import torch

from nnfwd.backend import forked
from nnfwd.bounds import Arithmetic, tensor_cores
from nnfwd.errors import BackendError

__all__ = ["arithmetic", "devices", "keeps", "place", "scope", "to_numpy", "xp"]


# array-api-compat asks for the result type of a tensor and a scalar, which breaks the graph under torch.compile. Not
# clamp: where a equals b, the gradient is to be shared between the two, as in maximum everywhere else.
def _maximum(a: torch.Tensor, b: Any, /) -> torch.Tensor:
    return torch.maximum(a, b if isinstance(b, torch.Tensor) else a.new_full((), b))


def _minimum(a: torch.Tensor, b: Any, /) -> torch.Tensor:
    return torch.minimum(a, b if isinstance(b, torch.Tensor) else a.new_full((), b))


xp: Any = types.SimpleNamespace(
    **{**vars(array_api_compat.torch), "maximum": _maximum, "minimum": _minimum, "where": torch.where}
)


def devices() -> tuple[str, ...]:
    return ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _lost(device: str) -> bool:
    """Whether devices of this type were in use when this process was forked, and cannot be used in it."""
    return device == "cuda" and torch.cuda._is_in_bad_fork()


def place(a: Any, /, *, dtype: str, like: Any = None, device: Any = None) -> torch.Tensor:
    if device is None and like is not None:
        device = like.device
    if device is not None and _lost(torch.device(device).type):
        raise forked("torch")
    if isinstance(a, torch.Tensor):
        return a.to(device=device, dtype=getattr(torch, dtype))
    # A weight first placed in inference mode would be refused by autograd ever after.
    with torch.inference_mode(False):
        if torch.compiler.is_compiling():
            return torch.as_tensor(a.copy()).to(device=device, dtype=getattr(torch, dtype))
        return torch.tensor(a, device=device, dtype=getattr(torch, dtype))


def keeps(a: Any, /) -> bool:
    return type(a) is torch.Tensor  # not a tensor of torch.export or functorch, which is dead after the trace


def to_numpy(x: Any, /) -> np.ndarray:
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _setting(device: str) -> str:
    """The loosest precision that the process-wide settings allow for float32 products there, or `"autocast"`."""
    if torch.is_autocast_enabled(device):
        return "autocast"
    matmul = torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul
    return {"bf16": "medium", "tf32": "high"}.get(matmul.fp32_precision, "highest")


@contextlib.contextmanager
def scope(precision: str, x: torch.Tensor, /) -> Iterator[None]:
    allowed = {"highest": ("highest",), "high": ("highest", "high"), "medium": ("highest", "high", "medium")}[precision]
    if _lost(x.device.type):
        raise forked("torch")
    setting = _setting(x.device.type)
    if setting == "autocast":
        raise BackendError("torch.autocast would change the dtype of the products: leave it for this call")
    if setting not in allowed and x.dtype == torch.float32:
        raise BackendError(
            f'precision="{precision}" was asked for and torch is set to "{setting}": '
            f'call torch.set_float32_matmul_precision("{precision}"), or ask for precision="{setting}"'
        )
    yield


def _narrow_sums(dtype: str) -> bool:
    """Whether the process-wide settings let partial sums of 16-bit products be kept in 16 bits, as they do at first."""
    name = {"float16": "allow_fp16_reduced_precision_reduction", "bfloat16": "allow_bf16_reduced_precision_reduction"}
    return bool(getattr(torch.backends.cuda.matmul, name[dtype]))


def arithmetic(dtype: str, /, *, precision: str, device: str) -> Arithmetic:
    if device.startswith("cuda"):  # from documentation, with the cautious errors of functions; not measured yet
        products = tensor_cores(dtype, precision)
        if dtype in ("float16", "bfloat16") and _narrow_sums(dtype):
            products = {}
        return Arithmetic(dtype, flushes=True, **products)
    products = {"u_acc": 2.0**-24} if dtype in ("float16", "bfloat16") else tensor_cores(dtype, precision)
    # The dot product instructions of x86 for bfloat16 (VDPBF16PS) flush subnormals, whatever the processor's mode.
    return Arithmetic(dtype, flushes=dtype == "bfloat16" or bool(products.get("u_in")), ulp=ULP[dtype], **products)


# Largest errors of PyTorch's functions on CPUs in ulp, by `python -m nnfwd.ulp`.
ULP = {
    "float16": {"exp": 0.62, "expm1": 0.62, "log1p": 0.62, "log": 0.62, "tanh": 0.62, "erfc": 0.62},
    "bfloat16": {"exp": 0.62, "expm1": 0.62, "log1p": 0.62, "log": 0.62, "tanh": 0.62, "erfc": 0.62},
    "float32": {"exp": 1.2, "expm1": 1.2, "log1p": 1.2, "log": 1.2, "tanh": 1.2, "erfc": 1.2},
    "float64": {"exp": 1.2, "expm1": 1.2, "log1p": 1.2, "log": 1.2, "tanh": 1.2, "erfc": 1.2},
}
