"""The network a person holds: a chain of layers that can be called, sliced, placed, compiled, compared and pickled."""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self, overload

import numpy as np

from nnfwd import backend as _backend
from nnfwd import placement
from nnfwd.backend import Array
from nnfwd.errors import ArrayError, DtypeError, ShapeError
from nnfwd.forward import feed_forward, scoped
from nnfwd.layers import Chain, Dense, Layer, Parameters, leaves, mapped, same

Class = str | int | float


class Network:
    """A trained feed-forward network: `net(x)` takes x `(..., in)` to `(..., out)`.

    Immutable. Slices are networks, `net[0]` is a layer, equality is by content. On JAX it is a pytree of its arrays.

    Args:
        layers: Dense, Scale and Activation layers.
        classes: of a classifier, what each output stands for, strings or numbers; two for a single output, which is
            then the probability of the second. See `nnfwd.labels`.
        input_shape: the shape of one input before it was flattened to `(in,)`, say `(28, 28)`. It is only kept.

    Raises:
        ShapeError: where the shapes of two layers do not fit, naming the layer, or classes or input_shape do not.
        ArrayError: where the weights live in two libraries, or a class is neither a string nor a number.
    """

    __slots__ = ("__weakref__", "_chain", "_layers", "classes", "input_shape")
    __name__ = "network"  # of its instances: what Dask and others that take functions call it
    _chain: Chain | None
    _layers: tuple[Layer, ...]
    classes: tuple[Class, ...] | None
    input_shape: tuple[int, ...] | None

    def __init__(
        self,
        layers: Iterable[Layer],
        *,
        classes: Iterable[Class] | None = None,
        input_shape: Iterable[int] | None = None,
    ) -> None:
        chain = Chain(layers)
        kept = None if classes is None else _classes(classes, chain.out_features)
        self._set(chain.layers, chain, kept, None if input_shape is None else _shape(input_shape, chain.in_features))

    def _set(
        self,
        layers: tuple[Layer, ...],
        chain: Chain | None,
        classes: tuple[Class, ...] | None,
        input_shape: tuple[int, ...] | None,
    ) -> None:
        values = {"_layers": layers, "_chain": chain, "classes": classes, "input_shape": input_shape}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a Network is immutable: make another one")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a Network is immutable: make another one")

    @property
    def chain(self) -> Chain:
        """The layers, checked, and their placed copies."""
        if self._chain is None:
            object.__setattr__(self, "_chain", Chain(self._layers))
        return self._chain  # type: ignore[return-value]

    @classmethod
    def from_arrays(
        cls, weights: Sequence[Any], biases: Sequence[Any] | None = None, activation: Any = "identity"
    ) -> Self:
        """A network of Dense layers from lists of weights `(out, in)` and biases `(out,)`.

        Args:
            weights: one array or nested list a layer.
            biases: as many, each an array or None; None for no biases at all.
            activation: one for all layers, or a list with one for each.
        """
        weights = list(weights)
        n = len(weights)
        each = {
            "biases": [None] * n if biases is None else list(biases),
            "activations": list(activation) if isinstance(activation, list | tuple) else [activation] * n,
        }
        for name, values in each.items():
            if len(values) != n:
                raise ShapeError(f"{len(values)} {name} do not fit {n} weights: give one for each layer")
        return cls(Dense(*layer) for layer in zip(weights, *each.values(), strict=True))

    @classmethod
    def stack(cls, networks: Iterable["Network"], /) -> Self:
        """One ensemble of networks of equal shape: `(members, out, in)` for every weight `(out, in)`.

        Raises:
            ShapeError: where their layers, activations, scalings or classes differ, naming the layer.
            DtypeError, ArrayError: where their weights differ in dtype or library, or something is no network.
        """
        if not isinstance(networks, Iterable) or hasattr(networks, "chain"):
            raise ArrayError(f"stack takes a list of networks, not a {type(networks).__name__}")
        members = list(networks)
        if not members:
            raise ShapeError("an ensemble needs at least one network")
        for m, member in enumerate(members):
            if not isinstance(member, Network):
                raise ArrayError(f"network {m} is a {type(member).__name__}: it must be a Network")
            if member.chain.members is not None:
                raise ShapeError(f"network {m} is an ensemble: stack its members(), each a network")
            if len(member) != len(members[0]):
                raise ShapeError(f"network {m} has {len(member)} layers, network 0 has {len(members[0])}")
            if (member.classes, member.input_shape) != (members[0].classes, members[0].input_shape):
                raise ShapeError(f"network {m} has other classes or another input_shape than network 0")
        layers = [_stack(i, layers) for i, layers in enumerate(zip(*members, strict=True))]
        return cls(layers, classes=members[0].classes, input_shape=members[0].input_shape)

    def members(self) -> list["Network"]:
        """The networks of an ensemble, one by one; a single network is its only member."""
        count = self.chain.members
        if count is None:
            return [self]
        return [self._of(layer.member(m) for layer in self) for m in range(count)]

    def _of(self, layers: Iterable[Layer]) -> "Network":
        """A network of other layers with the same classes and input shape."""
        return Network(layers, classes=self.classes, input_shape=self.input_shape)

    @property
    def in_features(self) -> int | None:
        """Width of x; None when any is taken."""
        return self.chain.in_features

    @property
    def out_features(self) -> int | None:
        """Width of the output; None when it is x's."""
        return self.chain.out_features

    @property
    def dtype(self) -> str | None:
        """Name of the weights' widest dtype, in which integers, bools and text are computed; None without weights."""
        return self.chain.dtype

    def __call__(
        self, x: Any, /, *, backend: Any = None, device: Any = None, dtype: Any = None, precision: str = "highest"
    ) -> Array:
        """The output for x, on x's library, device and dtype unless an argument says otherwise. See `feed_forward`."""
        return feed_forward(x, self.chain, backend=backend, device=device, dtype=dtype, precision=precision)

    def compile(
        self, *, backend: Any = None, device: Any = None, dtype: Any = None, precision: str = "highest", **options: Any
    ) -> "Compiled":
        """The network made ready to run many times: weights placed once, and executed as that backend does it best.

        Args:
            backend: a name or a namespace module; by default the library the weights live in.
            device: by default the library's own default. On JAX a list of devices or a mesh, too: rows of x are divided
                over its first axis, pairs of Dense layers over the second.
            dtype: of x and of the result; by default the network's.
            precision: as in `feed_forward`.
            options: the backend's own. NumPy has `threads`, a number, by default as many as its BLAS has.

        Raises:
            UnknownNameError: for an option that the backend does not have.
            BackendError, DtypeError, DeviceError: where it cannot be run so.
        """
        return Compiled(self, backend=backend, device=device, dtype=dtype, precision=precision, **options)

    def to(self, backend: Any = None, /, *, device: Any = None, dtype: Any = None) -> "Network":
        """The same network with its weights on another library, device or dtype; `net.to("numpy")` brings it home.

        For a backend that hands the network on to other libraries (Dask) they stay on the host.
        """
        adapter = self._adapter(backend)
        if hasattr(adapter, "apply"):
            adapter = _backend.load("numpy")
            device = None
        name = None if dtype is None else placement.real_dtype(dtype)
        placement.probe(adapter, name or self.dtype or "float32", device)

        def move(a: Array) -> Array:
            return placement.move(a, adapter, dtype=name or placement.dtype_name(a.dtype), device=device)

        return self.with_parameters([mapped(move, layer) for layer in self.parameters])  # which makes them its own

    def _adapter(self, backend: Any) -> _backend.Backend:
        """The backend asked for, by default the one of the weights."""
        if backend is not None:
            return _backend.load(backend)
        arrays = leaves(self.parameters)
        return _backend.of(arrays[0]) if arrays else _backend.load("numpy")

    @property
    def parameters(self) -> list[Parameters]:
        """Every array, as nested lists and dicts: what gradients over the weights are taken in."""
        return [layer.parameters for layer in self]

    def with_parameters(self, parameters: Sequence[Parameters], /) -> "Network":
        """The same network with other arrays (they may be tracers), nested as `parameters` is."""
        if not isinstance(parameters, list | tuple):
            raise ShapeError(
                f"parameters is a {type(parameters).__name__}: it must be a list, nested as network.parameters"
            )
        if len(parameters) != len(self):
            raise ShapeError(f"parameters of {len(parameters)} layers do not fit a network of {len(self)}")
        for i, (layer, given) in enumerate(zip(self, parameters, strict=True)):
            if _names(given) != _names(layer.parameters):
                raise ShapeError(f"layer {i}: parameters {_names(given)} must be {_names(layer.parameters)}")
        return self._of(layer.renew(given) for layer, given in zip(self, parameters, strict=True))

    def tree_flatten(self) -> tuple[tuple[tuple[Layer, ...]], tuple[Any, ...]]:
        return (self._layers,), (self.classes, self.input_shape)

    @classmethod
    def tree_unflatten(cls, kept: tuple[Any, ...], children: tuple[tuple[Layer, ...]]) -> "Network":
        network = object.__new__(cls)
        network._set(children[0], None, *kept)  # checked when it is called: these may be no arrays at all
        return network

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> "Network": ...
    def __getitem__(self, index: int | slice) -> "Layer | Network":
        found = self._layers[index]
        if not isinstance(found, tuple):
            return found
        start, stop, step = index.indices(len(self))  # type: ignore[union-attr]
        return Network(
            found,
            classes=self.classes if stop == len(self) and step == 1 else None,
            input_shape=self.input_shape if start == 0 and step == 1 else None,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Network):
            return NotImplemented
        kept = (self.classes, self.input_shape) == (other.classes, other.input_shape)
        return kept and self._layers == other._layers

    def __hash__(self) -> int:
        return hash(self._layers)

    def __repr__(self) -> str:
        kept = "" if self.classes is None else f", classes={shown_classes(self.classes)}"
        kept += "" if self.input_shape is None else f", input_shape={self.input_shape}"
        return "Network([\n" + "".join(f"    {layer!r},\n" for layer in self) + f"]{kept})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, (self._layers, self.classes, self.input_shape))


