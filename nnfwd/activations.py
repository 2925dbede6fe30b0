"""Every activation, once, in Array API operations; and how to name one.

Each is a `Function`: `sigmoid(x)` computes, `leaky_relu(negative_slope=0.2)` is the same function with that parameter.
A parameter may be an array of shape `(features,)`, one value a feature; then it is a weight like any other, and is cast
and placed with them. Any callable `f(x, /, *, xp)` is an activation too.

The formulas are those that survive: exact limits at -inf and +inf, NaN kept, no overflow on the way, right gradients at
0 and far out. `e` stands for exp(-|x|), written exp(minimum(x, -x)), whose gradients at 0 are shared as they should be.
Constants are Python scalars, so they never change a dtype or a device.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self

from nnfwd.backend import Array, of
from nnfwd.erfc import erfc
from nnfwd.errors import ArrayError, DtypeError, UnknownNameError
from nnfwd.placement import nearest, parameter

Formula = Callable[..., Array]
_NOTHING: Any = object()


class Function:
    """An activation function with its parameters: `f(x)` computes, `f(negative_slope=0.2)` sets parameters.

    Parameters are Python scalars or arrays of shape `(features,)`.
    """

    __slots__ = ("__weakref__", "_array_names", "_parameters", "formula", "name")
    name: str
    formula: Formula
    _parameters: dict[str, Any]
    _array_names: tuple[str, ...]  # fixed here: a library may later put anything in an array's place

    def __init__(
        self, name: str, formula: Formula, parameters: Mapping[str, Any], array_names: tuple[str, ...] = ()
    ) -> None:
        values = (
            ("name", name),
            ("formula", formula),
            ("_parameters", dict(parameters)),
            ("_array_names", array_names),
        )
        for key, value in values:
            object.__setattr__(self, key, value)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Numbers and arrays by name, to be read only; None where one must still be given."""
        return MappingProxyType(self._parameters)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"the activation {self.name} is immutable: make another one")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"the activation {self.name} is immutable: make another one")

    def __call__(self, x: Any = _NOTHING, /, *, xp: Any = None, **parameters: Any) -> Any:
        """The activation of x, of x's shape and dtype; without x, the function with those parameters."""
        if x is _NOTHING:
            return self._with(parameters)
        if parameters:
            self = self._with(parameters)
        self._complete()
        return self.compute(x, of(x).xp if xp is None else xp)

    def compute(self, x: Array, xp: Any) -> Array:
        """The activation of x in the namespace xp, every parameter being given.

        Raises `ArrayError` where a callable of the caller's changes the shape, the dtype or the library.
        """
        h = self.formula(x, xp=xp, **self._parameters)
        if not self.is_named and (h.shape, h.dtype) != (x.shape, x.dtype):
            given = f"{type(h).__name__} {tuple(h.shape)} {h.dtype}"
            raise ArrayError(f"the activation {self.name} made {given} of {tuple(x.shape)} {x.dtype}: keep both")
        return h

    def _with(self, parameters: Mapping[str, Any]) -> "Function":
        bound = dict(self._parameters)
        for key, value in parameters.items():
            if key not in bound:
                raise UnknownNameError(f"parameter of {self.name}", key, bound or ["none"])
            bound[key] = parameter(value, f"{self.name}.{key}")
        arrays = tuple(k for k, v in bound.items() if not (v is None or isinstance(v, float)))
        return Function(self.name, self.formula, bound, arrays)

    def _complete(self) -> Self:
        missing = [key for key, value in self._parameters.items() if value is None]
        if missing:
            raise DtypeError(f"{self.name} needs {', '.join(missing)}: write {self.name}({missing[0]}=...)")
        return self

    @property
    def arrays(self) -> dict[str, Array]:
        """The parameters that are arrays, by name."""
        return {key: self._parameters[key] for key in self._array_names}

    def with_arrays(self, arrays: Mapping[str, Array]) -> "Function":
        """The same function with other arrays; nothing is checked."""
        return Function(self.name, self.formula, {**self._parameters, **arrays}, self._array_names) if arrays else self

    def rounded(self, dtype: str) -> "Function":
        """The same function with its scalars rounded to a dtype, so that no library rounds them in a way of its own."""
        scalars = {k: v for k, v in self._parameters.items() if k not in self._array_names}
        if not scalars:
            return self
        near = {k: nearest(v, dtype) for k, v in scalars.items()}
        return Function(self.name, self.formula, {**self._parameters, **near}, self._array_names)

    @property
    def structure(self) -> tuple[Any, ...]:
        """What it is without its arrays: hashable, and equal for equal functions."""
        scalars = tuple((k, None if k in self._array_names else v) for k, v in self._parameters.items())
        return (self.name, self.formula, scalars, self._array_names)

    @property
    def is_named(self) -> bool:
        """Whether it is one of nnfwd's own, and not a callable of the caller's."""
        known = _registry.get(self.name)
        return known is not None and known.formula is self.formula

    def __repr__(self) -> str:
        values = (f"{k}={shown(v)}" for k, v in self._parameters.items() if v is not None)
        inside = ", ".join(values)
        return f"{self.name}({inside})" if inside else self.name

    def __reduce__(self) -> tuple[Any, ...]:
        if self.is_named:
            return (_restore, (self.name, None, self._parameters))
        return (_restore, (self.name, self.formula, self._parameters))


