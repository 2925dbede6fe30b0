"""The definition of the bound, by readable loops: one number at a time, as the reference computes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nnfwd.bounds.arithmetic import Arithmetic
from nnfwd.bounds.result import Bounded
from nnfwd.errors import ArrayError
from nnfwd.layers import Chain, Dense, Layer, Scale, to_numpy
from nnfwd.placement import accept
from nnfwd.reference import FLOATS, VECTOR, activate, digits, each, is_vector, member, nested, scalar_form

_SLACK = 1 + 2.0**-40  # for the bound's own rounding


def looped_bound(x: Any, layers: Any, /, *, arithmetic: Arithmetic) -> Bounded:
    """The exact output of a network for x and the bound on its computed value, by readable loops.

    Args:
        x: `(..., in)`, as stored: an array of dtype `arithmetic.dtype`, or nested lists of values it holds exactly.
        layers: a `Network` or a sequence of layers, their arrays holding exactly what the computation used.
        arithmetic: how the library rounds.

    Returns:
        `Bounded` of shape `(..., out)`, or `(members, ..., out)` for an ensemble.

    Raises:
        ArrayError: for an activation whose rounding is unknown (a callable of one's own).
    """
    chain = Chain.of(layers)
    rows = to_numpy(accept(x, chain)[0]).astype("float64")
    m = digits() if arithmetic.dtype == "float64" else FLOATS
    members = [chain.layers] if chain.members is None else [tuple(member(chain, i)) for i in range(chain.members)]
    exact, error = [], []
    for each_member in members:
        prepared = [_prepare(layer.rounded(arithmetic.dtype), m) for layer in each_member]
        for row in rows.reshape(-1, rows.shape[-1]).tolist():
            h, e = [m.number(value) for value in row], [0.0] * len(row)
            for layer, weights in prepared:
                h, e = _layer(layer, weights, h, e, arithmetic, m)
            exact.append(h)
            error.append(e)
    width = len(exact[0]) if exact else chain.out_features or rows.shape[-1]
    shape = (*(() if chain.members is None else (chain.members,)), *rows.shape[:-1], width)
    values = np.empty(len(exact) * width, dtype=object)
    values[:] = [value for row in exact for value in row]
    return Bounded(values.reshape(shape), np.array(error, dtype="float64").reshape(shape))


def _prepare(layer: Layer, m: Any) -> tuple[Layer, Any]:
    """A Dense layer's rows of weights as floats and in the number system m, read once."""
    if not isinstance(layer, Dense):
        return layer, None
    weight = nested(layer.weight)
    bias = nested(layer.bias) or [0.0] * len(weight)
    return layer, [
        (row, row if m is FLOATS else [m.number(w) for w in row], b) for row, b in zip(weight, bias, strict=True)
    ]


def _layer(layer: Layer, weights: Any, h: list[Any], e: list[float], arith: Arithmetic, m: Any) -> tuple[Any, Any]:
    """One layer: exact inputs h with error bounds e, to exact outputs with theirs."""
    if isinstance(layer, Dense):
        sizes = [abs(float(value)) for value in h]
        pairs = [_dense(w, wide, b, h, sizes, e, arith, m) for w, wide, b in weights]
    elif isinstance(layer, Scale):
        parameters = zip(*(each(value, len(h)) for value in (layer.scale, layer.center, layer.shift)), strict=True)
        pairs = [_scale(s, c, t, h[i], e[i], arith, m) for i, (s, c, t) in enumerate(parameters)]
    else:
        pairs = list(zip(h, e, strict=True))
    z, errors = [p[0] for p in pairs], [p[1] for p in pairs]
    if is_vector(layer.activation):
        return _softmax(layer.activation.name, z, errors, arith, m)
    return _elementwise(layer, z, errors, arith, m)


def _dense(
    w: list[float],
    wide: list[Any],
    b: float,
    h: list[Any],
    sizes: list[float],
    e: list[float],
    arith: Arithmetic,
    m: Any,
) -> tuple[Any, float]:
    n = len(w)
    terms = [wide[j] * h[j] for j in range(n)] + [m.number(b)]
    z = _sum(terms, m)
    if any(map(math.isinf, e)):
        return z, math.inf
    absolute = [abs(v) for v in w]
    finite = [j for j in range(n) if math.isfinite(sizes[j]) and math.isfinite(absolute[j])]
    total = _total(absolute[j] * (sizes[j] + e[j]) for j in finite) + (abs(b) if math.isfinite(b) else 0.0)  # A
    carried = _total(absolute[j] * e[j] for j in finite)
    exactly = carried == 0 and len(finite) == n and math.isfinite(b) and _no_rounding(w, h, b, total, e, arith)
    k = (n + 1) * (arith.u if arith.u_acc is None else arith.u_acc)
    k = k / (1 - k) if k < 0.5 else k
    c = math.expm1(2 * math.log1p(arith.u_in) + math.log1p(k) + 2 * math.log1p(arith.u_out))
    small = arith.smallest_normal
    if arith.flushes:
        lost = small * (
            2 * (n + 1)
            + _total(sizes[j] + e[j] for j in finite if 0 < absolute[j] < small)
            + _total(absolute[j] for j in finite if sizes[j] < small + e[j])
        )
    else:
        lost = n * arith.smallest / 2
    if exactly:
        return z, 0.0
    if not (1 + c) * total + lost < arith.largest:
        return z, math.inf
    if not _finite(z):
        # NaN or infinity came in, and the finite terms cannot overflow: the class is sure unless a factor of an
        # infinity may be computed as 0.
        beside = [j for j in range(n) if math.isinf(sizes[j]) != math.isinf(absolute[j])]
        vanishing = any(0 < min(absolute[j], sizes[j]) < small or e[j] for j in beside)
        return z, math.inf if vanishing or (len(finite) == n and math.isfinite(b)) else 0.0
    own = 0.0 if m is not FLOATS else 2.0**-51 * total  # the reference's own sum
    return z, (carried + c * total + (1 + c) * lost + own) * _SLACK


def _sum(terms: list[Any], m: Any) -> Any:
    if m is not FLOATS:
        return m.context.fsum(terms)
    return math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)


