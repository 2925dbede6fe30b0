"""JAX, on a CPU, a GPU or a TPU; inside the caller's own jit, grad and vmap as well.

Known to differ: subnormal numbers become 0 (not in float16). A float32 product uses TF32 on recent GPUs unless told
otherwise, which `scope` does. A quotient may be computed as a product with the reciprocal; inside the caller's own jit,
two scalar factors in a row may become one, whose overflow `net.compile` avoids. float64 exists only with x64 enabled,
and is refused otherwise, never narrowed. Networks placed on JAX are pytrees. A process forked once JAX is in use would
wait for ever for JAX's threads, on a CPU too: it is refused.

`net.compile` compiles once for every shape of x, in about 0.1 s, and networks of one structure share what was compiled
until the last of them is gone. x with ever other numbers of rows does not compile for ever on a CPU: from the ninth
shape on, its rows are taken in pieces of a few sizes, each compiled once: a call takes 0.2 to 0.5 ms longer, or a
fifth, and waits for its result. On a GPU every number of rows is compiled, since JAX would compile the cutting and
joining for each as well: pad x yourself. A callable of your own as an activation may mean something else next time, or
mix rows: it is neither shared nor cut.

Several devices: host weights are placed once on every device of a sharded x; sharded weights stay as they are. Leading
axes of x are folded into one, so only the first of them stays sharded. `device=` of `net.compile` may be devices or a
`jax.sharding.Mesh`: see `_Spread`.
"""

import contextlib
import functools
import math
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nnfwd import Activation, Dense, Network, Scale, Trace
from nnfwd.backend import in_use
from nnfwd.bounds import Arithmetic, tensor_cores
from nnfwd.errors import DeviceError, DtypeError
from nnfwd.layers import mapped

__all__ = ["arithmetic", "compile", "devices", "place", "scope", "spread", "to_numpy", "xp"]

for _cls in (Dense, Scale, Activation, Network):
    jax.tree_util.register_pytree_node_class(_cls)
jax.tree_util.register_dataclass(Trace, data_fields=["x", "z", "h"], meta_fields=[])


# Where the axes of a mesh are explicit, as `jax.make_mesh` makes them, JAX asks how a sum over a divided axis is
# divided: as its other axes are.
def _matmul(a: jax.Array, b: jax.Array, /) -> jax.Array:
    left, right = jax.typeof(a).sharding, jax.typeof(b).sharding
    product: Callable[..., jax.Array] = jax.numpy.matmul
    if left.spec[-1] is not None or right.spec[-2] is not None:
        mesh = right.mesh if left.spec[-1] is None else left.mesh
        members = max(left.spec, right.spec, key=len)[:-2]
        spec = PartitionSpec(*members, left.spec[-2], right.spec[-1])
        product = jax.sharding.auto_axes(product, axes=mesh.axis_names, out_sharding=NamedSharding(mesh, spec))
    return product(a, b)


xp: Any = types.SimpleNamespace(**{**vars(jax.numpy), "matmul": _matmul})


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
        return a if device is None else jax.device_put(a, _home(device))
    # Weights may first be placed while the caller's function is traced: they must not become tracers of that trace.
    with jax.ensure_compile_time_eval():
        if device is None and like is not None and not isinstance(like, jax.core.Tracer):
            device = like.device
            if isinstance(device, jax.sharding.Sharding):  # several devices
                device = getattr(device, "mesh", None)
        # A copy of its own, which nobody changes while it is read, and from which each device takes its part.
        return jax.device_put(np.array(a, dtype=xp.dtype(dtype)), _home(device))


def _home(device: Any) -> Any:
    """Where JAX is to put an array that is asked to be on a device, or whole on each of several."""
    mesh = _mesh(device)
    if mesh is not None:
        return NamedSharding(mesh, PartitionSpec())
    return _by_name()[device] if isinstance(device, str) else device


def _mesh(device: Any) -> Mesh | None:
    """Several devices as a mesh; None for a single one."""
    if isinstance(device, Mesh):
        return device
    if not isinstance(device, list | tuple):
        return None
    known = _by_name()
    for one in device:
        if isinstance(one, str) and one not in known:
            raise DeviceError(f"jax has no device {one!r} here: there is {', '.join(known)}")
    every = [known.get(one, one) for one in device]
    if not every or len(set(every)) < len(every):
        raise DeviceError(f"device is {device!r}: it must be one or more devices, each once")
    return Mesh(np.array(every), ("rows",))


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
    # placed once, beside the weights, and everything is flattened once: a call passes arrays only and moves nothing.
    near = next(iter(jax.tree.leaves(layers)), None)
    scalars = [mapped(lambda value: _scalar(value, near), layer.scalars) for layer in layers]
    leaves, structure = jax.tree.flatten((layers, scalars))
    leaves = [_swapped(a) for a in leaves]
    own = all(layer.is_named for layer in layers)  # equal structures compute the same, and each row by itself
    program = _Program(forward, structure, own and all(len(a.sharding.device_set) == 1 for a in leaves))
    if own:
        parts = (forward.func, *forward.args) if isinstance(forward, functools.partial) else (forward,)
        key = (parts, structure, tuple((a.shape, a.dtype, a.sharding) for a in leaves))
        program = _programs.setdefault(key, program)
    run, shapes = functools.partial(program.run, *leaves), program.shapes

    def compiled(x: jax.Array) -> jax.Array:
        in_use("jax")
        return run(x) if x.shape in shapes else program.first(run, x)

    return compiled