def _restore(
    layers: tuple[Layer, ...], classes: tuple[Class, ...] | None, input_shape: tuple[int, ...] | None
) -> Network:
    return Network(layers, classes=classes, input_shape=input_shape)


def shown_classes(classes: Sequence[Class], /) -> str:
    """Classes as they are printed: many are shortened."""
    if len(classes) <= 10:
        return repr(tuple(classes))
    return f"({', '.join(map(repr, classes[:3]))}, ..., {classes[-1]!r})"


def _classes(given: Iterable[Class], out: int | None) -> tuple[Class, ...]:
    """The classes of so many outputs, as plain Python values."""
    values = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(values, Iterable):
        raise ArrayError(f"classes is a {type(given).__name__}: it must be a list of strings or numbers")
    classes = tuple(value.item() if hasattr(value, "item") else value for value in values)
    for value in classes:
        if type(value) not in (str, int, float, bool) or (type(value) is int and not -(2**63) <= value < 2**63):
            raise ArrayError(f"a class is {value!r}: it must be a string or a number of at most 64 bits")
        if type(value) is not type(classes[0]):
            raise ArrayError(f"the classes {classes[0]!r} and {value!r} are of two types: they must be of one")
    if len(set(classes)) != len(classes):
        raise ShapeError(f"two of the classes {shown_classes(classes)} are the same")
    if out is not None and len(classes) != (2 if out == 1 else out):
        raise ShapeError(f"{len(classes)} classes do not fit {out} outputs: give {2 if out == 1 else out}")
    return classes


