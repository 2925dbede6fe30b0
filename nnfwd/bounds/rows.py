"""How each activation rounds, a row each, derived from the formulas of `activations.py`.

For an exact argument t, the computed f(t) is within

    expm1(1.01 u relative) |f(t)| + q underflows

of f(t): u is the unit roundoff, q what one underflow may lose, K a library's error in ulp (an ulp is at most 2 u
relative). The rows are first-order; expm1 and 1.01 cover the rest. The argument may itself be off: between its ends an
activation is monotonic but for `TURNS` and thresholded_relu's jump. t, far (the largest possible |t|) and the
parameters p are numbers or arrays.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nnfwd.bounds.arithmetic import Arithmetic
from nnfwd.errors import ArrayError
from nnfwd.layers import Layer

Values = Any
"""A number, or an array of them."""


def check_known(layers: Iterable[Layer]) -> None:
    """Raises `ArrayError` for a callable of one's own, whose rounding is unknown."""
    for layer in layers:
        if not layer.activation.is_named:
            name = layer.activation.name
            raise ArrayError(f"the rounding of the activation {name} is unknown: ask about the layers before it")


def relative(name: str, t: Values, ulp: Mapping[str, float], p: Sequence[Values]) -> Values:
    """The relative error of an activation in units of u, see above."""
    return _RELATIVE[name](np.clip(t, -1e8, 1e8) if name in ("gelu", "gelu_tanh") else t, ulp, p)


def _above(value: Values) -> Values:
    return (value + abs(value)) / 2


_RELATIVE: dict[str, Callable[[Values, Mapping[str, float], Sequence[Values]], Values]] = {
    "identity": lambda t, k, p: 0,
    "relu": lambda t, k, p: 0,
    "relu6": lambda t, k, p: 0,
    "hard_tanh": lambda t, k, p: 0,
    "thresholded_relu": lambda t, k, p: 0,
    "clip": lambda t, k, p: 0,
    "leaky_relu": lambda t, k, p: 1,  # the product; scalars are rounded to the dtype before the pass
    "prelu": lambda t, k, p: 1,
    "tanh": lambda t, k, p: 2 * k["tanh"],
    # exp 2K, since sigmoid'(e) e / sigmoid(e) <= 1; sum and quotient 1 each; exp(-C) = (2 u)**1.4 is at most 0.3 u
    "sigmoid": lambda t, k, p: 2.3 + 2 * k["exp"],
    "softsign": lambda t, k, p: 2,
    "softplus": lambda t, k, p: 1 + 2 * k["exp"] + 2 * k["log1p"],  # log1p'(e) e / log1p(e) <= 1
    "log_sigmoid": lambda t, k, p: 1 + 2 * k["exp"] + 2 * k["log1p"],
    "elu": lambda t, k, p: 2 + 2 * k["expm1"],
    "selu": lambda t, k, p: 2 + 2 * k["expm1"],
    # quotient, product; expm1'(s) s / expm1(s) is at most 1 for s < 0 and 1 + s for s > 0 (a negative alpha)
    "celu": lambda t, k, p: 4 + 2 * k["expm1"] + 2 * _above(-_above(-t) / p[0]),
    "silu": lambda t, k, p: 3.3 + 2 * k["exp"],
    "hard_silu": lambda t, k, p: 1,  # and what is clipped
    "hard_sigmoid": lambda t, k, p: 0,  # only what is clipped
    "mish": lambda t, k, p: 8 + 4 * k["exp"],
    # -t sqrt(1/2) is off by 2 u, and erfc'(v) v / erfc(v) <= 2 v^2 + 2 = t^2 + 2 for t < 0
    "gelu": lambda t, k, p: 7 + 2 * k["erfc"] + 2 * _above(-t) ** 2,
    # the argument v of the sigmoid is off by 6 u |v|, and sigmoid'(v) v / sigmoid(v) <= |v| for v < 0, < 0.3 above
    "gelu_tanh": lambda t, k, p: 5.3 + 2 * k["exp"] + 6 * _above(-1.5957691216057308 * (t + 0.044715 * t**3)),
    "exp": lambda t, k, p: 2 * k["exp"],
}