def _total(values: Iterable[float]) -> float:
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def _no_rounding(w: list[float], h: list[Any], b: float, total: float, e: list[float], arith: Arithmetic) -> bool:
    """Whether every product and every partial sum, in any order, is a number of the format."""
    if arith.u_in or any(e):
        return False
    grains = [_lowbit(w[j]) * _lowbit(float(h[j])) for j in range(len(w)) if w[j] and h[j]]
    if b:
        grains.append(_lowbit(b))
    grain = min(grains, default=1.0)
    flushed = arith.flushes and any(0 < abs(v) < arith.smallest_normal for v in (*w, *map(float, h), b))
    return not flushed and total < arith.largest and grain >= arith.quantum and total <= grain / arith.u


def _lowbit(value: float) -> float:
    """The largest power of two that divides a finite value."""
    numerator, denominator = value.as_integer_ratio()
    return (numerator & -numerator) / denominator


def _scale(s: float, c: float, t: float, h: Any, e: float, arith: Arithmetic, m: Any) -> tuple[Any, float]:
    """(h - c) s + t: three roundings."""
    z = (h - m.number(c)) * m.number(s) + m.number(t)
    if math.isinf(e) or not all(map(math.isfinite, (s, c, t))):
        return z, math.inf
    if not _finite(z) or not math.isfinite(float(h)):
        return z, 0.0
    difference = abs(float(h - m.number(c))) + e
    total = abs(s) * difference + abs(t)
    lost = arith.quantum * (abs(s) + 2)
    if arith.flushes:
        lost += arith.quantum * (abs(s) * 3 + difference)
    error = abs(s) * e + math.expm1(3 * math.log1p(arith.u)) * total + lost
    if not total + error < arith.largest:
        return z, math.inf
    return z, (error + 2.0**-51 * (total + abs(s * c))) * _SLACK if m is FLOATS else error * _SLACK


# The activations' own errors. For an exact argument t, the computed f(t) is within expm1(1.01 r) |f(t)| + a of f(t),
# r in units of u, K the library's error in ulp (an ulp is at most 2 u relative). Derived from the formulas of
# activations.py, to first order; expm1 and the factor 1.01 cover the rest. q is what one underflow may lose.

_Row = Callable[[float, Mapping[str, float], Sequence[float]], float]