def _restore(name: str, formula: Formula | None, parameters: Mapping[str, Any]) -> Function:
    function = named(name) if formula is None else Function(name, formula, parameters)
    given = {k: v for k, v in parameters.items() if v is not None}
    return function._with(given) if given else function


_registry: dict[str, Function] = {}
_names: dict[str, str] = {}


def _activation(*aliases: str, **defaults: float | None) -> Callable[[Formula], Function]:
    """Registers a formula under its name and aliases. A default of None is a parameter that must be given."""

    def register(formula: Formula) -> Function:
        name = formula.__name__.rstrip("_")
        _registry[name] = function = Function(name, formula, defaults)
        _names.update(dict.fromkeys((name, *aliases), name))
        return function

    return register


def get(activation: "str | Function | Formula | None", /) -> Function:
    """The activation of a name, an alias, a `Function`, or a callable `f(x, /, *, xp)`.

    Raises `UnknownNameError` with the nearest name, `DtypeError` where a parameter without a default is not given.
    """
    if activation is None:
        return identity
    if isinstance(activation, Function):
        return activation._complete()
    if isinstance(activation, str):
        return named(activation)._complete()
    if not callable(activation) or isinstance(activation, type):
        raise UnknownNameError("activation", activation, _names)
    name = getattr(activation, "__name__", type(activation).__name__)
    if not _takes_xp(activation):
        raise ArrayError(f"the activation {name} takes no xp: write def {name}(x, /, *, xp), with functions of xp")
    return Function(name, activation, {})


def _takes_xp(f: Formula) -> bool:
    try:
        parameters = inspect.signature(f).parameters.values()
    except ValueError:  # a function of a library, as NumPy's
        return False
    return any(p.kind is p.VAR_KEYWORD or (p.name == "xp" and p.kind is not p.POSITIONAL_ONLY) for p in parameters)


def __getattr__(name: str) -> Function:  # the aliases: activations.swish
    if name in _names:
        return _registry[_names[name]]
    raise AttributeError(f"module 'nnfwd.activations' has no attribute {name!r}")


def named(name: str, /) -> Function:
    """The activation of a name or an alias, its parameters without a default still to be given."""
    if name.lower() not in _names:
        raise UnknownNameError("activation", name, _names)
    return _registry[_names[name.lower()]]


def shown(value: Any, /) -> str:
    """A parameter as it is printed: a number, or the shape of an array."""
    shape = getattr(value, "shape", None)
    return repr(value) if shape is None else f"array{tuple(shape)}"


def names() -> tuple[str, ...]:
    """The names of all activations, without aliases."""
    return tuple(_registry)