def _swapped(a: jax.Array) -> jax.Array:
    """A weight `(out, in)` as `(in, out)`, and back: for a single row, XLA would copy it over in every call."""
    return xp.matrix_transpose(a) if a.ndim > 1 else a


EXACT = 8  # so many shapes of x are compiled as they come; then rows are taken in pieces


class _Program:
    """The compiled pass of all networks of one structure, shapes and dtype. It holds no weights: they are arguments."""

    def __init__(self, forward: Callable[..., jax.Array], structure: Any, cuts: bool) -> None:
        def traced(*arrays: jax.Array) -> jax.Array:
            *leaves, x = arrays
            layers, scalars = jax.tree.unflatten(structure, map(_swapped, leaves))
            return forward([layer.replace(numbers) for layer, numbers in zip(layers, scalars, strict=True)], x)

        self.run = jax.jit(traced)
        self.shapes: set[tuple[int, ...]] = set()  # of x, compiled as they came
        self.cuts = cuts  # whether it may be run on some rows after others

    def first(self, run: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        """The output for x of a shape that is not compiled; `run` has the weights."""
        if isinstance(x, jax.core.Tracer):  # part of the caller's own program
            return run(x)
        if self.cuts and len(self.shapes) >= EXACT and [device.platform for device in x.devices()] == ["cpu"]:
            return _in_pieces(run, x)
        self.shapes.add(x.shape)
        return run(x)


# A program lives as long as a compiled network holds it, and JAX drops its code with it.
_programs: weakref.WeakValueDictionary[Any, _Program] = weakref.WeakValueDictionary()


def _in_pieces(run: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """The output for x `(..., in)` on a CPU: NumPy cuts rows off and joins them, which JAX would compile every time."""
    device = x.sharding if x.committed else None
    rows = np.asarray(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
    pieces = [np.asarray(run(jax.device_put(piece, device))) for piece in _pieces(rows)]
    h = np.concatenate(pieces, axis=-2)[..., : len(rows), :]
    return jax.device_put(h.reshape(*h.shape[:-2], *x.shape[:-1], h.shape[-1]), device)


def _step(n: int) -> int:
    """How far apart the sizes are that are compiled around n rows."""
    return max(16, 1 << max(n.bit_length() - 3, 0))


def _down(n: int) -> int:
    return n // _step(n) * _step(n)


def _pieces(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Rows `(rows, in)` in pieces of few sizes, four in an octave; the last is filled up with its last row.

    One piece of few rows, else two: filling up all of many rows would copy them, and compute up to a quarter more. Not
    filled with zeros, which could make a NaN where x makes none (under `jax_debug_nans` an error).
    """
    whole = _down(len(rows)) if len(rows) > 1024 else 0
    if whole or not len(rows):
        yield rows[:whole]
    if rest := len(rows) - whole:
        size = _down(rest + _step(rest) - 1)
        filled = np.empty((size, rows.shape[1]), rows.dtype)
        filled[:rest] = rows[whole:]
        filled[rest:] = rows[-1]
        yield filled


class _Spread:
    """A pass over several devices: the rows of x are divided over the first axis of a mesh, pairs of weights over the
    second, where it has one.

    x may be a NumPy array, of which each device is given its rows, or on these devices, and then stays as it is. Rows
    that do not divide are filled up with the last one, and the result is whole on each device; where a callable of the
    caller's might mix rows, x is whole too, as a vector is and no rows are.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.parts = mesh.devices.shape[1] if mesh.devices.ndim == 2 else 1

    def weight(self, axes: int, axis: int | None, /) -> NamedSharding:
        spec: list[str | None] = [None] * axes
        if axis is not None:
            spec[axis] = self.mesh.axis_names[1]
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def compiled(self, run: Callable[[jax.Array], jax.Array], dtype: str, named: bool, /) -> Callable[[Any], jax.Array]:
        count, first = self.mesh.devices.shape[0], self.mesh.axis_names[0]
        whole, divided = (NamedSharding(self.mesh, PartitionSpec(*spec)) for spec in ((), (first,)))

        def compiled(x: Any) -> jax.Array:
            if self._has(x):
                return run(x if x.dtype == dtype else x.astype(dtype))
            short = -x.shape[0] % count
            if len(x.shape) == 1 or not len(x) or (short and not named):  # JAX 0.8 cannot divide no rows
                return run(place(x, dtype=dtype, device=whole))
            if not short:
                return run(place(x, dtype=dtype, device=divided))
            library = xp if isinstance(x, jax.Array) else np
            filled = library.pad(x, [(0, short)] + [(0, 0)] * (len(x.shape) - 1), mode="edge")
            y = jax.device_put(run(place(filled, dtype=dtype, device=divided)), whole)
            return y[(*[slice(None)] * (y.ndim - x.ndim), slice(x.shape[0]))]

        return compiled

    def _has(self, x: Any) -> bool:
        """Whether x is on these devices, or part of the caller's own program."""
        if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
            return isinstance(x, jax.Array)
        if not isinstance(x.sharding, NamedSharding):
            return False
        mesh = x.sharding.mesh
        implicit = set(mesh.axis_types) == set(self.mesh.axis_types) == {jax.sharding.AxisType.Auto}
        return mesh == self.mesh or (implicit and list(mesh.devices.flat) == list(self.mesh.devices.flat))


def spread(device: Any, /) -> _Spread | None:
    mesh = _mesh(device)
    if mesh is None:
        return None
    if mesh.devices.ndim > 2:
        raise DeviceError(f"device is a mesh of {mesh.devices.ndim} axes: give one of rows, or of rows and pairs")
    return _Spread(mesh)


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
