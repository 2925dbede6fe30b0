"""Every ingredient of the bound is needed: without it, a computation that is right would be called wrong.

Each ingredient is taken out of a copy of `nnfwd.bounds`, text and all, and both forms of the bound are asked about
computations in which that ingredient is nearly all there is.
"""

import importlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from places import Place

import nnfwd
from nnfwd import Activation, Dense, Network, Scale, activations
from nnfwd.bounds import arithmetic_of

# ingredient: file, what it says there, and what is left without it
INGREDIENTS = {
    "products": ("arithmetic.py", "k = (n + 1) * (", "k = n * ("),
    "accumulation": ("arithmetic.py", "k = (n + 1) * (", "k = 2 * ("),
    "conversion of operands": ("arithmetic.py", "2 * math.log1p(self.u_in) + ", ""),
    "conversion of sums": ("arithmetic.py", " + 2 * math.log1p(self.u_out)", ""),
    "gradual underflow of products": ("*.py", "lost = n * arith.smallest", "lost = 0.0"),
    "flushed products": ("*.py", "2 * (n + 1)", "0"),
    "underflow of activations": ("rows.py", "    count = 3.0\n", "    return 0.0\n"),
    "propagation through weights": ("*.py", "(carried + ", "("),
    "propagation through activations": ("*.py", "error = moved + ", "error = "),
    "propagation through scales": ("*.py", "error = abs(s) * e + ", "error = "),
    "an activation's own error": ("*.py", "r = 1.01 * ", "r = 0.0 * "),
    "the library's own functions": ("rows.py", '"exp": lambda t, k, p: 2 * k["exp"]', '"exp": lambda t, k, p: 1'),
    "the jump of thresholded_relu": ("*.py", 'name == "thresholded_relu"', 'name == "no such"'),
    "what is clipped": ("*.py", 'if name in ("hard_sigmoid", "hard_silu")', 'if name in ("no such",)'),
    "the roundings of a scale": ("arithmetic.py", "math.expm1(3 * math.log1p(self.u))", "0.0"),
    "softmax's exponentials": ("*.py", '+ 2 * u * k["exp"]', ""),
    "overflow": ("*.py", "(1 + c) * total + lost < arith.largest", "True"),
}


def dense(weight, x, bias=None, activation="identity", dtype="float32"):
    weight, x = np.asarray(weight, dtype), np.asarray(x, dtype)
    return Network([Dense(weight, None if bias is None else np.asarray(bias, dtype), activation)]), x


def first(seeds, draw):
    """The first computation, of many drawn at random, that comes near its bound."""
    best = max((draw(np.random.default_rng(seed)) for seed in range(seeds)), key=lambda found: found[0])
    return best[1:]


def rounds_twice(rng):
    """A product and a sum whose roundings add up."""
    w, x = rng.uniform(1, 2, 2).astype("float32")
    b = np.float32(rng.uniform(0, 2**-20))
    y = w * x + b
    return (abs(float(y) - (float(w) * float(x) + float(b))) / (float(w) * float(x)), *dense([[w]], [x], [b]), y)