# Where the slope changes its sign, besides 0.
TURNS = {
    "silu": -1.2784645427610738,
    "gelu": -0.7517915246935645,
    "gelu_tanh": -0.7524614220710163,
    "mish": -1.1924312145154952,
    "hard_silu": -1.5,
}

ROUNDLESS = ("relu", "relu6", "hard_tanh", "thresholded_relu", "clip")
"""What gives its argument or a constant, and rounds nothing."""

LINEAR = ("leaky_relu", "prelu")
"""A product with a slope where t < 0."""


def bounded(name: str, p: Sequence[Values], arith: Arithmetic) -> Values:
    """Whether anything is known with these parameters."""
    if name == "clip":  # one that clips at one side only has an infinite bound on the other
        return ~np.logical_or.reduce(np.broadcast_arrays(*map(np.isnan, p)))
    if name == "celu":  # x / alpha may be computed as x * (1 / alpha), which must be a normal number
        least, most = max(arith.smallest_normal, 1 / arith.largest), min(arith.largest, 1 / arith.smallest_normal)
        return (abs(p[0]) > least) & (abs(p[0]) < most)
    return np.logical_and.reduce(np.broadcast_arrays(*map(np.isfinite, p))) if p else True


def softmax_fits(widest: Values, n: int, arith: Arithmetic) -> Values:
    """Whether a sum of n exponentials neither overflows nor vanishes, their arguments being this far off.

    Shifted by the maximum they are at most 0, but where a compiler contracts the product before into the shift (XLA
    does), all may be off together by the error of the maximum.
    """
    return widest + math.log(n) + 1 < min(math.log(arith.largest), -math.log(arith.smallest_normal))


def underflows(name: str, far: Values, p: Sequence[Values], arith: Arithmetic) -> Values:
    """How many quanta underflow may cost, each entering the result with the weight it has there."""
    if name in ROUNDLESS:
        return 1.0 if arith.flushes else 0.0
    count = 3.0
    if name in ("silu", "hard_silu", "gelu_tanh", "mish"):
        count = count + (3 if name == "mish" else 1) * np.minimum(far, 1e3)
    elif p:  # a slope or an alpha: of the argument's and the function's underflow, and its own
        sizes = [abs(v) for v in p]
        count = count + 3 * np.maximum.reduce(np.broadcast_arrays(*sizes))
        if arith.flushes:
            small = np.logical_or.reduce(np.broadcast_arrays(*((v > 0) & (v < arith.smallest_normal) for v in sizes)))
            count = count + small * far
    if name == "gelu":  # erfc underflows before its product with t does; in 16 bit it is computed in float32
        wide = arith.quantum if arith.u > 2.0**-12 else arith.smallest_normal
        count = count + (1 + np.minimum(far, 60.0)) * (wide / arith.quantum)
    return count


def clipped(name: str, t: Values, wide: Values, p: Sequence[Values], arith: Arithmetic) -> Values:
    """The absolute error of alpha t + beta, rounded before it is clipped to [0, 1]; times |t| for hard_silu."""
    alpha, beta = p if name == "hard_sigmoid" else (1 / 6, 0.5)
    far = abs(t) + wide
    error = arith.u * (3 * abs(alpha) * far + 2 * abs(beta)) * 1.01 + 3 * arith.quantum * (1 + abs(alpha))
    inner = alpha * t + beta
    reach = error + abs(alpha) * wide
    untouched = (inner - reach > 1) | (inner + reach < 0)
    return np.where(untouched, 0.0, np.minimum(error, 1.0) * (far if name == "hard_silu" else 1.0))


def own(name: str, t: Values, size: Values, p: Sequence[Values], unit: float) -> Values:
    """The reference's own error, whose functions are good to 6 ulp of a format with this unit roundoff."""
    return unit * relative(name, t, _SIX, p) * size if unit else 0.0


_SIX = dict.fromkeys(("exp", "expm1", "log1p", "log", "tanh", "erfc"), 6.0)