_RELATIVE: dict[str, _Row] = {
    "identity": lambda t, k, p: 0,
    "relu": lambda t, k, p: 0,
    "relu6": lambda t, k, p: 0,
    "hard_tanh": lambda t, k, p: 0,
    "thresholded_relu": lambda t, k, p: 0,
    "clip": lambda t, k, p: 0,
    "leaky_relu": lambda t, k, p: 1,  # the product; scalars are rounded to the dtype before the pass
    "prelu": lambda t, k, p: 1,
    "tanh": lambda t, k, p: 2 * k["tanh"],
    "sigmoid": lambda t, k, p: 2 + 3 * k["exp"],  # numerator 2K, sum K and 1, quotient 1
    "softsign": lambda t, k, p: 2,
    "softplus": lambda t, k, p: 1 + 2 * k["exp"] + 2 * k["log1p"],  # log1p'(e) e / log1p(e) <= 1
    "log_sigmoid": lambda t, k, p: 1 + 2 * k["exp"] + 2 * k["log1p"],
    "elu": lambda t, k, p: 2 + 2 * k["expm1"],
    "selu": lambda t, k, p: 2 + 2 * k["expm1"],
    # quotient, product; expm1'(s) s / expm1(s) is at most 1 for s < 0 and 1 + s for s > 0 (a negative alpha)
    "celu": lambda t, k, p: 4 + 2 * k["expm1"] + 2 * max(t / p[0] if p[0] else 0.0, 0.0),
    "silu": lambda t, k, p: 3 + 3 * k["exp"],
    "hard_silu": lambda t, k, p: 1,  # and what _clipped adds
    "hard_sigmoid": lambda t, k, p: 0,  # only what _clipped adds
    "mish": lambda t, k, p: 8 + 4 * k["exp"],
    # -t sqrt(1/2) is off by 2 u, and erfc'(v) v / erfc(v) <= 2 v^2 + 2 = t^2 + 2 for t < 0
    "gelu": lambda t, k, p: 7 + 2 * k["erfc"] + 2 * min(t, 0.0) ** 2,
    # the argument v of the sigmoid is off by 6 u |v|, and sigmoid'(v) v / sigmoid(v) <= |v| for v < 0, < 0.3 above
    "gelu_tanh": lambda t, k, p: 5 + 3 * k["exp"] + 6 * max(-1.5957691216057308 * (t + 0.044715 * t**3), 0.0),
    "exp": lambda t, k, p: 2 * k["exp"],
}

# Where the slope changes its sign, besides 0: the activation is monotonic between these.
_TURNS = {
    "silu": -1.2784645427610738,
    "gelu": -0.7517915246935645,
    "gelu_tanh": -0.7524614220710163,
    "mish": -1.1924312145154952,
    "hard_silu": -1.5,
}


def _elementwise(layer: Layer, z: list[Any], errors: list[float], arith: Arithmetic, m: Any) -> tuple[Any, Any]:
    name = layer.activation.name
    if not layer.activation.is_named:
        raise ArrayError(f"the rounding of the activation {name} is unknown: no bound can be given")
    f, values = scalar_form(layer), activate(layer, z, m)
    parameters = list(zip(*(each(v, len(z)) for v in layer.activation.parameters.values()), strict=True)) or [()] * len(
        z
    )
    bounds = []
    for t, value, wide, p in zip(z, values, errors, parameters, strict=True):
        if math.isinf(wide) or not all(map(math.isfinite, p)):
            bounds.append(math.inf)
        elif not _finite(t) or name == "identity":
            r = _RELATIVE[name](0.0, arith.ulp, p) * arith.u
            bounds.append(wide if name == "identity" else abs(float(value)) * r if _finite(value) else 0.0)
        else:
            bounds.append(_propagate(name, f, t, value, wide, p, arith, m))
    return values, bounds


def _propagate(
    name: str, f: Any, t: Any, value: Any, wide: float, p: Sequence[float], arith: Arithmetic, m: Any
) -> float:
    """The error of the activation of t, itself known to within `wide`."""
    low, high = t - wide, t + wide
    reached = [f(low, m, *p), f(high, m, *p)] if wide else []
    turns = [0.0, _TURNS.get(name, 0.0)] if wide else []
    reached += [f(m.number(turn), m, *p) for turn in turns if low < turn < high]
    if name == "thresholded_relu" and abs(t - p[0]) <= wide + (
        arith.quantum if arith.flushes else 0
    ):  # the jump, from 0 to alpha
        reached += [m.number(0), m.number(p[0])]
    moved = max((abs(float(r - value)) for r in reached), default=0.0)
    size, far = abs(float(value)), abs(float(t)) + wide
    r = 1.01 * arith.u * _RELATIVE[name](min(max(float(t) - wide, -1e8), 1e8), arith.ulp, p)
    error = moved + math.expm1(min(r, 700.0)) * (size + moved)
    if name in ("hard_sigmoid", "hard_silu"):
        error += _clipped(name, float(t), wide, p, arith)
    error += arith.quantum * _underflows(name, far, p, arith)
    if name == "gelu":  # erfc underflows before its product with t does; in 16 bit it is computed in float32
        error += (1 + min(far, 60.0)) * (arith.quantum if arith.u > 2.0**-12 else arith.smallest_normal)
    if m is FLOATS:  # the reference's own rounding, of t +- wide too
        error += 2.0**-51 * far * max([1.0, *map(abs, p)]) if wide else 0.0
        error += 2.0**-49 * (1 + min(float(t) ** 2, 1e6)) * size if name not in _ROUNDLESS else 0.0
    # With a negative alpha, celu's expm1 of a positive number may overflow before alpha makes it smaller.
    inside = abs(p[0]) if name == "celu" and p[0] < 0 and low < 0 else 1.0
    return error * _SLACK if size + error < arith.largest * min(inside, 1.0) else math.inf