def _finite(x: Array, xp: Any) -> Array:
    """x with -inf replaced by the most negative finite number: -inf * 0 would be NaN."""
    return xp.maximum(x, -float(xp.finfo(x.dtype).max))


@_activation("linear", "none")
def identity(x: Array, /, *, xp: Any) -> Array:
    """x"""
    return x


@_activation("rectified")
def relu(x: Array, /, *, xp: Any) -> Array:
    """max(x, 0). Its gradient at 0 is 1/2, shared as in every maximum."""
    # Not where(x > 0, x, 0), which swallows NaN, nor x * (x > 0), which is NaN at -inf.
    return xp.maximum(x, 0.0)


@_activation()
def relu6(x: Array, /, *, xp: Any) -> Array:
    """min(max(x, 0), 6)"""
    return xp.minimum(xp.maximum(x, 0.0), 6.0)


@_activation("leakyrelu", negative_slope=0.01)
def leaky_relu(x: Array, /, *, xp: Any, negative_slope: Any) -> Array:
    """x where x >= 0, else negative_slope * x. The default slope is PyTorch's and ONNX's; Keras has 0.2 and 0.3."""
    return xp.where(x >= 0, x, negative_slope * x)


@_activation(negative_slope=None)
def prelu(x: Array, /, *, xp: Any, negative_slope: Any) -> Array:
    """x where x >= 0, else negative_slope * x, with a trained slope, mostly one a feature."""
    return xp.where(x >= 0, x, negative_slope * x)


@_activation("thresholdedrelu", alpha=1.0)
def thresholded_relu(x: Array, /, *, xp: Any, alpha: Any) -> Array:
    """0 where x <= alpha, else x"""  # in this order NaN is kept
    return xp.where(x <= alpha, 0.0, x)


@_activation(lower=None, upper=None)
def clip(x: Array, /, *, xp: Any, lower: Any, upper: Any) -> Array:
    """min(max(x, lower), upper)"""
    return xp.minimum(xp.maximum(x, lower), upper)


@_activation("hardtanh")
def hard_tanh(x: Array, /, *, xp: Any) -> Array:
    """min(max(x, -1), 1)"""
    return xp.minimum(xp.maximum(x, -1.0), 1.0)


@_activation("hardsigmoid", alpha=1 / 6, beta=0.5)
def hard_sigmoid(x: Array, /, *, xp: Any, alpha: Any, beta: Any) -> Array:
    """min(max(alpha * x + beta, 0), 1). The defaults are PyTorch's and Keras 3's; ONNX and Keras 2 have alpha = 0.2."""
    return xp.minimum(xp.maximum(alpha * x + beta, 0.0), 1.0)


@_activation("logistic", "expit")
def sigmoid(x: Array, /, *, xp: Any) -> Array:
    """1 / (1 + exp(-x)), as exp(c) / (1 + exp(c)), c = min(x, C): full relative accuracy in both tails.

    From C = 1.4 log(1 / epsilon) on the result is 1, and exp(C) is far from overflow in every format.
    """
    e = xp.exp(xp.minimum(x, -1.4 * math.log(float(xp.finfo(x.dtype).eps))))
    return e / (1 + e)


@_activation()
def tanh(x: Array, /, *, xp: Any) -> Array:
    """tanh(x)"""
    return xp.tanh(x)


@_activation()
def softsign(x: Array, /, *, xp: Any) -> Array:
    """x / (1 + |x|)"""
    largest = float(xp.finfo(x.dtype).max)
    c = xp.minimum(xp.maximum(x, -largest), largest)
    return c / (1 + xp.abs(c))


@_activation()
def softplus(x: Array, /, *, xp: Any) -> Array:
    """log(1 + exp(x)), as max(x, 0) + log1p(e)"""
    return xp.maximum(x, 0.0) + xp.log1p(xp.exp(xp.minimum(x, -x)))


