"""Layers: a Dense layer, an element-wise scaling, an activation of its own; and the chain they make.

A layer holds arrays and checks their shapes once, at construction. It computes nothing: the pass is in `forward.py`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from nnfwd import activations, placement
from nnfwd import backend as _backend
from nnfwd.activations import Function, shown
from nnfwd.backend import Array, Backend, Spread
from nnfwd.errors import ArrayError, ShapeError

Parameters = dict[str, Any]
"""A layer's arrays by name: `{"weight": ..., "bias": ..., "activation": {"negative_slope": ...}}`."""


class Layer:
    """A weighted sum and an activation. Immutable; compares by content."""

    __slots__ = ("_array_names", "activation")
    fields: ClassVar[tuple[str, ...]] = ()
    activation: Function
    _array_names: tuple[str, ...]  # which fields are arrays, fixed at construction

    in_features: int | None
    """Width it takes; None takes any."""
    out_features: int | None
    """Width it gives; None gives what it takes."""
    members: int | None = None
    """Number of ensemble members, None for a single network."""

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a {type(self).__name__} is immutable: make another one")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a {type(self).__name__} is immutable: make another one")

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def parameters(self) -> Parameters:
        """The arrays, by name (a scalar or an absent one is part of the structure, not a parameter)."""
        arrays: Parameters = {name: getattr(self, name) for name in self._array_names}
        inside = self.activation.arrays
        return arrays | {"activation": inside} if inside else arrays

    @property
    def scalars(self) -> Parameters:
        """The numbers that are no arrays, by name, nested as `parameters`."""
        given = {name: getattr(self, name) for name in self.fields if name not in self._array_names}
        numbers: Parameters = {name: value for name, value in given.items() if value is not None}
        inside = {k: v for k, v in self.activation.parameters.items() if k not in self.activation.arrays}
        return numbers | {"activation": inside} if inside else numbers

    @property
    def structure(self) -> tuple[Any, ...]:
        """What it is without its arrays: hashable, and equal for equal layers."""
        scalars = tuple((name, getattr(self, name)) for name in self.fields if name not in self._array_names)
        return (scalars, self._array_names, self.activation.structure)

    @property
    def is_named(self) -> bool:
        """Whether no callable of the caller's is in it: then each row of the result is that of the same row alone."""
        return self.activation.is_named

    def replace(self, parameters: Parameters, /) -> Self:
        """The same layer with other arrays; nothing is checked (they may be tracers)."""
        layer = object.__new__(type(self))
        layer._set(**{name: parameters.get(name, getattr(self, name)) for name in self.fields})
        layer._set(activation=self.activation.with_arrays(parameters.get("activation", {})))
        layer._set(_array_names=self._array_names)
        return layer

    def rounded(self, dtype: str, /) -> Self:
        """The same layer with its scalars rounded to a dtype, so that no library rounds them in a way of its own."""
        own = {name: value for name, value in self.scalars.items() if name != "activation"}
        layer = self.replace({name: placement.nearest(value, dtype) for name, value in own.items()})
        layer._set(activation=self.activation.rounded(dtype))
        return layer

    def member(self, m: int, /) -> Self:
        """What one member of an ensemble has of it; all members share a layer without a members axis."""
        if self.members is None:
            return self
        return self.replace({name: array[m, ...] for name, array in self.parameters.items() if name != "activation"})

    def renew(self, parameters: Parameters, /) -> "Layer":
        """The same layer with other arrays, checked as at construction."""
        values = {name: parameters.get(name, getattr(self, name)) for name in self.fields}
        if not isinstance(self, Scale):
            values["activation"] = self.activation(**parameters.get("activation", {}))
        return type(self)(**values)

    # The protocol of JAX's pytrees, and of others that took it over. Unflattening validates nothing.
    def tree_flatten(self) -> tuple[tuple[Parameters], tuple[Any, ...]]:
        return (self.parameters,), self.structure

    @classmethod
    def tree_unflatten(cls, structure: tuple[Any, ...], children: tuple[Parameters]) -> Self:
        layer = object.__new__(cls)
        scalars, array_names, (name, formula, settings, inner) = structure
        arrays = children[0] if isinstance(children[0], dict) else {}
        layer._set(
            **(dict.fromkeys(cls.fields) | dict(scalars) | {k: arrays.get(k) for k in arrays if k in cls.fields})
        )
        layer._set(activation=Function(name, formula, dict(settings) | arrays.get("activation", {}), inner))
        layer._set(_array_names=array_names)
        return layer

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layer):
            return NotImplemented
        return (
            type(self) is type(other) and self.structure == other.structure and same(self.parameters, other.parameters)
        )

    def __hash__(self) -> int:
        return hash((type(self), self.structure))

    def __reduce__(self) -> tuple[Any, ...]:
        values = tuple(getattr(self, name) for name in self.fields)
        return (_restore, (type(self), values, self._array_names, self.activation))


