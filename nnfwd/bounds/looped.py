"""The definition of the bound, by readable loops: one number at a time, as the reference computes.

The exact values are Python floats, or mpmath's for float64; the bound is a float.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nnfwd.bounds import rows
from nnfwd.bounds.arithmetic import Arithmetic
from nnfwd.bounds.result import Bounded, Stored
from nnfwd.layers import Dense, Layer, Scale
from nnfwd.reference import FLOATS, VECTOR, activate, digits, each, is_vector, nested, scalar_form

SLACK = 1 + 2.0**-40  # for the bound's own rounding


def looped_bound(x: Any, layers: Any, /, *, arithmetic: Arithmetic) -> Bounded:
    """The exact output of a network for x and the bound on its computed value: the definition, slow.

    Args:
        x: `(..., in)`, as stored: an array or nested lists of values that `arithmetic.dtype` holds exactly.
        layers: a `Network` or a sequence of layers, their arrays holding exactly what the computation used.
        arithmetic: how the library rounds.

    Returns:
        `Bounded` of shape `(..., out)`, or `(members, ..., out)` for an ensemble, its `exact` an object array.

    Raises:
        DtypeError: where a number is not one of the dtype.
        ArrayError: for an activation whose rounding is unknown (a callable of one's own).
    """
    stored = Stored.of(x, layers, arithmetic.dtype)
    given = stored.x.reshape(-1, stored.x.shape[-1])
    exact, error = [], []
    for member in stored.members:
        for h, e in looped_rows(given, member, arithmetic):
            exact.append(h)
            error.append(e)
    shape = (*stored.lead, stored.out_features)
    values = np.empty(math.prod(shape), dtype=object)
    values[:] = [value for row in exact for value in row]
    return Bounded(values.reshape(shape), np.array(error, dtype="float64").reshape(shape))


def looped_rows(
    given: np.ndarray, layers: Sequence[Layer], arith: Arithmetic
) -> Iterable[tuple[list[Any], list[float]]]:
    """Exact values and bounds for each of the rows `(rows, in)`."""
    m = digits() if arith.dtype == "float64" else FLOATS
    prepared = [(layer, _weights(layer, m)) for layer in layers]
    for row in given.tolist():
        h, e = [m.number(value) for value in row], [0.0] * len(row)
        for layer, weights in prepared:
            h, e = _layer(layer, weights, h, e, arith, m)
        yield h, e


def _weights(layer: Layer, m: Any) -> Any:
    """A Dense layer's rows of weights as floats and in the number system m, read once."""
    if not isinstance(layer, Dense):
        return None
    weight = nested(layer.weight)
    bias = nested(layer.bias) or [0.0] * len(weight)
    return [(row, row if m is FLOATS else [m.number(w) for w in row], b) for row, b in zip(weight, bias, strict=True)]


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
    """z = W h + b of one node, and E."""
    n = len(w)
    z = _sum([wide[j] * h[j] for j in range(n)] + [m.number(b)], m)
    if any(map(math.isinf, e)):
        return z, math.inf
    absolute = [abs(v) for v in w]
    finite = [j for j in range(n) if math.isfinite(sizes[j]) and math.isfinite(absolute[j])]
    total = _total(absolute[j] * (sizes[j] + e[j]) for j in finite) + (abs(b) if math.isfinite(b) else 0.0)  # A
    carried = _total(absolute[j] * e[j] for j in finite)
    if not any(e) and len(finite) == n and math.isfinite(b) and not arith.u_in:
        grains = [_lowbit(w[j]) * _lowbit(float(h[j])) for j in range(n) if w[j] and h[j]]
        if b:
            grains.append(_lowbit(b))
        if _no_rounding(total, grains, (*w, *sizes, b), arith):
            return z, 0.0
    c = arith.dense_error(n)
    small = arith.smallest_normal
    if arith.flushes:
        lost = small * (
            2 * (n + 1)
            + _total(sizes[j] + e[j] for j in finite if 0 < absolute[j] < small)
            + _total(absolute[j] for j in finite if sizes[j] < small + e[j])
        )
    else:
        lost = n * arith.smallest
    reach = max((max(absolute[j], sizes[j] + e[j]) for j in finite), default=0.0)
    if not (1 + c) * total + lost < arith.largest or not arith.holds_operand(reach):
        return z, math.inf
    if not _finite(z):
        # NaN or infinity came in, and the finite terms cannot overflow: the class is sure unless a factor of an
        # infinity may be computed as 0.
        beside = [j for j in range(n) if math.isinf(sizes[j]) != math.isinf(absolute[j])]
        vanishing = any(0 < min(absolute[j], sizes[j]) < small or e[j] for j in beside)
        return z, math.inf if vanishing or (len(finite) == n and math.isfinite(b)) else 0.0
    own = 0.0 if m is not FLOATS else 2.0**-51 * total  # the reference's own sum
    return z, (carried + c * total + (1 + c) * lost + own) * SLACK


def _sum(terms: list[Any], m: Any) -> Any:
    if m is not FLOATS:
        return m.context.fsum(terms)
    try:
        return math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)
    except OverflowError:
        return sum(terms)


def _total(values: Iterable[float]) -> float:
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def _no_rounding(total: float, grains: list[float], values: Iterable[float], arith: Arithmetic) -> bool:
    """Whether sums of multiples of the grains, of at most this total size, are numbers of the format in any order."""
    grain = min(grains, default=1.0)
    flushed = arith.flushes and any(0 < abs(v) < arith.smallest_normal for v in values)
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
        return z, math.inf if 0 < abs(s) < arith.smallest_normal else 0.0  # infinity times what may be computed as 0
    difference = abs(float(h - m.number(c))) + e
    total = abs(s) * difference + abs(t)
    lost = arith.quantum * (abs(s) + 2)
    if arith.flushes:
        lost += arith.quantum * (abs(s) * 3 + difference)
    error = abs(s) * e + arith.scale_error * total + lost
    if not max(total + error, (1 + arith.scale_error) * difference) < arith.largest:
        return z, math.inf
    return z, (error + 2.0**-51 * (total + abs(s * c))) * SLACK if m is FLOATS else error * SLACK