def _shape(given: Iterable[int], width: int | None) -> tuple[int, ...]:
    """The shape of one input, whose sizes multiply to the width."""
    try:
        shape = tuple(operator.index(n) for n in given)
    except TypeError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ShapeError(f"input_shape {given} must be positive whole numbers")
    if width is not None and math.prod(shape) != width:
        raise ShapeError(f"input_shape {shape} has {math.prod(shape)} numbers, the network takes {width}")
    return shape


def _stack(i: int, layers: Sequence[Layer]) -> Layer:
    """Layer i of an ensemble from those of its members. Only Dense layers may differ, and only in their numbers."""
    first = layers[0]
    for m, layer in enumerate(layers):
        fits = type(layer) is type(first) and layer.structure == first.structure
        if fits and isinstance(layer, Dense) and isinstance(first, Dense):
            fits = tuple(layer.weight.shape) == tuple(first.weight.shape)
            fits = fits and same(layer.activation.arrays, first.activation.arrays)
            a, b = placement.dtype_name(layer.weight.dtype), placement.dtype_name(first.weight.dtype)
            if a != b:
                raise DtypeError(f"layer {i}: network {m} is {a}, network 0 is {b}: bring them to one by to(dtype=...)")
            placement.meet(layer.weight, _backend.of(first.weight))
        elif fits:
            fits = same(layer.parameters, first.parameters)
        if not fits:
            raise ShapeError(
                f"layer {i}: {layer!r} of network {m} does not fit {first!r} of network 0: "
                "members may differ in the weights and biases of Dense layers only"
            )
    if not isinstance(first, Dense):
        return first
    xp = _backend.of(first.weight).xp
    stacked = {
        name: None if getattr(first, name) is None else xp.stack([getattr(layer, name) for layer in layers])
        for name in first.fields
    }
    return Dense(**stacked, activation=first.activation)


def _names(given: Any) -> str:
    """The names in a layer's parameters, `weight, bias, activation.negative_slope`."""
    if not isinstance(given, dict):
        return f"of type {type(given).__name__}"
    inner = given.get("activation", {})
    inside = sorted(inner) if isinstance(inner, dict) else [type(inner).__name__]
    return (
        ", ".join([*sorted(set(given) - {"activation"}, reverse=True), *(f"activation.{k}" for k in inside)]) or "none"
    )


