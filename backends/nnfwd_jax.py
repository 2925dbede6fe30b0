"""JAX, on a CPU, a GPU or a TPU; inside the caller's own jit, grad and vmap as well.

Known to differ: subnormal numbers become 0 (not in float16). A float32 product uses TF32 on recent GPUs unless told
otherwise, which `scope` does. A quotient may be computed as a product with the reciprocal; inside the caller's own jit,
two scalar factors in a row may become one, whose overflow `net.compile` avoids. float64 exists only with x64 enabled,
and is refused otherwise, never narrowed. Networks placed on JAX are pytrees. A process forked once JAX is in use would
wait for ever for JAX's threads, on a CPU too: it is refused.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as xp
import numpy as np

from nnfwd import Activation, Dense, Network, Scale, Trace
from nnfwd.backend import in_use
from nnfwd.bounds import Arithmetic, tensor_cores
from nnfwd.errors import DtypeError
from nnfwd.layers import mapped

__all__ = ["arithmetic", "compile", "devices", "place", "scope", "to_numpy", "xp"]

for _cls in (Dense, Scale, Activation, Network):
    jax.tree_util.register_pytree_node_class(_cls)
jax.tree_util.register_dataclass(Trace, data_fields=["x", "z", "h"], meta_fields=[])


def _by_name() -> dict[str, Any]:
    """JAX's own names, `"cuda:0"`; older releases called a CPU TFRT_CPU_0."""
    return {str(d) if ":" in str(d) else f"{d.platform}:{d.id}": d for d in jax.devices()}


def devices() -> tuple[str, ...]:
    in_use("jax")
    return tuple(_by_name())


def place(a: Any, /, *, dtype: str, like: Any = None, device: Any = None) -> jax.Array:
    in_use("jax")
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise DtypeError(
            'jax has float64 only with x64 enabled: ask for dtype="float32", or enable it with '
            'jax.config.update("jax_enable_x64", True) or the environment variable JAX_ENABLE_X64=1'
        )
    if isinstance(a, jax.Array):
        a = a.astype(dtype)
        return a if device is None else jax.device_put(a, _by_name().get(device, device))
    # Weights may first be placed while the caller's function is traced: they must not become tracers of that trace.
    with jax.ensure_compile_time_eval():
        placed = xp.asarray(a, dtype=dtype)
        if device is None and like is not None and not isinstance(like, jax.core.Tracer):
            device = like.device if isinstance(like.device, jax.Device) else None  # a sharding replicates by itself
        return placed if device is None else jax.device_put(placed, _by_name().get(device, device))


def to_numpy(x: Any, /) -> np.ndarray:
    in_use("jax")
    return np.asarray(x.astype("float32") if x.dtype == "bfloat16" else x)


def scope(precision: str, x: Any, /) -> contextlib.AbstractContextManager[Any]:
    in_use("jax")
    return jax.default_matmul_precision(
        {"highest": "highest", "high": "tensorfloat32", "medium": "bfloat16"}[precision]
    )


def compile(forward: Callable[..., jax.Array], layers: Any, /) -> Callable[[jax.Array], jax.Array]:
    # Scalars are arguments too: XLA merges two constant factors in a row, and their product may overflow. They are
    # placed once, beside the weights, and everything is flattened once: a call passes a flat list and moves nothing.
    near = next(iter(jax.tree.leaves(layers)), None)
    scalars = [mapped(lambda value: _scalar(value, near), layer.scalars) for layer in layers]
    leaves, structure = jax.tree.flatten((layers, scalars))

    def traced(leaves: Any, x: jax.Array) -> jax.Array:
        layers, scalars = jax.tree.unflatten(structure, leaves)
        return forward([layer.replace(own) for layer, own in zip(layers, scalars, strict=True)], x)

    run = jax.jit(traced)

    def compiled(x: jax.Array) -> jax.Array:
        in_use("jax")
        return run(leaves, x)

    return compiled


def _scalar(value: float, near: Any) -> jax.Array:
    """A number on the device, beside an array and of its dtype; where there is none, of whatever dtype it meets."""
    return jax.device_put(value) if near is None else place(value, dtype=str(near.dtype), like=near)


def arithmetic(dtype: str, /, *, precision: str, device: str) -> Arithmetic:
    if not device.startswith("cpu"):  # from documentation, with the cautious errors of functions; not measured yet
        return Arithmetic(dtype, flushes=True, **tensor_cores(dtype, precision))
    products = {"u_acc": 2.0**-24} if dtype in ("float16", "bfloat16") else {}  # summed in float32
    # Every precision is true IEEE arithmetic on a CPU.
    return Arithmetic(dtype, flushes=dtype != "float16", ulp=ULP[dtype], **products)


# Largest errors of XLA's functions on CPUs in ulp, by `python -m nnfwd.ulp`: tanh without FMA, float16 log1p in 0.8.
ULP = {
    "float16": {"exp": 0.62, "expm1": 2.2, "log1p": 2.3, "log": 0.62, "tanh": 0.62, "erfc": 0.62},
    "bfloat16": {"exp": 0.62, "expm1": 0.62, "log1p": 0.62, "log": 0.62, "tanh": 0.62, "erfc": 0.62},
    "float32": {"exp": 6.5, "expm1": 6.8, "log1p": 3.0, "log": 1.4, "tanh": 8.5, "erfc": 7.7},
    "float64": {"exp": 2.1, "expm1": 5.7, "log1p": 2.3, "log": 1.2, "tanh": 10.5, "erfc": 7.0},
}
