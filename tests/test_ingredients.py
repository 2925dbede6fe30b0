"""Every ingredient of the bound is needed: without it, a computation that is right would be called wrong.

Each ingredient is taken out of a copy of `nnfwd.bounds`, text and all, and both forms of the bound are asked about a
computation, its witness, in which that ingredient is nearly all there is.
"""

import functools
import importlib
import itertools
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from places import Place

import nnfwd
from nnfwd import Activation, Dense, Network, Scale, activations
from nnfwd.bounds import arithmetic_of
from nnfwd.bounds.rows import ROUNDLESS, TURNS

NUMPY, CORES, FLUSHING = Place("numpy", "cpu"), Place("emulated", "tensor_cores"), Place("emulated", "flushing")
U, SMALL = 2.0**-24, 2.0**-126  # float32's unit roundoff and smallest normal number


class Witness(NamedTuple):
    """A right computation."""

    place: Place
    net: Network
    x: np.ndarray
    y: Any = None
    """What was computed, None: by that place."""
    ulp: Any = {}  # noqa: RUF012
    """Errors of functions other than that place's."""


def dense(place, weight, x, y=None, bias=None, activation="identity", dtype="float32"):
    weight, x = np.asarray(weight, dtype), np.asarray(x, dtype)
    layer = Dense(weight, None if bias is None else np.asarray(bias, dtype), activation)
    return Witness(place, Network([layer]), x, y)


def act(place, function, x, y=None, dtype="float32", **ulp):
    return Witness(place, Network([Activation(function)]), np.asarray(x, dtype), y, ulp)


def scale(place, x, y=None, **parameters):
    return Witness(place, Network([Scale(**parameters)]), np.asarray(x, "float32"), y)


def sweep(function, *ends, dtype="float32"):
    return act(NUMPY, function, np.linspace(*ends, 400), dtype=dtype)


def off(by, exact, activation, y):
    """Sums that are `exact`, computed by products so large that they may be off by a little more than this."""
    k = by / (8 * U)
    return dense(NUMPY, [[k, -k, t] for t in exact], [1.0, 1.0, 1.0], y, activation=activation)


def then(*after, y=None):
    """A sum that is 1, computed as 0, and layers after it."""
    first = Dense(np.array([[2.0**24, 1.0, -(2.0**24)]], "float32"))
    return Witness(NUMPY, Network([first, *after]), np.ones(3, "float32"), y)


def cancelling(after):
    """Large terms cancel, and their rounding is all that the second layer sees."""
    rng = np.random.default_rng(0)
    big = rng.uniform(1, 2, (1, 8)).astype("float32") * 1e3
    x = (1 + 2.0**-12 + rng.uniform(0, 1e-4, 16)).astype("float32")
    return Witness(NUMPY, Network([Dense(np.concatenate([big, -big], axis=1)), after]), x)


def rounds_twice():
    """Of many drawn at random, the product and the sum whose roundings add up most."""

    def draw(rng):
        w, x = rng.uniform(1, 2, 2).astype("float32")
        b = np.float32(rng.uniform(0, 2**-20))
        y = w * x + b
        return abs(float(y) - (float(w) * float(x) + float(b))) / (float(w) * float(x)), w, x, b, y

    _, w, x, b, y = max((draw(np.random.default_rng(seed)) for seed in range(2000)), key=lambda found: found[0])
    return dense(NUMPY, [[w]], [x], [y], bias=[b])


def one_by_one(terms):
    total = np.float32(0)
    for term in terms:
        total = total + term
    return total


def many_lost():
    """1 + 3/4 u, a thousand times: each is lost."""
    weight = np.array([1.0, *[0.75 * U] * 1000], "float32")
    return dense(NUMPY, [weight], np.ones(1001), [one_by_one(weight)])


def softmax_of_many(name):
    """A sum of exponentials in which all but the first are lost."""
    x = np.array([0.0, *[np.log(0.75 * U)] * 1000], "float32")
    e = np.exp(x)
    s = one_by_one(e)
    return act(NUMPY, name, x, e / s if name == "softmax" else x - np.log(s))


def softmax_apart(name):
    """Two sums off in opposite directions."""
    z = np.array([-5 - 0.009, 0.009])
    p = np.exp(z) / np.exp(z).sum()
    return off(0.0095, (-5.0, 0.0), name, p if name == "softmax" else np.log(p))