_UNMET = object()


class Compiled:
    """A network ready to run many times on one backend, device and dtype: `run(x)` takes x `(..., in)` to `(..., out)`.

    x may be of any library where a backend was asked for: it is moved there. Its dtype must be the compiled one, or an
    integer or bool dtype, which is cast.

    Raises:
        DtypeError: where x has another real dtype than was compiled for.
        ArrayError: where x is of another library and `backend=` was not given.
        ShapeError: as `feed_forward`.
    """

    __name__ = "compiled_network"

    def __init__(
        self, network: Network, *, backend: Any, device: Any, dtype: Any, precision: str, **options: Any
    ) -> None:
        _backend.check_precision(precision)
        self._adapter = adapter = network._adapter(backend)
        self._device = device
        self.network = network
        self.backend = _backend.name_of(adapter)
        chosen = network.dtype if dtype is None else placement.real_dtype(dtype)
        self.dtype = chosen or placement.default_dtype(adapter)
        self.precision = precision
        self.options = options
        _backend.check_options(adapter, options)
        self._asked = backend is not None
        placement.probe(adapter, self.dtype, device)
        self._chain = network.chain
        self._anchor: Any = None  # one of the placed weights: x belongs on its device
        self._run: Callable[[Array], Array]
        over: _backend.Spread | None = None
        if hasattr(adapter, "apply"):
            whole = functools.partial(feed_forward, precision=precision)
            self._run = functools.partial(adapter.apply, whole, network.chain)
        else:
            over = adapter.spread(device) if hasattr(adapter, "spread") else None
            if over is not None:
                layers = self._chain.spread(adapter, self.dtype, over)
            else:
                if not self._chain.host:
                    self._chain = network.to(backend, device=device, dtype=self.dtype).chain
                layers = self._chain.moved(adapter, self.dtype, like=None, device=device)
            self._anchor = next(iter(leaves([layer.parameters for layer in layers])), None)
            plain = functools.partial(scoped, adapter, precision)
            if hasattr(adapter, "compile"):
                self._run = adapter.compile(plain, layers, **options)
            else:
                self._run = functools.partial(plain, layers)
            if over is not None:
                self._run = over.compiled(self._run, self.dtype, all(layer.is_named for layer in layers))
        self._over = over
        self._type = type(self._anchor)
        self._met: dict[Any, Any] = {}  # what the checks read of each x that passed them

    def __call__(self, x: Any, /) -> Array:
        """The output for x."""
        if type(x) is self._type and self._met.get((x.dtype, x.shape), _UNMET) == x.device:
            return self._run(x)
        placed = self._checked(x)
        if placed is x and type(x) is self._type and len(self._met) < 1000:
            self._met[x.dtype, x.shape] = x.device
        return self._run(placed)

    def _checked(self, x: Any) -> Array:
        """x as an array of the backend, where the weights are."""
        listed = not hasattr(x, "dtype")
        x, name = placement.accept(x, self._chain)
        if name in placement.REAL and name != self.dtype and not listed:
            raise DtypeError(f"x is {name}, the network was compiled for {self.dtype}: convert x, or compile again")
        foreign = listed or _backend.of(x) is not self._adapter
        if foreign and not (listed or self._asked):
            other = _backend.name_of(_backend.of(x))
            raise ArrayError(
                f"x is a {other} array and the network was compiled for {self.backend}, where its weights are: "
                f"write compile(backend={other!r}), or compile(backend={self.backend!r}) to move x"
            )
        if self._over is not None:  # it places x, and on its way home x may become wider
            return x if isinstance(x, np.ndarray) or not foreign else _backend.of(x).to_numpy(x)
        device = self._device
        if foreign and device is None and self._anchor is not None:
            device = placement.device_of(self._anchor)
        elif device is not None and self._anchor is not None and not foreign:
            here = placement.device_of(x)
            device = None if here is not None and here == placement.device_of(self._anchor) else device  # there already
        if foreign or device is not None or name != self.dtype:
            x = placement.move(x, self._adapter, dtype=self.dtype, device=device)
        if self._anchor is not None:
            placement.meet_device(self._anchor, x, self._adapter)
        return x

    def __repr__(self) -> str:
        return f"<compiled for {self.backend}, {self.dtype}, precision {self.precision}: {self.network!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        backend = self.backend if self._asked else None
        return (_compile, (self.network, backend, self._device, self.dtype, self.precision, self.options))


def _compile(
    network: Network, backend: str | None, device: Any, dtype: str, precision: str, options: dict[str, Any]
) -> Compiled:
    return Compiled(network, backend=backend, device=device, dtype=dtype, precision=precision, **options)
