"""The pass, once.

A feed-forward network takes x through its layers from left to right. A layer forms a weighted sum of its inputs and
bends it with an activation function:

    z = W h + b        Dense         h is x at first, then the output of the layer before
    h = f(z)

For many rows at once the same is one matrix product, z = h W^T + b. That is all there is, and it stands in `steps`,
written against the Python Array API standard. `xp` is the array library's namespace and is handed down; nothing here
names a library. Everything else in nnfwd prepares for these lines (`placement.py`: where arrays are; `layers.py`: do
the shapes fit; `network.py`: what a person holds), executes them well (`backends/`), or judges them (`reference.py`
says the same in plain Python loops, `bounds/` how far rounding may take the two apart).
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nnfwd import backend as _backend
from nnfwd import placement
from nnfwd.backend import Array
from nnfwd.layers import Chain, Dense, Layer, Scale


def steps(layers: Sequence[Layer], h: Array, xp: Any) -> Iterator[tuple[Array, Array]]:
    """Yields each layer's weighted sum z and activation h.

    h is `(rows, in)`; what is yielded is `(rows, out)`, or `(members, rows, out)` from the first ensemble layer on.
    """
    for layer in layers:
        if isinstance(layer, Dense):
            z = xp.matmul(h, xp.matrix_transpose(layer.weight))
            if layer.bias is not None:
                z = z + (layer.bias if layer.members is None else layer.bias[:, None, :])
        elif isinstance(layer, Scale):
            z = (h - layer.center) * layer.scale + layer.shift
        else:
            z = h
        h = layer.activation.compute(z, xp)
        yield z, h


def forward(layers: Sequence[Layer], x: Array, xp: Any) -> Array:
    """The plain pass: x `(..., in)` and placed layers of its library, device and dtype, to `(..., out)`.

    An ensemble gives `(members, ..., out)`.
    """
    output = x
    for _, h in steps(layers, _fold(x, xp), xp):
        output = h
    return _unfold(output, x, xp)


def _fold(x: Array, xp: Any) -> Array:
    """x `(..., in)` as `(rows, in)`: several libraries multiply wrongly or slowly above two dimensions."""
    if len(x.shape) == 1:
        return x[None, :]  # on NumPy a tenth of a reshape
    return x if len(x.shape) == 2 else xp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))


def _unfold(h: Array, x: Array, xp: Any) -> Array:
    """h `(rows, out)` or `(members, rows, out)` with the leading axes of x instead of the rows."""
    if len(x.shape) == 1:
        return h[..., 0, :]
    return h if len(x.shape) == 2 else xp.reshape(h, (*h.shape[:-2], *x.shape[:-1], h.shape[-1]))


def feed_forward(
    x: Any, layers: Any, /, *, backend: Any = None, device: Any = None, dtype: Any = None, precision: str = "highest"
) -> Array:
    """The output of the network for x.

    Args:
        x: `(..., in)`, an array of any library or a nested list of numbers. It decides library, device and dtype of the
            result; integers and bools take the network's dtype, a nested list the library's default real dtype.
        layers: a `Network`, or a sequence of layers (their arrays may be tracers: for gradients over the weights).
        backend: a name (`"jax"`) or a namespace module; x is moved there.
        device: one of the strings that `nnfwd backends --devices` prints, or the library's own device object.
        dtype: `"float16"`, `"bfloat16"`, `"float32"` or `"float64"`, or a dtype object of any library.
        precision: of matrix products: `"highest"`, true IEEE arithmetic of the dtype; `"high"`, TF32 allowed;
            `"medium"`, bfloat16 products allowed.

    Returns:
        `(..., out)`, or `(members, ..., out)` for an ensemble: an array of x's library, device and dtype.

    Raises:
        ShapeError, DtypeError, ArrayError, DeviceError, BackendError, UnknownNameError: before anything is computed.
    """
    _backend.check_precision(precision)
    chain = Chain.of(layers)
    asked = None if backend is None else _backend.load(backend)
    adapter, x, name = placement.arrive(x, chain, asked, device=device, dtype=dtype)
    apply = getattr(adapter, "apply", None)
    if apply is not None:
        return apply(functools.partial(feed_forward, precision=precision), chain, x)
    placed = chain.place(adapter, name, like=x)
    large = getattr(adapter, "large", None)
    if large is not None and chain.host and large(x):
        key = (_backend.name_of(adapter), str(placement.device_of(x)), name, precision)
        if key not in chain.ready:
            compiled = adapter.compile(functools.partial(scoped, adapter, precision), placed)  # type: ignore[attr-defined]
            chain.ready[key] = compiled
        return chain.ready[key](x)
    return scoped(adapter, precision, placed, x)


def scoped(adapter: _backend.Backend, precision: str, layers: Sequence[Layer], x: Array) -> Array:
    """The plain pass within what the backend puts around it."""
    with adapter.scope(precision, x):
        return forward(layers, x, adapter.xp)


@dataclass(frozen=True)
class Trace:
    """Every number of one pass. Arrays are of x's library, device and dtype."""

    x: Array
    """The input `(..., in)`."""
    z: tuple[Array, ...]
    """Each layer's weighted sum `(..., out)`."""
    h: tuple[Array, ...]
    """Each layer's activation `(..., out)`; the last one is the output."""

    @property
    def y(self) -> Array:
        """The output."""
        return self.h[-1]


def trace(layers: Any, x: Any, /, *, precision: str = "highest") -> Trace:
    """Every layer's weighted sum z and activation h for x `(..., in)`. Arguments and errors as `feed_forward`."""
    _backend.check_precision(precision)
    chain = Chain.of(layers)
    adapter, x, name = placement.arrive(x, chain)
    xp = adapter.xp
    placed = chain.place(adapter, name, like=x)
    with adapter.scope(precision, x):
        pairs = [(_unfold(z, x, xp), _unfold(h, x, xp)) for z, h in steps(placed, _fold(x, xp), xp)]
    return Trace(x, *zip(*pairs, strict=True))