def _restore(cls: type[Layer], values: tuple[Any, ...], array_names: tuple[str, ...], function: Function) -> Layer:
    layer = object.__new__(cls)
    for value in values:
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    layer._set(**dict(zip(cls.fields, values, strict=True)), activation=function, _array_names=array_names)
    return layer


def same(a: Any, b: Any, /) -> bool:
    """Whether two arrays, or nested dicts of them, are the same: names, dtypes and contents (NaN equals NaN)."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if _backend.of(a) is not _backend.of(b):
        return False
    return bool(a.dtype == b.dtype) and np.array_equal(to_numpy(a), to_numpy(b), equal_nan=True)


def to_numpy(a: Array) -> np.ndarray:
    """An array of any library as a NumPy array."""
    return _backend.of(a).to_numpy(a)


class Dense(Layer):
    """A fully connected layer, h = f(W x + b).

    Args:
        weight: `(out, in)`, or `(members, out, in)` for an ensemble in which every member sees the same x. The
            orientation is never guessed: PyTorch stores it this way, Keras and scikit-learn store `(in, out)`.
        bias: `(out,)`, or `(members, out)`; None for no bias.
        activation: a name, an `activations.Function`, or a callable `f(x, /, *, xp)`.

    NumPy arrays and nested lists are copied and made read-only; arrays of other libraries are kept as they are.

    Raises:
        ShapeError: where the shapes do not fit, or a width is zero.
        DtypeError, ArrayError, UnknownNameError: for what is not a real array, or not an activation.
    """

    __slots__ = ("bias", "weight")
    fields = ("weight", "bias")
    weight: Array
    bias: Array | None

    def __init__(self, weight: Any, bias: Any = None, activation: Any = "identity") -> None:
        weight = placement.own(weight, "weight")
        if len(weight.shape) not in (2, 3):
            raise ShapeError(f"weight {weight.shape} must be (out, in), or (members, out, in) for an ensemble")
        if 0 in weight.shape:
            raise ShapeError(f"weight {weight.shape} has a width of zero")
        if bias is not None:
            bias = placement.own(bias, "bias")
            if tuple(bias.shape) != tuple(weight.shape[:-1]):
                raise ShapeError(
                    f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}: "
                    f"it must be {tuple(weight.shape[:-1])}"
                )
        function = activations.get(activation)
        _check_features(function.arrays, weight.shape[-2], f"an activation of weight {tuple(weight.shape)}")
        self._set(weight=weight, bias=bias, activation=function)
        self._set(_array_names=("weight",) if bias is None else ("weight", "bias"))

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return int(self.weight.shape[-1])

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return int(self.weight.shape[-2])

    @property
    def members(self) -> int | None:  # type: ignore[override]
        return int(self.weight.shape[0]) if len(self.weight.shape) == 3 else None

    def __repr__(self) -> str:
        bias = "" if self.bias is not None else ", no bias"
        shape = getattr(self.weight, "shape", None)
        if shape is None or len(shape) not in (2, 3):  # a pytree of something else
            return f"Dense({self.weight!r}{bias}, {self.activation!r})"
        ensemble = f"{self.members} x " if self.members else ""
        return f"Dense({ensemble}{self.in_features} -> {self.out_features}{bias}, {self.activation!r})"


class Scale(Layer):
    """An element-wise `(x - center) * scale + shift`: standardised inputs, batch normalisation, denormalised outputs.

    Each is a number or an array `(features,)`. It is never folded into a neighbour: the rounding would differ.

    Raises:
        ShapeError: where an array is not `(features,)`, or two of them differ.
        DtypeError, ArrayError: for what is not a real array.
    """

    __slots__ = ("center", "scale", "shift")
    fields = ("scale", "center", "shift")
    scale: Any
    center: Any
    shift: Any

    def __init__(self, scale: Any, *, center: Any = 0.0, shift: Any = 0.0) -> None:
        given = {"scale": scale, "center": center, "shift": shift}
        values = {k: placement.parameter(v, k) for k, v in given.items()}
        arrays = {k: v for k, v in values.items() if not isinstance(v, float)}
        width = next((v.shape[0] for v in arrays.values() if len(v.shape) == 1), None)
        _check_features(arrays, width, "a Scale")
        self._set(**values, activation=activations.get("identity"), _array_names=tuple(arrays))

    @property
    def in_features(self) -> int | None:  # type: ignore[override]
        return next((int(v.shape[0]) for v in self.parameters.values()), None)

    @property
    def out_features(self) -> int | None:  # type: ignore[override]
        return self.in_features

    def __repr__(self) -> str:
        values = (f"{k}={shown(v)}" for k, v in self._shown())
        return f"Scale({', '.join(values)})"

    def _shown(self) -> list[tuple[str, Any]]:
        values = [(name, getattr(self, name)) for name in self.fields]
        return [(k, v) for k, v in values if k == "scale" or not (isinstance(v, float) and v == 0)]


class Activation(Layer):
    """An activation as a layer of its own: after a `Scale`, or before the first Dense layer.

    Raises:
        UnknownNameError, DtypeError, ShapeError: see `activations.get`; an array parameter must be `(features,)`.
    """

    __slots__ = ()

    def __init__(self, activation: Any) -> None:
        function = activations.get(activation)
        arrays = function.arrays
        width = next((v.shape[0] for v in arrays.values() if len(v.shape) == 1), None)
        _check_features(arrays, width, "an Activation")
        self._set(activation=function, _array_names=())

    @property
    def in_features(self) -> int | None:  # type: ignore[override]
        return next((int(v.shape[0]) for v in self.activation.arrays.values()), None)

    @property
    def out_features(self) -> int | None:  # type: ignore[override]
        return self.in_features

    def __repr__(self) -> str:
        return f"Activation({self.activation!r})"


def _check_features(arrays: Mapping[str, Array], width: int | None, where: str) -> None:
    for name, array in arrays.items():
        if width == 0:
            raise ShapeError(f"{name} {tuple(array.shape)} of {where} has a width of zero")
        if tuple(array.shape) != (width,):
            needed = "(features,)" if width is None else f"({width},)"
            raise ShapeError(f"{name} {tuple(array.shape)} of {where} must be {needed}")


class Chain:
    """Layers whose shapes fit, and their copies placed on devices.

    Raises `ShapeError` naming the first layer that does not fit, `ArrayError` for weights of two libraries.
    """

    __slots__ = ("dtype", "host", "in_features", "layers", "members", "out_features", "placed", "ready")

    def __init__(self, layers: Iterable[Layer]) -> None:
        if not isinstance(layers, Iterable):
            raise ArrayError(f"layers is a {type(layers).__name__}: it must be a Network or a list of layers")
        self.layers = tuple(layers)
        if not self.layers:
            raise ShapeError("a network needs at least one layer")
        self.in_features: int | None = None
        self.out_features: int | None = None
        self.members: int | None = None
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, Layer):
                raise ArrayError(f"layer {i} is a {type(layer).__name__}: it must be Dense, Scale or Activation")
            if None not in (self.out_features, layer.in_features) and self.out_features != layer.in_features:
                raise ShapeError(f"layer {i}: {_shape(layer)} cannot take x (..., {self.out_features})")
            if None not in (self.members, layer.members) and self.members != layer.members:
                raise ShapeError(f"layer {i}: {layer.members} ensemble members do not fit {self.members}")
            if self.in_features is None and self.out_features is None:
                self.in_features = layer.in_features
            self.out_features = layer.out_features or self.out_features
            self.members = layer.members or self.members
        arrays = [a for layer in self.layers for a in leaves(layer.parameters)]
        libraries = sorted({_backend.name_of(_backend.of(a)) for a in arrays})
        if len(libraries) > 1:
            raise ArrayError(f"the weights are arrays of {' and '.join(libraries)}: a network lives in one library")
        self.dtype: str | None = placement.widest([placement.dtype_name(a.dtype) for a in arrays]) if arrays else None
        self.host = all(isinstance(a, np.ndarray) for a in arrays)
        self.placed: dict[tuple[str, Any, str], tuple[Layer, ...]] = {}
        self.ready: dict[tuple[str, ...], Callable[[Array], Array]] = {}  # placed copies, compiled for large x

    @classmethod
    def of(cls, layers: Any) -> "Chain":
        """The chain of a network, or of a sequence of layers."""
        if isinstance(layers, cls):
            return layers
        return layers.chain if hasattr(layers, "chain") else cls(layers)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises `ShapeError` unless an array of this shape can go in."""
        if not shape or (self.in_features is not None and shape[-1] != self.in_features):
            first = next((i, layer) for i, layer in enumerate(self.layers) if layer.in_features or not shape)
            needed = "(..., features)" if self.in_features is None else f"(..., {self.in_features})"
            raise ShapeError(f"layer {first[0]}: {_shape(first[1])} cannot take x {tuple(shape)}: x must be {needed}")
        if shape[-1] == 0:
            raise ShapeError(f"x {tuple(shape)} has no features")

    def meet(self, adapter: Backend) -> None:
        """Raises `ArrayError` where the weights live in another library than `adapter`'s."""
        if not self.host and not hasattr(adapter, "apply"):
            for layer in self.layers:
                for a in leaves(layer.parameters):
                    placement.meet(a, adapter)

    def place(self, adapter: Backend, dtype: str, like: Array | None, device: Any = None) -> tuple[Layer, ...]:
        """The layers with every array as `dtype`, next to the array `like` (or on `device`).

        Copies of host weights are kept, keyed by backend, device or mesh of devices, and dtype.
        """
        if not self.host:
            return self.moved(adapter, dtype, like, device)
        where = str(device) if like is None else placement.where(like)
        key = (_backend.name_of(adapter), where, dtype)
        layers = self.placed.get(key)
        if layers is None:
            layers = self.moved(adapter, dtype, like, device)
            keeps = getattr(adapter, "keeps", None)
            if keeps is None or all(keeps(a) for layer in layers for a in leaves(layer.parameters)):
                self.placed[key] = layers
        return layers

    def moved(self, adapter: Backend, dtype: str, like: Array | None, device: Any) -> tuple[Layer, ...]:
        """As `place`, but nothing is kept."""

        def move(a: Array) -> Array:
            return placement.place(a, adapter, dtype, like, device)

        return tuple(layer.rounded(dtype).replace(mapped(move, layer.parameters)) for layer in self.layers)

    def spread(self, adapter: Backend, dtype: str, over: Spread) -> tuple[Layer, ...]:
        """The layers with every array as `dtype` over several devices, pairs of Dense layers divided."""

        def move(axis: int | None, a: Array) -> Array:
            return placement.move(a, adapter, dtype=dtype, device=over.weight(len(a.shape), axis))

        layers = []
        for layer, (axis, others) in zip(self.layers, _divided(self.layers, over.parts), strict=True):
            arrays = layer.parameters
            weight = {"weight": move(axis, arrays.pop("weight"))} if "weight" in arrays else {}
            layers.append(layer.rounded(dtype).replace(weight | mapped(functools.partial(move, others), arrays)))
        return tuple(layers)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Chain, (self.layers,))  # without the placed copies