def softmax_off():
    """An exponential that is 7 units off, as some libraries' are."""
    x = np.array([0.0, -0.7], "float32")
    e = np.exp(x)
    e[1] = np.float32(e[1] + 7 * U)
    return act(NUMPY, "softmax", x, e / e.sum(), exp=8.0)


TINY = 1e-39  # a subnormal number

# ingredient: its witness, then what files say and what is left without it
INGREDIENTS = {
    "products": (rounds_twice, ("arithmetic.py", "k = (n + 1) * (", "k = n * (")),
    "accumulation": (many_lost, ("arithmetic.py", "k = (n + 1) * (", "k = 2 * (")),
    "conversion of operands": (
        lambda: dense(CORES, [[1 + 2.0**-10 - 2.0**-23]], [1.0]),  # cut off to 1
        ("arithmetic.py", "2 * math.log1p(self.u_in) + ", ""),
    ),
    "conversion of both operands": (
        lambda: dense(CORES, [[1 + 2.0**-10 - 2.0**-23]], [1 + 2.0**-10 - 2.0**-23]),
        ("arithmetic.py", "2 * math.log1p(self.u_in)", "math.log1p(self.u_in)"),
    ),
    "conversion of sums": (
        lambda: dense(NUMPY, [[1.0, 2.0**-11 + 2.0**-20]], [1.0, 1.0], dtype="float16"),
        ("arithmetic.py", " + 2 * math.log1p(self.u_out)", ""),
    ),
    "conversion of sums with a bias": (
        lambda: dense(NUMPY, [[1.0, 2.0**-11]], [1.0, 1.0], bias=[2.0**-11], dtype="float16"),
        ("arithmetic.py", "2 * math.log1p(self.u_out)", "math.log1p(self.u_out)"),
    ),
    "gradual underflow of products": (
        lambda: dense(NUMPY, [[1.5 * 2.0**-75]], [2.0**-75]),
        ("*.py", "lost = n * arith.smallest", "lost = 0.0"),
    ),
    "flushed products": (
        lambda: dense(FLUSHING, [[1.5 * 2.0**-64]], [2.0**-64]),
        ("*.py", "2 * (n + 1)", "0"),
    ),
    "flushed weights": (
        lambda: dense(FLUSHING, [[TINY]], [1e30]),
        ("looped.py", "+ _total(sizes[j] + e[j] for j in finite if 0 < absolute[j] < small)", ""),
        ("arrays.py", " + (size + e) @ is_small.T", ""),
    ),
    "flushed inputs": (
        lambda: dense(FLUSHING, [[1e30]], [TINY]),
        ("looped.py", "+ _total(absolute[j] for j in finite if sizes[j] < small + e[j])", ""),
        ("arrays.py", " + (size < small + e).astype(self.work) @ absolute.T", ""),
    ),
    "propagation through weights": (
        lambda: cancelling(Dense(np.ones((1, 1), "float32"))),
        ("*.py", "(carried + ", "("),
    ),
    "overflow": (
        lambda: dense(NUMPY, [[3e38, 3e38]], [1.0, 1.0]),
        ("*.py", "(1 + c) * total + lost < arith.largest", "True"),
    ),
    "overflow of operands": (
        lambda: dense(CORES, [[np.finfo("float32").max]], [0.1], [np.inf]),  # rounded up
        ("looped.py", " or not arith.holds_operand(reach)", ""),
        ("arrays.py", " & held, error", ", error"),
    ),
    "infinity times what is flushed": (
        lambda: dense(FLUSHING, [[TINY]], [np.inf]),
        ("looped.py", "0 < min(absolute[j], sizes[j]) < small or e[j]", "e[j]"),
    ),
    "infinity times what may be 0": (
        lambda: then(Dense(np.array([[np.inf]], "float32")), y=[np.nan]),
        ("looped.py", " or e[j] for j in beside", " for j in beside"),
    ),
    # scales
    "propagation through scales": (
        lambda: cancelling(Scale(1.0, shift=0.0)),
        ("*.py", "error = abs(s) * e + ", "error = "),
    ),
    "the roundings of a scale": (
        lambda: scale(NUMPY, np.linspace(1, 2, 500), scale=1.1, center=0.3, shift=0.7),
        ("arithmetic.py", "math.expm1(3 * math.log1p(self.u))", "0.0"),
    ),
    "all three roundings of a scale": (  # found among many drawn at random
        lambda: scale(NUMPY, [1.0007091760635376], scale=1.00424969, center=-6.1399946e-06, shift=4.1793882e-07),
        ("arithmetic.py", "math.expm1(3 * math", "math.expm1(2 * math"),
    ),
    "underflow of a scale": (
        lambda: scale(NUMPY, [7 * 2.0**-149], scale=0.3),
        ("*.py", "lost = arith.quantum * (abs(s) + 2)", "lost = 0.0"),
    ),
    "flushed inputs of a scale": (
        lambda: scale(FLUSHING, [0.99 * SMALL], scale=1e20, center=-0.99 * SMALL),
        ("*.py", "(abs(s) * 3 + difference)", "difference"),
    ),
    "a flushed scale": (
        lambda: scale(FLUSHING, [1e30], [0.0], scale=TINY),
        ("*.py", "(abs(s) * 3 + difference)", "(abs(s) * 3)"),
    ),
    "overflow of a scale": (
        lambda: scale(NUMPY, [1e30], scale=1e10),
        ("looped.py", "if not max(total + error, (1 + arith.scale_error) * difference) < arith.largest", "if False"),
        ("arrays.py", "np.where(largest < arith.largest, whole, np.inf)", "whole"),
    ),
    "overflow inside a scale": (
        lambda: scale(NUMPY, [3e38], scale=1e-3, center=-3e38),
        ("looped.py", "max(total + error, (1 + arith.scale_error) * difference)", "total + error"),
        ("arrays.py", "np.maximum(total + error, (1 + arith.scale_error) * difference)", "total + error"),
    ),
    "infinity times a flushed scale": (
        lambda: scale(FLUSHING, [np.inf], [np.nan], scale=TINY),
        ("looped.py", "math.inf if 0 < abs(s) < arith.smallest_normal else 0.0", "0.0"),
    ),
    # activations
    "propagation through activations": (
        lambda: cancelling(Activation("relu")),
        ("*.py", "error = moved + ", "error = "),
    ),
    "an activation's own error": (lambda: sweep("sigmoid", -3, 3), ("*.py", "r = 1.01 * ", "r = 0.0 * ")),
    "an activation's own error at infinity": (
        lambda: act(NUMPY, "selu", [-np.inf]),
        ("looped.py", "abs(float(value)) * row if", "0.0 if"),
    ),
    "the library's own functions": (
        lambda: sweep("exp", 0.1, 3),
        ("rows.py", '"exp": lambda t, k, p: 2 * k["exp"]', '"exp": lambda t, k, p: 1'),
    ),
    "celu's quotient": (
        lambda: sweep(activations.celu(alpha=-1.1), -80, -70),
        ("rows.py", " + 2 * _above(-_above(-t) / p[0])", ""),
    ),
    "gelu's argument": (lambda: sweep("gelu", -12, -11), ("rows.py", " + 2 * _above(-t) ** 2", "")),
    "gelu_tanh's argument": (lambda: sweep("gelu_tanh", -9, -8), ("rows.py", "6 * _above(-1.59", "0 * _above(-1.59")),
    "underflow of activations": (
        lambda: sweep("exp", -103, -100),
        ("rows.py", "    count = 3.0\n", "    return 0.0\n"),
    ),
    "underflow before a product with alpha": (
        lambda: act(FLUSHING, activations.elu(alpha=1e10), [-TINY]),
        ("rows.py", "count = count + 3 *", "count = count + 0 *"),
    ),
    "a flushed slope": (
        lambda: act(FLUSHING, activations.leaky_relu(negative_slope=TINY), [-1e30], [0.0]),
        ("rows.py", "count = count + small * far", "count = count"),
    ),
    "underflow of erfc": (
        lambda: act(FLUSHING, "gelu", np.linspace(-13.1, -12.9, 100)),
        ("rows.py", "count = count + (1 + np.minimum(far, 60.0)) * (wide / arith.quantum)", "count = count"),
    ),
    "flushed, though nothing rounds": (
        lambda: act(FLUSHING, "relu", [TINY]),
        ("rows.py", "return 1.0 if arith.flushes else 0.0", "return 0.0"),
    ),
    "the jump of thresholded_relu": (
        # the sum cancels to a little more than 0, and is computed as a little less than alpha, or the other way round
        lambda: off(0.0095, [-0.5], activations.thresholded_relu(alpha=-0.5), [-0.5]),
        ("*.py", 'name == "thresholded_relu"', 'name == "no such"'),
    ),
    "what is clipped": (
        lambda: sweep("hard_sigmoid", -2.9, -2.8),
        ("*.py", 'if name in ("hard_sigmoid", "hard_silu")', 'if name in ("no such",)'),
    ),
    "the turn at 0": (
        lambda: off(5.5, [-5.0], activations.elu(alpha=-1.0), [0.0]),
        ("*.py", "TURNS.get(name, 0.0)", "TURNS.get(name, math.nan)"),
        ("looped.py", "turns = [0.0, ", "turns = ["),
        ("arrays.py", "for turn in (0.0, rows", "for turn in (math.nan, rows"),
    ),
    "overflow of activations": (
        lambda: off(0.0095, [88.72], "exp", [np.inf]),
        ("looped.py", "if size + error < arith.largest * min(inside, 1.0) else math.inf", ""),
        ("arrays.py", "claimed & (size + error < limit)", "claimed"),
    ),
    "overflow inside celu": (
        lambda: act(NUMPY, activations.celu(alpha=-0.01), [-0.89]),
        ("looped.py", 'if name == "celu" and p[0] < 0', "if False"),
        ("arrays.py", 'if name == "celu":', "if False:"),
    ),
    "celu's alpha not too small": (
        lambda: act(FLUSHING, activations.celu(alpha=TINY), [0.0], [np.nan]),
        ("rows.py", "(abs(p[0]) > least) & ", ""),
    ),
    "celu's alpha not too large": (
        lambda: act(FLUSHING, activations.celu(alpha=2e38), [-1e30], [0.0]),  # its reciprocal is flushed
        ("rows.py", " & (abs(p[0]) < most)", ""),
    ),
    "infinity times a flushed slope": (
        lambda: act(FLUSHING, activations.leaky_relu(negative_slope=TINY), [-np.inf], [np.nan]),
        ("looped.py", "math.inf if vanishing else abs(float", "abs(float"),
    ),
    # softmax and log_softmax
    "softmax's exponentials": (softmax_off, ("*.py", '+ 2 * u * k["exp"]', "")),
    "softmax of what is off": (
        lambda: softmax_apart("softmax"),
        ("*.py", "d + u * (", "u * ("),
    ),
    "softmax's sum of what is off": (
        lambda: softmax_apart("softmax"),
        ("looped.py", "(spread[i] + g + ", "(spread[i] + "),
        ("arrays.py", "(spread + g + ", "(spread + "),
    ),
    "log_softmax's sum of what is off": (
        lambda: softmax_apart("log_softmax"),
        ("looped.py", "bound = spread[i] + g + ", "bound = spread[i] + "),
        ("arrays.py", "bound = spread + g + ", "bound = spread + "),
    ),
    "softmax's shift": (
        lambda: act(NUMPY, "softmax", np.random.default_rng(0).uniform([0, -80], [0.1, -70], (100, 2))),
        ("looped.py", "u * (abs(far) + ", "u * ("),
        ("arrays.py", "u * (abs(distances) + ", "u * ("),
    ),
    "softmax's sum": (lambda: softmax_of_many("softmax"), ("*.py", " + (n + 1) * u)", ")")),
    "log_softmax's sum": (
        lambda: softmax_of_many("log_softmax"),
        ("looped.py", " + (n + 2) * u * max(1.0, size)", ""),
        ("arrays.py", " + (n + 2) * u * np.maximum(1.0, size)", ""),
    ),
    "softmax's underflow": (
        lambda: act(NUMPY, "softmax", [[0.0, t] for t in np.linspace(-103, -100, 50)]),
        ("*.py", "lost = (n + 2) * arith.quantum *", "lost = 0.0 *"),
    ),
    "log_softmax's logarithm": (
        lambda: act(NUMPY, "log_softmax", [0.0, 0.0], [np.log(0.5) + 60 * U] * 2, log=64.0),
        ("*.py", 'bound + u * (2 * k["log"]', 'bound + 0 * (2 * k["log"]'),
        ("*.py", 'bound += u * (2 * k["log"]', 'bound += 0 * (2 * k["log"]'),
    ),
    "overflow of a sum of exponentials": (
        lambda: act(NUMPY, "log_softmax", np.zeros(70_000), dtype="float16"),
        ("looped.py", "if not rows.softmax_fits(widest, n, arith)", "if False"),
        ("arrays.py", "rows.softmax_fits(widest, n, arith)", "np.isfinite(widest)"),
    ),
    # where nothing can round
    "exact: not where the total is too large for the grain": (
        lambda: dense(NUMPY, [[1.0, 2.0**-30]], [1.0, 1.0]),
        ("looped.py", " and total <= grain / arith.u", ""),
        ("arrays.py", "np.maximum(total * arith.u, arith.quantum)", "np.maximum(0 * total, arith.quantum)"),
    ),
    "exact: not where the bias is too fine": (
        lambda: dense(NUMPY, [[1.0]], [1.0], bias=[2.0**-30]),
        ("looped.py", "grains.append(_lowbit(b))", "pass"),
        ("arrays.py", " + fine_b)", ")"),
        ("arrays.py", ".max(axis=-1), fine_b[j])", ".max(axis=-1), 0)"),
    ),
    "exact: not below the smallest number": (
        lambda: dense(NUMPY, [[2.0**-100]], [2.0**-100]),
        ("looped.py", " and grain >= arith.quantum", ""),
        ("arrays.py", "np.maximum(total * arith.u, arith.quantum)", "total * arith.u"),
    ),
    "exact: not beyond the largest number": (
        lambda: dense(NUMPY, [[2.0**127, 2.0**127]], [1.0, 1.0]),
        ("looped.py", " and total < arith.largest", ""),
        ("arrays.py", "kept &= total < arith.largest", "pass"),
    ),
    "exact: not where operands are cut off": (
        lambda: dense(CORES, [[1 + 2.0**-23]], [1.0]),
        ("*.py", " and not arith.u_in", ""),
    ),
    "exact: not from what is off": (
        lambda: then(Dense(np.ones((1, 1), "float32")), y=[0.0]),
        ("looped.py", "if not any(e) and ", "if "),
        ("arrays.py", "~e.any(axis=-1)", "np.ones(len(e), bool)"),
    ),
    "exact: not where a weight is flushed": (
        lambda: dense(FLUSHING, [[2.0**-130]], [2.0**100]),
        ("looped.py", "(*w, *sizes, b)", "(*sizes, b)"),
        ("arrays.py", "~(np.any(tiny_w, axis=-1) | tiny_b)", "~tiny_b"),
    ),
    "exact: not where an input is flushed": (
        lambda: dense(FLUSHING, [[2.0**100]], [2.0**-130]),
        ("looped.py", "(*w, *sizes, b)", "(*w, b)"),
        ("arrays.py", "~np.any(tiny_h, axis=-1)[:, None] & ", ""),
    ),
    "exact: not an activation of what is off": (
        lambda: then(Activation("relu"), y=[0.0]),
        ("looped.py", "if wide == 0 and _keeps", "if _keeps"),
        ("arrays.py", "claimed & (wide == 0) & self", "claimed & self"),
    ),
    "exact: not a flushed argument": (
        lambda: act(FLUSHING, "relu", [TINY]),
        ("looped.py", "return not (arith.flushes and (", "return not (False and ("),
        ("arrays.py", "return ~(tiny[0] | tiny[1]) if arith.flushes else True", "return True"),
    ),
    "exact: not a flushed result": (
        lambda: act(FLUSHING, activations.clip(lower=TINY, upper=1.0), [0.0]),
        ("looped.py", " or 0 < size < arith.smallest_normal", ""),
        ("arrays.py", "~(tiny[0] | tiny[1])", "~tiny[0]"),
    ),
    "exact: not a flushed slope": (
        lambda: act(FLUSHING, activations.leaky_relu(negative_slope=2.0**-130), [-(2.0**100)], [0.0]),
        ("looped.py", "(t, p[0]), arith)", "(t, t), arith)"),
        ("arrays.py", "for a in (t, p[0])", "for a in (t, t)"),
    ),
    "exact: not a slope of a flushed argument": (
        lambda: act(FLUSHING, activations.leaky_relu(negative_slope=2.0**100), [-(2.0**-130)]),
        ("looped.py", "(t, p[0]), arith)", "(p[0], p[0]), arith)"),
        ("arrays.py", "for a in (t, p[0])", "for a in (p[0], p[0])"),
    ),
    "exact: not a rounded product with a slope": (
        lambda: act(NUMPY, activations.leaky_relu(negative_slope=0.3), [-1.7]),
        ("looped.py", " and total <= grain / arith.u", ""),
        ("arrays.py", "np.maximum(size * arith.u, arith.quantum)", "arith.quantum"),
    ),
    "exact: not a product with a slope below the smallest number": (
        lambda: act(NUMPY, activations.leaky_relu(negative_slope=2.0**-100), [-(2.0**-100)]),
        ("looped.py", " and grain >= arith.quantum", ""),
        ("arrays.py", "np.maximum(size * arith.u, arith.quantum)", "size * arith.u"),
    ),
    "exact: not a product with a slope beyond the largest number": (
        lambda: act(NUMPY, activations.leaky_relu(negative_slope=2.0), [-(2.0**127)]),
        ("looped.py", " and total < arith.largest", ""),
        ("arrays.py", "kept & (size < arith.largest)", "kept"),
    ),
}