def _elementwise(layer: Layer, z: list[Any], errors: list[float], arith: Arithmetic, m: Any) -> tuple[Any, Any]:
    name = layer.activation.name
    f, values = scalar_form(layer), activate(layer, z, m)
    listed = [each(v, len(z)) for v in layer.activation.parameters.values()]
    parameters = list(zip(*listed, strict=True)) if listed else [()] * len(z)
    bounds = []
    for t, value, wide, p in zip(z, values, errors, parameters, strict=True):
        if math.isinf(wide) or not rows.bounded(name, p, arith):
            bounds.append(math.inf)
        elif name == "identity":
            bounds.append(wide)
        elif not _finite(t):
            row = float(rows.relative(name, 0.0, arith.ulp, p)) * arith.u
            vanishing = any(0 < abs(v) < arith.smallest_normal for v in p)  # it may be computed as 0
            bounds.append(math.inf if vanishing else abs(float(value)) * row if _finite(value) else 0.0)
        else:
            bounds.append(_propagate(name, f, t, value, wide, p, arith, m))
    return values, bounds


def _propagate(
    name: str, f: Any, t: Any, value: Any, wide: float, p: Sequence[float], arith: Arithmetic, m: Any
) -> float:
    """The error of the activation of t, itself known to within `wide`."""
    size = abs(float(value))
    if wide == 0 and _keeps(name, float(t), size, p, arith):
        return 0.0
    unit = 2.0**-53 if m is FLOATS else 0.0
    if wide:
        wide += 2 * unit * (abs(float(t)) + wide)  # t +- wide rounds
    low, high = t - wide, t + wide
    reached = [f(low, m, *p), f(high, m, *p)] if wide else []
    turns = [0.0, rows.TURNS.get(name, 0.0)] if wide else []
    reached += [f(m.number(turn), m, *p) for turn in turns if low < turn < high]
    if wide and name == "thresholded_relu" and abs(t - p[0]) <= wide + (arith.quantum if arith.flushes else 0):
        reached += [m.number(0), m.number(p[0])]  # the jump, from 0 to alpha
    moved = max((abs(float(r - value)) for r in reached), default=0.0)
    far = abs(float(t)) + wide
    worst = float(t) - wide
    r = 1.01 * arith.u * float(rows.relative(name, worst, arith.ulp, p))
    error = moved + math.expm1(min(r, 700.0)) * (size + moved)
    if name in ("hard_sigmoid", "hard_silu"):
        error += float(rows.clipped(name, float(t), wide, p, arith))
    error += arith.quantum * float(rows.underflows(name, far, p, arith))
    error += float(rows.own(name, worst, size, p, unit))
    # With a negative alpha, celu's expm1 of a positive number may overflow before alpha makes it smaller.
    inside = abs(p[0]) if name == "celu" and p[0] < 0 and low < 0 else 1.0
    return error * SLACK if size + error < arith.largest * min(inside, 1.0) else math.inf


def _keeps(name: str, t: float, size: float, p: Sequence[float], arith: Arithmetic) -> bool:
    """Whether an exact argument gives an exact result: nothing rounds, and nothing is flushed."""
    if name in rows.ROUNDLESS:
        return not (arith.flushes and (0 < abs(t) < arith.smallest_normal or 0 < size < arith.smallest_normal))
    if name not in rows.LINEAR:
        return False
    return _no_rounding(size, [_lowbit(t) * _lowbit(p[0])] if t and p[0] else [], (t, p[0]), arith)


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
    if not rows.softmax_fits(widest, n, arith):
        return values, [math.inf] * n
    distances = [float(t - top) for t in z]
    spread = [d + u * (abs(far) + d + widest) + 2 * u * k["exp"] for far, d in zip(distances, errors, strict=True)]
    g = _spread_of_sum(distances, spread)
    lost = (n + 2) * arith.quantum * math.exp(widest)
    bounds = []
    for i, value in enumerate(values):
        size = abs(float(value))
        own = (2 * n + 32) * 2.0**-53 * max(1.0, size) if m is FLOATS else 0.0
        if name == "softmax":
            power = 1.01 * (spread[i] + g + (n + 1) * u)
            bound = size * math.expm1(power) if power < 700 else math.inf
            bound = min(bound + lost, 1 + 2 * (n + 2) * u) + own * size
        else:
            bound = spread[i] + g + (n + 2) * u * max(1.0, size) + lost + own
            bound += u * (2 * k["log"] * (math.log(n + 1) + widest) + widest)
        bounds.append(bound * SLACK if size + bound < arith.largest else math.inf)
    return values, bounds


def _spread_of_sum(distances: list[float], spread: list[float]) -> float:
    """log(sum softmax(z) exp(spread)) from the distances of z to its maximum."""
    total = math.fsum(map(math.exp, distances))
    if max(spread) < 1:
        weighted = (math.exp(d) * math.expm1(s) for d, s in zip(distances, spread, strict=True))
        return math.log1p(math.fsum(weighted) / total)
    raised = [d + s for d, s in zip(distances, spread, strict=True)]
    peak = max(raised)
    return peak + math.log(math.fsum(math.exp(r - peak) for r in raised) / total)


def _finite(value: Any) -> bool:
    return bool(value == value and abs(value) < math.inf)
