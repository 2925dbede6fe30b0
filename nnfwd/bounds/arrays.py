"""The bound in array operations: the definition's formulas for many rows at once, fast enough for real data.

The exact values are computed in float64, for float64 in NumPy's long double where that is wider (x86, and Linux on
Arm), else by the loops; what this costs in accuracy is part of the bound. It is never below `looped_bound`'s and, a
few of float64's smallest subnormals aside, at most 1.01 of it. Rows with NaN or infinity, and networks with such
weights, go through the loops.
"""

import functools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from nnfwd.bounds import rows
from nnfwd.bounds.arithmetic import Arithmetic
from nnfwd.bounds.looped import SLACK, looped_bound, looped_rows
from nnfwd.bounds.result import Bounded, Stored
from nnfwd.layers import Dense, Layer, Scale
from nnfwd.reference import digits, is_vector

_WIDE = np.finfo(np.longdouble).nmant in (63, 112)
_SLACK = SLACK + 2.0**-50  # the loops round their bounds to float64, in another order
_AT_ONCE = 2**19  # elements of a layer


def array_bound(x: Any, layers: Any, /, *, arithmetic: Arithmetic) -> Bounded:
    """`looped_bound` for many rows; arguments, shapes and errors are the same, `exact` is an array of numbers."""
    if arithmetic.dtype == "float64" and not _WIDE:
        return looped_bound(x, layers, arithmetic=arithmetic)
    stored = Stored.of(x, layers, arithmetic.dtype)
    work = np.longdouble if arithmetic.dtype == "float64" else np.float64
    given = stored.x.reshape(-1, stored.x.shape[-1])
    shape = (len(stored.members), len(given), stored.out_features)
    exact, error = np.empty(shape, work), np.empty(shape)
    finite = np.isfinite(given).all(axis=-1)
    with np.errstate(all="ignore"):
        for i, member in enumerate(stored.members):
            usual = finite & _is_finite(member)
            widest = max(given.shape[-1], *(layer.out_features or 1 for layer in member))
            for block in np.array_split(np.flatnonzero(usual), math.ceil(len(given) * widest / _AT_ONCE) or 1):
                exact[i, block], error[i, block] = _Pass(arithmetic, work).through(member, given[block])
            for row in np.flatnonzero(~usual):
                ((values, bounds),) = looped_rows(given[row : row + 1], member, arithmetic)
                exact[i, row] = [_as_wide(v) for v in values]
                pairs = zip(values, exact[i, row], strict=True)
                cut = [abs(float(v - _as_number(w))) if math.isfinite(w) else 0.0 for v, w in pairs]
                error[i, row] = np.add(bounds, cut)
    whole = (*stored.lead, stored.out_features)
    return Bounded(exact.reshape(whole), error.reshape(whole))


def _is_finite(layers: Sequence[Layer]) -> bool:
    """Whether every number of the layers is finite (or bounds a clip)."""
    inside = [
        value for layer in layers if layer.activation.name != "clip" for value in layer.activation.parameters.values()
    ]
    scales = [
        value for layer in layers if isinstance(layer, Scale) for value in (layer.scale, layer.center, layer.shift)
    ]
    dense = [a for layer in layers if isinstance(layer, Dense) for a in (layer.weight, layer.bias) if a is not None]
    return all(np.isfinite(a).all() for a in (*inside, *scales, *dense))