for _name in activations.names():
    if _name not in ("identity", *ROUNDLESS, "hard_sigmoid", "hard_silu", "softmax", "log_softmax"):
        _f = activations.prelu(negative_slope=0.3) if _name == "prelu" else activations.get(_name)
        _row = f'"{_name}": lambda t, k, p: '
        INGREDIENTS[f"the row of {_name}"] = (
            functools.partial(sweep, _f, -3, 3),
            ("rows.py", _row, f"{_row}0 and "),
        )
for _name, _t in TURNS.items():
    INGREDIENTS[f"the turn of {_name}"] = (
        functools.partial(off, 4.8, [-5.0], _name, [float(activations.get(_name)(np.array([_t]))[0])]),
        ("rows.py", f'"{_name}": -', f'"no {_name}": -'),
    )
for _name, _t in {"silu": -88.5, "mish": -88.5, "gelu_tanh": -10.04}.items():
    INGREDIENTS[f"underflow before {_name}'s product"] = (
        functools.partial(act, FLUSHING, _name, [_t]),
        ("rows.py", "(3 if name", f'(name != "{_name}") * (3 if name'),
    )


@functools.cache
def computed(ingredient):
    """Its witness, with the computed values."""
    found = INGREDIENTS[ingredient][0]()
    if found.y is not None:
        return found
    x = found.place.put(found.x, str(found.x.dtype))
    return found._replace(y=found.place.adapter.to_numpy(found.net(x, precision=precision(found.place))))