def _clipped(name: str, t: float, wide: float, p: Sequence[float], arith: Arithmetic) -> float:
    """Rounding of alpha t + beta before it is clipped to [0, 1]; times |t| for hard_silu."""
    alpha, beta = p if name == "hard_sigmoid" else (1 / 6, 0.5)
    far = abs(t) + wide
    error = arith.u * (3 * abs(alpha) * far + 2 * abs(beta)) * 1.01 + 3 * arith.quantum * (1 + abs(alpha))
    if arith.flushes and abs(alpha) < arith.smallest_normal:
        error += abs(alpha) * far
    inner = alpha * t + beta
    reach = error + abs(alpha) * wide
    if inner - reach > 1 or inner + reach < 0:
        return 0.0
    return min(error, 1.0) * (far if name == "hard_silu" else 1.0)


_ROUNDLESS = ("relu", "relu6", "hard_tanh", "thresholded_relu", "clip")


def _underflows(name: str, far: float, p: Sequence[float], arith: Arithmetic) -> float:
    """How many quanta underflow may cost, each entering the result with the weight it has there."""
    if name in _ROUNDLESS:
        return 1.0 if arith.flushes else 0.0
    count = 3.0
    if name in ("silu", "hard_silu", "gelu_tanh", "mish"):
        count += (3 if name == "mish" else 1) * min(far, 1e3)
    elif p:  # a slope or an alpha: of the argument's and the function's underflow, and its own
        count += 3 * max(map(abs, p))
        if arith.flushes and any(0 < abs(v) < arith.smallest_normal for v in p):
            count += far
    return count


def _softmax(name: str, z: list[Any], errors: list[float], arith: Arithmetic, m: Any) -> tuple[Any, Any]:
    values = VECTOR[name](z, m)
    n = len(z)
    if any(map(math.isinf, errors)):
        return values, [math.inf] * n
    if not all(map(_finite, z)):
        kept = [i for i, t in enumerate(z) if _finite(t)]
        if not kept or any(t != t or t > 0 for t in z if not _finite(t)):
            return values, [0.0] * n  # NaN throughout
        some = dict(
            zip(kept, _softmax(name, [z[i] for i in kept], [errors[i] for i in kept], arith, m)[1], strict=True)
        )
        return values, [some.get(i, 0.0) for i in range(n)]  # what came in as -inf gives 0, or -inf, exactly
    top, widest = max(z), max(errors)
    u, k = arith.u, arith.ulp
    shift = [u * (abs(float(t - top)) + d + widest) + 2 * u * k["exp"] for t, d in zip(z, errors, strict=True)]
    spread = [d + s for d, s in zip(errors, shift, strict=True)]
    # g = log of sum softmax(z) exp(spread), as the difference of two logarithms of sums of exponentials
    distances = [float(t - top) for t in z]
    raised = [d + s for d, s in zip(distances, spread, strict=True)]
    peak = max(raised)
    g = peak + math.log(math.fsum(math.exp(r - peak) for r in raised) / math.fsum(map(math.exp, distances)))
    bounds = []
    for i, value in enumerate(values):
        size = abs(float(value))
        own = 2.0**-45 * max(1.0, size) if m is FLOATS else 0.0
        if name == "softmax":
            power = 1.01 * (spread[i] + g + (n + 1) * u)
            bound = size * math.expm1(power) if power < 700 else math.inf
            bound = min(bound, 1 + 2 * (n + 2) * u) + (n + 2) * arith.smallest_normal + own * size
        else:
            bound = spread[i] + g + (n + 2) * u * max(1.0, size) + 2 * u * k["log"] * math.log(n + 1) + own
            bound += (n + 2) * arith.smallest_normal
        bounds.append(bound * _SLACK if bound < arith.largest else math.inf)
    return values, bounds


def _finite(value: Any) -> bool:
    return bool(value == value and abs(value) < math.inf)