def _divided(layers: Sequence[Layer], parts: int) -> list[tuple[int | None, int | None]]:
    """For each layer, the axis along which its weight is divided into so many parts, and that of its other arrays.

    Dense layers work in pairs, where all between the two works on each feature by itself: the first is divided by its
    outputs, the second by its inputs, and only the sum in the second is of all parts. What is in no pair stays whole,
    None.
    """
    axes: list[tuple[int | None, int | None]] = [(None, None)] * len(layers)
    first = None
    for i, layer in enumerate(layers):
        if isinstance(layer, Dense) and first is not None:
            axes[first : i + 1] = [(-2, -1), *[(-1, -1)] * (i - first - 1), (-1, None)]
            first = None
        elif isinstance(layer, Dense) and parts > 1 and layer.out_features % parts == 0:
            first = i
        if not layer.is_named or layer.activation.name in ("softmax", "log_softmax"):
            first = None
    return axes


def leaves(parameters: Any) -> list[Array]:
    """The arrays of nested lists and dicts, in order."""
    if isinstance(parameters, dict):
        return [a for v in parameters.values() for a in leaves(v)]
    if isinstance(parameters, list | tuple):
        return [a for v in parameters for a in leaves(v)]
    return [parameters]


def mapped(f: Callable[[Array], Any], parameters: Parameters) -> Parameters:
    """A layer's arrays, each through f."""
    return {k: mapped(f, v) if isinstance(v, dict) else f(v) for k, v in parameters.items()}


def _shape(layer: Layer) -> str:
    if isinstance(layer, Dense):
        return f"weight {tuple(layer.weight.shape)}"
    return repr(layer)