def precision(place):
    return "high" if place == CORES else "highest"


def ratios(bounds, ingredient):
    """The largest |error| / bound of the witness by both forms of these bounds."""
    place, net, x, y, ulp = computed(ingredient)
    dtype = str(x.dtype)
    own = arithmetic_of(place.adapter, dtype, precision=precision(place), device=place.device)
    arithmetic = bounds.Arithmetic(dtype, own.u_in, own.u_acc, own.flushes, {**own.ulp, **ulp})
    for form in (bounds.looped_bound, bounds.array_bound):
        yield form.__name__, float(form(x, net, arithmetic=arithmetic).ratio(np.array(y, dtype)).max())


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """Makes a copy of `nnfwd.bounds` with texts replaced, and imports it."""
    above, numbers = tmp_path_factory.mktemp("copies"), itertools.count()

    def make(*replaced):
        name = f"bounds_without_{next(numbers)}"
        folder = above / name
        shutil.copytree(Path(nnfwd.bounds.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
        for pattern, old, new in replaced:
            texts = {path: path.read_text() for path in folder.glob(pattern)}
            assert any(old in text for text in texts.values()), f"{old!r} stands nowhere in {pattern}"
            for path, text in texts.items():
                path.write_text(text.replace(old, new))
        for path in folder.glob("*.py"):
            path.write_text(path.read_text().replace("nnfwd.bounds", name))
        return importlib.import_module(name)

    sys.path.insert(0, str(above))
    yield make
    sys.path.remove(str(above))
    for name in [module for module in sys.modules if module.startswith("bounds_without_")]:
        del sys.modules[name]


def test_with_every_ingredient_all_are_inside(copied):
    for bounds in (nnfwd.bounds, copied()):
        for ingredient in INGREDIENTS:
            for form, ratio in ratios(bounds, ingredient):
                assert ratio <= 1, (form, ingredient)


@pytest.mark.parametrize("ingredient", INGREDIENTS)
def test_without_one_ingredient_something_is_outside(ingredient, copied):
    for form, ratio in ratios(copied(*INGREDIENTS[ingredient][1:]), ingredient):
        assert ratio > 1, f"{form} does not need {ingredient}: {ratio}"
