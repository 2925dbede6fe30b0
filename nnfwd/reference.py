"""The reference: the tutorial's looped pass in plain Python floats, and every activation for one number.

This is the other opinion. It shares nothing with `forward.py` and `activations.py`, and states the same mathematics in
the plainest way there is. The activations are written for two number systems, Python floats (`FLOATS`) and mpmath's
60 digits (`DIGITS`), which offer the same functions; `bounds/` judges float64 results with the second.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from nnfwd import placement
from nnfwd.activations import Function
from nnfwd.errors import ArrayError
from nnfwd.layers import Chain, Dense, Layer, Scale, to_numpy

Number = Any
Vector = list[Number]


def looped_feed_forward(x: Any, layers: Any, /) -> list[Any]:
    """The output for x by explicit loops, one multiplication at a time.

    Args:
        x: a vector of `in` numbers, or nested lists or an array `(..., in)`.
        layers: a `Network` or a sequence of layers.

    Returns:
        Plain Python floats, nested as `(..., out)`, or `(members, ..., out)` for an ensemble.

    Raises:
        ArrayError: for an activation that has no scalar form (a callable of one's own without an attribute `scalar`).
    """
    chain = Chain.of(layers)
    rows = nested(placement.accept(x, chain)[0])
    members: list[Sequence[Layer]] = [chain.layers]
    if chain.members is not None:
        members = [member(chain, m) for m in range(chain.members)]

    def every_row(x: list[Any], layers: Sequence[Layer]) -> list[Any]:
        if any(isinstance(row, list) for row in x):
            return [every_row(row, layers) for row in x]
        if not x:  # no rows
            return []
        *_, (_, h) = looped_steps(layers, x)
        return h

    outputs = [every_row(rows, each) for each in members]
    return outputs[0] if chain.members is None else outputs


def looped_steps(layers: Sequence[Layer], x: Vector, /) -> Iterator[tuple[Vector, Vector]]:
    """Yields each layer's weighted sums z and activations h for one vector x."""
    h = [float(value) for value in x]
    for layer in layers:
        if isinstance(layer, Dense):
            w, b = nested(layer.weight), nested(layer.bias)
            z = []
            for node in range(len(w)):
                node_sum = 0.0
                for j in range(len(h)):
                    node_sum += w[node][j] * h[j]
                z.append(node_sum + (b[node] if b else 0.0))
        elif isinstance(layer, Scale):
            c, s, t = (each(value, len(h)) for value in (layer.center, layer.scale, layer.shift))
            z = [(h[j] - c[j]) * s[j] + t[j] for j in range(len(h))]
        else:
            z = h
        h = activate(layer, z, FLOATS)
        yield z, h


def activate(layer: Layer, z: Vector, m: Any) -> Vector:
    """A layer's activation of one vector of weighted sums, in the number system m."""
    function = layer.activation
    if is_vector(function):
        return VECTOR[function.name](z, m)
    f = scalar_form(layer)
    parameters = [each(value, len(z)) for value in function.parameters.values()]
    return [f(t, m, *(p[i] for p in parameters)) for i, t in enumerate(z)]


def is_vector(function: Function) -> bool:
    """Whether an activation mixes the features, and is no function of one number."""
    return function.is_named and function.name in VECTOR


def scalar_form(layer: Layer) -> Callable[..., Number]:
    """A layer's activation for one number: `f(t, m, *parameters)`."""
    function = layer.activation
    own = getattr(function.formula, "scalar", None)
    if own is not None:
        return lambda t, m: own(t)
    if not function.is_named:
        raise ArrayError(f"the activation {function.name} has no scalar form: give it an attribute scalar(t)")
    return SCALAR[function.name]


def nested(a: Any) -> Any:
    """An array of any library (or a list) as nested lists of Python floats; None stays None."""
    if a is None:
        return None
    if isinstance(a, list | tuple):
        return [nested(value) if isinstance(value, list | tuple) else float(value) for value in a]
    return to_numpy(a).astype("float64").tolist()


def each(value: Any, n: int) -> Vector:
    """A scalar, or an array `(n,)`, as a list of n numbers."""
    return [value] * n if isinstance(value, float) else nested(value)


def member(chain: Chain, m: int) -> list[Layer]:
    """The layers of one member of an ensemble."""
    return [layer.member(m) for layer in chain.layers]


# The activations. t is one number, m the number system.


def _exp(t: float) -> float:
    try:
        return math.exp(t)
    except OverflowError:
        return math.inf


FLOATS = SimpleNamespace(
    exp=_exp, expm1=lambda t: math.expm1(t) if t < 700 else _exp(t), log=math.log, log1p=math.log1p, tanh=math.tanh,
    erfc=math.erfc, inf=math.inf, nan=math.nan, number=float,
)  # fmt: skip


@functools.cache
def digits() -> Any:
    """mpmath with 60 digits, in a context of its own: the caller's is not touched."""
    import mpmath

    context = mpmath.MPContext()
    context.dps = 60
    # Beyond this, every format's exp(-t) and erfc(t) is 0 or overflows, and mpmath would compute astronomic exponents.
    far = 1e5

    def bounded(f: Callable[[Any], Any], below: Any, above: Any) -> Callable[[Any], Any]:
        return lambda t: t if t != t else f(t) if abs(t) < far else context.mpf(above if t > 0 else below)

    return SimpleNamespace(
        exp=bounded(context.exp, 0, context.inf), expm1=bounded(context.expm1, -1, context.inf), log=context.log,
        log1p=context.log1p, tanh=bounded(context.tanh, -1, 1), erfc=bounded(context.erfc, 2, 0), inf=context.inf,
        nan=context.nan, number=context.mpf, context=context,
    )  # fmt: skip


def _sigmoid(t: Number, m: Any) -> Number:
    return 1 / (1 + m.exp(-t)) if t >= 0 else m.exp(t) / (1 + m.exp(t))


def _softplus(t: Number, m: Any) -> Number:
    return t + m.log1p(m.exp(-t)) if t > 0 else m.log1p(m.exp(t))


def _elu(t: Number, m: Any, alpha: Number) -> Number:
    return t if t > 0 else alpha * m.expm1(t)


def _selu(t: Number, m: Any) -> Number:
    return 1.0507009873554805 * (t if t > 0 else 1.6732632423543772 * m.expm1(t))


def _mish(t: Number, m: Any) -> Number:
    return _times(t, m.tanh(_softplus(t, m)), m)


def _gelu(t: Number, m: Any) -> Number:
    return _times(t, m.erfc(-t * (m.number(1) / 2) ** m.number(0.5)) / 2, m)


def _gelu_tanh(t: Number, m: Any) -> Number:
    pi = m.context.pi if hasattr(m, "context") else math.pi
    if abs(t) > 1e3:  # the cube may overflow, and the result is 0 or t
        return t if t > 0 else m.number(0)
    return _times(t, _sigmoid(2 * (2 / m.number(pi)) ** m.number(0.5) * (t + m.number("0.044715") * t**3), m), m)


def _times(t: Number, factor: Number, m: Any) -> Number:
    """t * factor, 0 where the factor is: -inf times 0 is the limit 0."""
    return m.number(0) if factor == 0 else t * factor


def _relu(t: Number, m: Any) -> Number:
    return t if t > 0 or t != t else m.number(0)


def _clip(t: Number, m: Any, lower: Number, upper: Number) -> Number:
    if t != t or lower != lower or upper != upper:
        return m.nan
    return min(max(t, m.number(lower)), m.number(upper))


def _leaky_relu(t: Number, m: Any, negative_slope: Number) -> Number:
    return t if t >= 0 else negative_slope * t


def _hard_sigmoid(t: Number, m: Any, alpha: Number, beta: Number) -> Number:
    return _clip(alpha * t + beta, m, 0, 1)


def _thresholded_relu(t: Number, m: Any, alpha: Number) -> Number:
    return m.number(0) if t <= alpha else t


def _softsign(t: Number, m: Any) -> Number:
    return t / (1 + abs(t)) if abs(t) < m.inf or t != t else m.number(1 if t > 0 else -1)


def _celu(t: Number, m: Any, alpha: Number) -> Number:
    return t if t > 0 else alpha * m.expm1(t / alpha) if alpha else m.number(0)


def _softmax(z: Vector, m: Any) -> Vector:
    top = _max(z)
    e = [m.exp(t - top) for t in z]
    total = sum(e)
    return [t / total for t in e]


def _log_softmax(z: Vector, m: Any) -> Vector:
    top = _max(z)
    log_total = m.log(sum(m.exp(t - top) for t in z))
    return [t - top - log_total for t in z]


def _max(z: Vector) -> Number:
    return next((t for t in z if t != t), None) or max(z)


SCALAR: dict[str, Callable[..., Number]] = {
    "identity": lambda t, m: t,
    "relu": _relu,
    "relu6": lambda t, m: _clip(t, m, 0, 6),
    "leaky_relu": _leaky_relu,
    "prelu": _leaky_relu,
    "thresholded_relu": _thresholded_relu,
    "clip": _clip,
    "hard_tanh": lambda t, m: _clip(t, m, -1, 1),
    "hard_sigmoid": _hard_sigmoid,
    "sigmoid": _sigmoid,
    "tanh": lambda t, m: m.tanh(t),
    "softsign": _softsign,
    "softplus": _softplus,
    "log_sigmoid": lambda t, m: -_softplus(-t, m),
    "elu": _elu,
    "selu": _selu,
    "celu": _celu,
    "silu": lambda t, m: _times(t, _sigmoid(t, m), m),
    "hard_silu": lambda t, m: _times(t, _clip(t / 6 + 0.5, m, 0, 1), m),
    "mish": _mish,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "exp": lambda t, m: m.exp(t),
}
VECTOR: dict[str, Callable[[Vector, Any], Vector]] = {"softmax": _softmax, "log_softmax": _log_softmax}