def witnesses():
    """A place, a network, its input, what was computed (None: by that place), and errors of functions other than its."""
    numpy, cores, flushing = Place("numpy", "cpu"), Place("emulated", "tensor_cores"), Place("emulated", "flushing")
    rng = np.random.default_rng(0)
    net, x, y = first(2000, rounds_twice)
    yield numpy, net, x, [y]
    # 1 + 3/4 u, a thousand times: each is lost
    net, x = dense([[1.0, *[0.75 * 2.0**-24] * 1000]], [1.0] * 1001)
    total = np.float32(0)
    for term in net[0].weight[0]:
        total = total + term
    yield numpy, net, x, [total]
    yield cores, *dense([[1 + 2.0**-10 - 2.0**-23]], [1.0]), None  # cut off to 1
    yield numpy, *dense([[1.0, 2.0**-11 + 2.0**-20]], [1.0, 1.0], dtype="float16"), None
    yield numpy, *dense([[1.5 * 2.0**-75]], [2.0**-75]), None
    yield flushing, *dense([[1.5 * 2.0**-64]], [2.0**-64]), None
    yield numpy, Network([Activation("exp")]), np.linspace(-103, -100, 50).astype("float32"), None
    # large terms cancel, and their rounding is all that the second layer sees
    big = rng.uniform(1, 2, (1, 8)).astype("float32") * 1e3
    cancelling = Dense(np.concatenate([big, -big], axis=1))
    x = np.concatenate(
        [np.float32(1 + 2.0**-12) * np.ones(8, "float32"), np.ones(8, "float32") * np.float32(1 + 2.0**-12)]
    )
    x = (x + rng.uniform(0, 1e-4, 16)).astype("float32")
    for after in (Dense(np.array([[1.0]], "float32")), Activation("relu"), Scale(1.0, shift=0.0)):
        yield numpy, Network([cancelling, after]), x, None
    yield numpy, Network([Activation("exp")]), np.linspace(0.1, 3, 2000).astype("float32"), None
    yield numpy, Network([Activation("sigmoid")]), np.linspace(-3, 3, 2000).astype("float32"), None
    # the sum cancels to a little more than 0, and is computed as a little less than alpha, or the other way round
    jumping = activations.thresholded_relu(alpha=-0.5)
    net, x = dense([[20000.1, -20000.1, -0.5]], [1.0, 1.0, 1.0], activation=jumping)
    yield numpy, net, x, [-0.5]
    yield numpy, Network([Activation("hard_sigmoid")]), np.linspace(-2.9, -2.8, 500).astype("float32"), None
    scaled = np.linspace(1, 2, 500).astype("float32")
    yield numpy, Network([Scale(1.1, center=0.3, shift=0.7)]), scaled, None
    # an exponential that is 7 units off, as some libraries' are
    x = np.array([0.0, -0.7], "float32")
    e = np.exp(x)
    e[1] = np.float32(e[1] + 7 * 2.0**-24)
    yield numpy, Network([Activation("softmax")]), x, e / e.sum(), {"exp": 8.0}
    yield numpy, *dense([[3e38, 3e38]], [1.0, 1.0]), None


def ratios(bounds):
    """The largest |error| / bound of each witness by both forms of these bounds."""
    for place, net, x, y, *ulp in witnesses():
        precision = "high" if place.device == "tensor_cores" else "highest"
        dtype = str(x.dtype)
        own = arithmetic_of(place.adapter, dtype, precision=precision, device=place.device)
        arithmetic = bounds.Arithmetic(dtype, own.u_in, own.u_acc, own.flushes, {**own.ulp, **(ulp[0] if ulp else {})})
        if y is None:
            y = place.adapter.to_numpy(net(place.put(x, dtype), precision=precision))
        for form in (bounds.looped_bound, bounds.array_bound):
            yield form.__name__, float(form(x, net, arithmetic=arithmetic).ratio(np.array(y, dtype)).max())


@pytest.fixture
def copied(tmp_path):
    """Makes a copy of `nnfwd.bounds` with one text replaced, and imports it."""
    made = []

    def make(pattern, old, new):
        name = f"bounds_without_{len(made)}"
        folder = tmp_path / name
        shutil.copytree(Path(nnfwd.bounds.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
        found = 0
        for path in folder.glob("*.py"):
            text = path.read_text()
            if path.match(pattern):
                found += text.count(old)
                text = text.replace(old, new)
            path.write_text(text.replace("nnfwd.bounds", name))
        assert found, f"{old!r} stands nowhere in {pattern}"
        made.append(name)
        return importlib.import_module(name)

    sys.path.insert(0, str(tmp_path))
    yield make
    sys.path.remove(str(tmp_path))
    for name in [module for module in sys.modules if module.startswith("bounds_without_")]:
        del sys.modules[name]


def test_with_every_ingredient_all_are_inside(copied):
    for bounds in (nnfwd.bounds, copied("rows.py", '"""How', '"""How')):
        for form, ratio in ratios(bounds):
            assert ratio <= 1, form


@pytest.mark.parametrize("ingredient", INGREDIENTS)
def test_without_one_ingredient_something_is_outside(ingredient, copied):
    found = list(ratios(copied(*INGREDIENTS[ingredient])))
    for form in ("looped_bound", "array_bound"):
        assert max(ratio for name, ratio in found if name == form) > 1, f"{form} does not need {ingredient}"