class _Pass:
    """The pass over one block of rows: exact values h and bounds e, both `(rows, features)` in the working format."""

    def __init__(self, arith: Arithmetic, work: Any) -> None:
        self.arith, self.work, self.unit = arith, work, float(np.finfo(work).eps) / 2
        # The loops' float64 values are as rounded as these, so there is room for both, which costs nothing: narrower
        # formats round far more. To float64 the long doubles' own rounding is near enough to count.
        self.own = self.unit * (8 if work is np.float64 else 1)

    def through(self, layers: Sequence[Layer], h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        h = h.astype(self.work)
        e = np.zeros_like(h)
        for layer in layers:
            if isinstance(layer, Dense):
                h, e = self.dense(layer, h, e)
            elif isinstance(layer, Scale):
                h, e = self.scale(layer, h, e)
            if is_vector(layer.activation):
                h, e = self.softmax(layer.activation.name, h, e)
            elif layer.activation.name != "identity":
                h, e = self.elementwise(layer, h, e)
        return h, e.astype("float64")

    def dense(self, layer: Dense, h: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        arith, n = self.arith, layer.in_features
        w = layer.weight.astype(self.work)
        b = np.zeros(len(w), self.work) if layer.bias is None else layer.bias.astype(self.work)
        z = h @ w.T + b
        claimed = np.isfinite(e).all(axis=-1)
        errors = np.full_like(z, np.inf)
        size, e, absolute = abs(h[claimed]), e[claimed], abs(w)
        total = (size + e) @ absolute.T + abs(b)
        carried = e @ absolute.T
        c, small = arith.dense_error(n), arith.smallest_normal
        if arith.flushes:
            is_small = ((absolute > 0) & (absolute < small)).astype(self.work)
            lost = small * (2 * (n + 1) + (size + e) @ is_small.T + (size < small + e).astype(self.work) @ absolute.T)
        else:
            lost = n * arith.smallest
        own = (n + 3) * self.own * total  # the reference's own sum
        error = (carried + c * total + (1 + c) * lost + own) * (_SLACK + 4 * (n + 8) * self.unit)
        held = arith.holds_operand(size + e).all(axis=-1)[:, None] & arith.holds_operand(absolute).all(axis=-1)
        error = np.where(((1 + c) * total + lost < arith.largest) & held, error, np.inf)
        exactly = ~e.any(axis=-1)
        if exactly.any() and not arith.u_in:
            kept = self._no_rounding(w, b, h[claimed][exactly], total[exactly])
            error[exactly] = np.where(kept, 0.0, error[exactly])
        errors[claimed] = error
        return z, errors

    def _no_rounding(self, w: np.ndarray, b: np.ndarray, h: np.ndarray, total: np.ndarray) -> np.ndarray:
        """Where no operation rounds, `(rows, out)`: the smallest product of lowest bits is coarse enough."""
        arith = self.arith
        fine_w, fine_h, fine_b = (_over_lowbit(a).astype(self.work) for a in (w, h, b))
        needed = np.maximum(total * arith.u, arith.quantum)
        # The largest of n terms is at most their sum and at least an n-th of it, so a product of matrices decides most.
        crowd = (fine_h @ fine_w.T + fine_b) * needed
        kept = crowd <= 0.5
        doubtful = np.argwhere((crowd > 0.5) & (crowd <= 2 * (w.shape[1] + 1)))
        for some in np.array_split(doubtful, math.ceil(len(doubtful) * w.shape[1] / _AT_ONCE) or 1):
            i, j = some.T
            finest = np.maximum((fine_h[i] * fine_w[j]).max(axis=-1), fine_b[j])
            kept[i, j] = finest * needed[i, j] <= 1
        kept &= total < arith.largest
        if arith.flushes:
            tiny_h, tiny_w, tiny_b = ((abs(a) > 0) & (abs(a) < arith.smallest_normal) for a in (h, w, b))
            kept &= ~np.any(tiny_h, axis=-1)[:, None] & ~(np.any(tiny_w, axis=-1) | tiny_b)
        return kept

    def scale(self, layer: Scale, h: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        arith = self.arith
        s, c, t = (np.asarray(v).astype(self.work) for v in (layer.scale, layer.center, layer.shift))
        z = (h - c) * s + t
        difference = abs(h - c) + e
        total = abs(s) * difference + abs(t)
        lost = arith.quantum * (abs(s) + 2)
        if arith.flushes:
            lost = lost + arith.quantum * (abs(s) * 3 + difference)
        error = abs(s) * e + arith.scale_error * total + lost
        whole = (error + 4 * self.own * (total + abs(s * c))) * (_SLACK + 16 * self.unit)
        largest = np.maximum(total + error, (1 + arith.scale_error) * difference)
        return z, np.where(largest < arith.largest, whole, np.inf)

    def elementwise(self, layer: Layer, z: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        arith, name = self.arith, layer.activation.name
        p = [np.asarray(v).astype(self.work) for v in layer.activation.parameters.values()]
        constants = _constants(self.work)

        def f(t: np.ndarray) -> np.ndarray:
            return _ACTIVATIONS[name](t, constants, *p)

        values = f(z)
        claimed = np.isfinite(e) & rows.bounded(name, p, arith)
        t, value, wide = (np.where(claimed, a, 0) for a in (z, values, e))
        size = abs(value)
        wide = np.where(wide > 0, wide + 2 * self.own * (abs(t) + wide), 0)  # t +- wide rounds
        low, high = t - wide, t + wide
        moved = np.where(wide > 0, np.maximum(abs(f(low) - value), abs(f(high) - value)), 0)
        for turn in (0.0, rows.TURNS.get(name, 0.0)):
            inside = (low < turn) & (turn < high)
            if inside.any():
                moved = np.where(inside, np.maximum(moved, abs(f(np.full_like(t, turn)) - value)), moved)
        if name == "thresholded_relu":  # the jump, from 0 to alpha
            near = abs(t - p[0]) <= wide + (arith.quantum if arith.flushes else 0)
            moved = np.where(near & (wide > 0), np.maximum(moved, np.maximum(size, abs(p[0] - value))), moved)
        worst = t - wide
        r = 1.01 * arith.u * rows.relative(name, worst, arith.ulp, p)
        error = moved + np.expm1(np.minimum(r, 700.0)) * (size + moved)
        if name in ("hard_sigmoid", "hard_silu"):
            error = error + rows.clipped(name, t, wide, p, arith)
        error = error + arith.quantum * rows.underflows(name, abs(t) + wide, p, arith)
        error = error + rows.own(name, worst, size + moved, p, self.own)
        limit: Any = arith.largest
        if name == "celu":  # with a negative alpha, expm1 may overflow before alpha makes it smaller
            limit = limit * np.where((p[0] < 0) & (low < 0), np.minimum(abs(p[0]), 1.0), 1.0)
        whole = np.where(claimed & (size + error < limit), error * (_SLACK + 64 * self.unit), np.inf)
        return values, np.where(claimed & (wide == 0) & self._keeps(name, t, size, p), 0.0, whole)

    def _keeps(self, name: str, t: np.ndarray, size: np.ndarray, p: list[Any]) -> np.ndarray | bool:
        """Where an exact argument gives an exact result: nothing rounds, and nothing is flushed."""
        arith = self.arith
        if name in rows.ROUNDLESS:
            tiny = [(a > 0) & (a < arith.smallest_normal) for a in (abs(t), size)]
            return ~(tiny[0] | tiny[1]) if arith.flushes else True
        if name not in rows.LINEAR:
            return False
        finest = _over_lowbit(t) * _over_lowbit(np.broadcast_to(p[0], t.shape))
        kept = finest * np.maximum(size * arith.u, arith.quantum) <= 1
        if arith.flushes:
            kept &= ~np.logical_or(*((abs(a) > 0) & (abs(a) < arith.smallest_normal) for a in (t, p[0])))
        return kept & (size < arith.largest)

    def softmax(self, name: str, z: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        arith, n, u, k = self.arith, z.shape[-1], self.arith.u, self.arith.ulp
        top = z.max(axis=-1, keepdims=True)
        distances = z - top
        raised = np.exp(distances)
        total = raised.sum(axis=-1, keepdims=True)
        values = raised / total if name == "softmax" else distances - np.log(total)
        widest = e.max(axis=-1, keepdims=True)
        claimed = rows.softmax_fits(widest, n, arith)
        d, widest = np.where(claimed, e, 0), np.where(claimed, widest, 0)
        spread = d + u * (abs(distances) + d + widest) + 2 * u * k["exp"]
        lost = (n + 2) * arith.quantum * np.exp(widest)
        # g = log(sum softmax(z) exp(spread)), where the spread is large as the difference of two logarithms
        narrow = np.log1p((raised * np.expm1(spread)).sum(axis=-1, keepdims=True) / total)
        peak = (distances + spread).max(axis=-1, keepdims=True)
        broad = peak + np.log(np.exp(distances + spread - peak).sum(axis=-1, keepdims=True) / total)
        g = np.where(spread.max(axis=-1, keepdims=True) < 1, narrow, broad)
        size = abs(values)
        own = (2 * n + 32) * self.own * np.maximum(1.0, size)
        if name == "softmax":
            power = 1.01 * (spread + g + (n + 1) * u)
            bound = np.where(power < 700, size * np.expm1(np.minimum(power, 700)), np.inf)
            bound = np.minimum(bound + lost, 1 + 2 * (n + 2) * u) + own * size
        else:
            bound = spread + g + (n + 2) * u * np.maximum(1.0, size) + lost + own
            bound = bound + u * (2 * k["log"] * (math.log(n + 1) + widest) + widest)
        whole = bound * (_SLACK + 8 * (n + 8) * self.unit)
        return values, np.where(claimed & (size + bound < arith.largest), whole, np.inf)


def _over_lowbit(a: np.ndarray) -> np.ndarray:
    """1 / the largest power of two that divides each (finite float64) value, 0 for 0; in the working format."""
    mantissa, exponent = np.frexp(a.astype("float64"))
    whole = (mantissa * 2.0**53).astype("int64")
    _, place = np.frexp(np.maximum(whole & -whole, 1).astype("float64"))
    lowest = np.ldexp(np.ones_like(a), 54 - place - exponent)
    return np.where(whole == 0, 0.0, lowest)


# The activations once more, in arrays: an opinion of its own, held to `reference.SCALAR` by the tests. t is an array,
# k holds the constants in the working format.


def _sigmoid(t: np.ndarray) -> np.ndarray:
    e = np.exp(-abs(t))
    return np.where(t >= 0, 1, e) / (1 + e)


def _softplus(t: np.ndarray) -> np.ndarray:
    return np.maximum(t, 0) + np.log1p(np.exp(-abs(t)))


def _elu(t: np.ndarray, alpha: Any) -> np.ndarray:
    return np.where(t > 0, t, alpha * np.expm1(np.minimum(t, 0)))


def _celu(t: np.ndarray, k: Any, alpha: Any) -> np.ndarray:
    return np.where(t > 0, t, np.where(alpha == 0, 0, alpha * np.expm1(np.where(t > 0, 0, t) / alpha)))


def _gelu_tanh(t: np.ndarray, k: Any) -> np.ndarray:
    near = np.clip(t, -1e3, 1e3)
    return t * np.where(t < -1e3, 0, _sigmoid(2 * k.root_2_pi * (near + k.cubic * near**3)))


_ACTIVATIONS: dict[str, Callable[..., np.ndarray]] = {
    "identity": lambda t, k: t,
    "relu": lambda t, k: np.maximum(t, 0),
    "relu6": lambda t, k: np.clip(t, 0, 6),
    "leaky_relu": lambda t, k, slope: np.where(t >= 0, t, slope * t),
    "prelu": lambda t, k, slope: np.where(t >= 0, t, slope * t),
    "thresholded_relu": lambda t, k, alpha: np.where(t <= alpha, 0, t),
    "clip": lambda t, k, lower, upper: np.minimum(np.maximum(t, lower), upper),
    "hard_tanh": lambda t, k: np.clip(t, -1, 1),
    "hard_sigmoid": lambda t, k, alpha, beta: np.clip(alpha * t + beta, 0, 1),
    "sigmoid": lambda t, k: _sigmoid(t),
    "tanh": lambda t, k: np.tanh(t),
    "softsign": lambda t, k: t / (1 + abs(t)),
    "softplus": lambda t, k: _softplus(t),
    "log_sigmoid": lambda t, k: -_softplus(-t),
    "elu": lambda t, k, alpha: _elu(t, alpha),
    "selu": lambda t, k: 1.0507009873554805 * _elu(t, 1.6732632423543772),
    "celu": _celu,
    "silu": lambda t, k: t * _sigmoid(t),
    "hard_silu": lambda t, k: t * np.clip(t / 6 + 0.5, 0, 1),
    "mish": lambda t, k: t * np.tanh(_softplus(t)),
    "gelu": lambda t, k: t * k.erfc(-t * k.root_half) / 2,
    "gelu_tanh": _gelu_tanh,
    "exp": lambda t, k: np.exp(t),
}


@functools.cache
def _constants(work: Any) -> Any:
    erfc = math.erfc if work is np.float64 else _wide_erfc
    apply = np.frompyfunc(erfc, 1, 1)
    return SimpleNamespace(
        erfc=lambda t: np.asarray(apply(t)).astype(work),
        root_half=np.sqrt(work(0.5)),
        root_2_pi=np.sqrt(2 / work("3.14159265358979323846264338327950288")),
        cubic=work("0.044715"),
    )


def _wide_erfc(t: Any) -> Any:
    return _as_wide(digits().erfc(_as_number(t)))


def _as_number(t: Any) -> Any:
    """A long double as mpmath's number."""
    number, head = digits().number, float(t)
    return number(head) + number(float(t - head))


def _as_wide(value: Any) -> Any:
    """A number of any kind as a long double, of which float64 holds the head and the tail."""
    head = float(value)
    return np.longdouble(head) + np.longdouble(float(value - head)) if math.isfinite(head) else np.longdouble(head)