@_activation("logsigmoid")
def log_sigmoid(x: Array, /, *, xp: Any) -> Array:
    """log(sigmoid(x)) = -softplus(-x), as min(x, 0) - log1p(e)"""
    return xp.minimum(x, 0.0) - xp.log1p(xp.exp(xp.minimum(x, -x)))


@_activation(alpha=1.0)
def elu(x: Array, /, *, xp: Any, alpha: Any) -> Array:
    """x where x > 0, else alpha * (exp(x) - 1)"""
    # The inner where keeps the other branch finite; minimum(x, 0) there would halve the gradient at 0.
    return xp.where(x > 0, x, alpha * xp.expm1(xp.where(x > 0, 0.0, x)))


SELU_SCALE = 1.0507009873554805
SELU_ALPHA = 1.6732632423543772


@_activation()
def selu(x: Array, /, *, xp: Any) -> Array:
    """scale * elu(x, alpha); Klambauer et al. 2017, arXiv 1706.02515, eq. 14"""
    inside = (SELU_SCALE * SELU_ALPHA) * xp.expm1(xp.where(x > 0, 0.0, x))
    return xp.where(x > 0, SELU_SCALE * x, inside)


@_activation(alpha=1.0)
def celu(x: Array, /, *, xp: Any, alpha: Any) -> Array:
    """x where x > 0, else alpha * (exp(x / alpha) - 1); Barron 2017, arXiv 1704.07483"""
    return xp.where(x > 0, x, alpha * xp.expm1(xp.where(x > 0, 0.0, x) / alpha))


@_activation("swish")
def silu(x: Array, /, *, xp: Any) -> Array:
    """x * sigmoid(x)"""
    c = _finite(x, xp)
    return c * sigmoid.formula(c, xp=xp)


@_activation("hard_swish", "hardswish", "hardsilu")
def hard_silu(x: Array, /, *, xp: Any) -> Array:
    """x * min(max(x / 6 + 1/2, 0), 1); Howard et al. 2019, arXiv 1905.02244"""
    return _finite(x, xp) * xp.minimum(xp.maximum(x / 6 + 0.5, 0.0), 1.0)


@_activation()
def mish(x: Array, /, *, xp: Any) -> Array:
    """x * tanh(softplus(x)); Misra 2019, arXiv 1908.08681. Rational in e, so that neither tail cancels or overflows."""
    c = _finite(x, xp)
    e = xp.exp(xp.minimum(x, -x))
    above, below = 1 + 2 * e, e * (e + 2)
    positive = x >= 0
    numerator = xp.where(positive, above, below)
    denominator = xp.where(positive, above + 2 * (e * e), below + 2)
    return c * (numerator / denominator)


@_activation()
def gelu(x: Array, /, *, xp: Any) -> Array:
    """x * Phi(x) with the exact normal distribution, as x/2 * erfc(-x / sqrt 2): 1 + erf cancels in the left tail."""
    c = _finite(x, xp)
    return (0.5 * c) * erfc(-math.sqrt(0.5) * x, xp)


@_activation("gelu_pytorch_tanh", "gelu_new", "gelu_approximate")
def gelu_tanh(x: Array, /, *, xp: Any) -> Array:
    """x/2 * (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))"""
    c = _finite(x, xp)
    k = 2 * math.sqrt(2 / math.pi)
    g = xp.minimum(xp.maximum(x, -30.0), 30.0)  # beyond, the gate is 0 or 1, and x * x would overflow
    return c * sigmoid.formula(g * (k + (k * 0.044715) * (g * g)), xp=xp)


@_activation("exponential")
def exp(x: Array, /, *, xp: Any) -> Array:
    """exp(x)"""
    return xp.exp(x)


@_activation()
def softmax(x: Array, /, *, xp: Any) -> Array:
    """exp(x) / sum(exp(x)) over the last axis, shifted by the maximum"""
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True)


@_activation("logsoftmax")
def log_softmax(x: Array, /, *, xp: Any) -> Array:
    """log(softmax(x)) over the last axis, directly: log(softmax) would be -inf where softmax underflows"""
    shifted = x - xp.max(x, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))
