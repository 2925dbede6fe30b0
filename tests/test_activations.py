"""Every activation at every place: a dense grid inside the bound, limits, NaN, gradients, names and parameters."""

import math
import pickle

import agreement
import numpy as np
import pytest
from places import DTYPES, need, places

import nnfwd
from nnfwd import Activation, Network, activations
from nnfwd.bounds import arithmetic_of, looped_bound
from nnfwd.errors import DtypeError, UnknownNameError
from nnfwd.placement import rounded

REQUIRED = {"prelu": {"negative_slope": 0.3}, "clip": {"lower": -1.5, "upper": 2.5}}
VECTORS = ("softmax", "log_softmax")


def function(name):
    return activations.named(name)(**REQUIRED.get(name, {}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", activations.names())
def test_inside_the_bound_on_a_grid(name, dtype):
    top = 11.0 if dtype == "float16" else 100.0
    grid = np.concatenate([np.linspace(-top, top, 401), np.linspace(-3, 3, 200), [0.0, -0.0, 1e-7, -1e-7]])
    if dtype not in ("float16", "bfloat16"):
        grid = np.concatenate([grid, [1e-30, -1e-30, 1e30, -1e30]])
    width = 5 if name in VECTORS else 1
    x = rounded(grid[: len(grid) // width * width], dtype).reshape(-1, width)
    net = Network([Activation(function(name))])
    for place in (place for place in places() if place.has(dtype)):
        with place.context(dtype):
            y = net(place.put(x, dtype))
            agreement.check(y, place, dtype, looped_bound(x, net, arithmetic=arithmetic_of(place.adapter, dtype)))


LIMITS = {
    "identity": (-math.inf, math.inf),
    "relu": (0, math.inf),
    "relu6": (0, 6),
    "leaky_relu": (-math.inf, math.inf),
    "prelu": (-math.inf, math.inf),
    "thresholded_relu": (0, math.inf),
    "clip": (-1.5, 2.5),
    "hard_tanh": (-1, 1),
    "hard_sigmoid": (0, 1),
    "sigmoid": (0, 1),
    "tanh": (-1, 1),
    "softsign": (-1, 1),
    "softplus": (0, math.inf),
    "log_sigmoid": (-math.inf, 0),
    "elu": (-1, math.inf),
    "selu": (np.float32(-activations.SELU_SCALE * activations.SELU_ALPHA), math.inf),
    "celu": (-1, math.inf),
    "silu": (0, math.inf),
    "hard_silu": (0, math.inf),
    "mish": (0, math.inf),
    "gelu": (0, math.inf),
    "gelu_tanh": (0, math.inf),
    "exp": (0, math.inf),
}


@pytest.mark.parametrize("name", [name for name in activations.names() if name not in VECTORS])
def test_limits_and_nan(name):
    net = Network([Activation(function(name))])
    for place in places():
        y = place.adapter.to_numpy(net(place.put(np.array([-np.inf, np.inf, np.nan]), "float32")))
        assert tuple(y[:2]) == LIMITS[name], place
        assert np.isnan(y[2]), place
        loop = nnfwd.looped_feed_forward([-math.inf, math.inf, math.nan], net)
        assert tuple(np.float32(loop[:2])) == LIMITS[name]
        assert math.isnan(loop[2])


@pytest.mark.parametrize("name", VECTORS)
def test_vector_limits(name):
    net = Network([Activation(name)])
    for place in places():
        x = np.array([[-np.inf, 1, 1], [np.nan, 1, 1], [np.inf, 1, 1]])
        y = place.adapter.to_numpy(net(place.put(x, "float32")))
        assert y[0, 0] == (0 if name == "softmax" else -np.inf)
        assert np.isfinite(y[0, 1:]).all()
        assert np.isnan(y[1:]).all()


# f'(-100), f'(0) from the left and from the right, f'(100)
SLOPES = {
    "identity": (1, 1, 1, 1),
    "relu": (0, 0, 1, 1),
    "relu6": (0, 0, 1, 0),
    "leaky_relu": (0.01, 0.01, 1, 1),
    "prelu": (0.3, 0.3, 1, 1),
    "thresholded_relu": (0, 0, 0, 1),
    "clip": (0, 1, 1, 0),
    "hard_tanh": (0, 1, 1, 0),
    "hard_sigmoid": (0, 1 / 6, 1 / 6, 0),
    "sigmoid": (math.exp(-100), 0.25, 0.25, math.exp(-100)),
    "tanh": (0, 1, 1, 0),
    "softsign": (101**-2, 1, 1, 101**-2),
    "softplus": (math.exp(-100), 0.5, 0.5, 1),
    "log_sigmoid": (1, 0.5, 0.5, math.exp(-100)),
    "elu": (math.exp(-100), 1, 1, 1),
    "selu": (
        activations.SELU_SCALE * activations.SELU_ALPHA * math.exp(-100),
        activations.SELU_SCALE,
        activations.SELU_SCALE * activations.SELU_ALPHA,
        activations.SELU_SCALE,
    ),
    "celu": (math.exp(-100), 1, 1, 1),
    "silu": (-99 * math.exp(-100), 0.5, 0.5, 1),
    "hard_silu": (0, 0.5, 0.5, 1),
    "mish": (-99 * math.exp(-100), 0.6, 0.6, 1),
    "gelu": (0, 0.5, 0.5, 1),
    "gelu_tanh": (0, 0.5, 0.5, 1),
    "exp": (math.exp(-100), 1, 1, math.exp(100)),
}


def by_jax(f):
    jax = need("jax")
    with jax.enable_x64(True):
        return [float(jax.grad(lambda t: f(t[None])[0])(jax.numpy.asarray(t))) for t in (-100.0, 0.0, 100.0)]


def by_torch(f):
    torch = need("torch")
    x = torch.tensor([-100.0, 0.0, 100.0], dtype=torch.float64, requires_grad=True)
    f(x).sum().backward()
    return x.grad.tolist()


@pytest.mark.parametrize("gradient", [by_jax, by_torch])
@pytest.mark.parametrize("name", SLOPES)
def test_gradients_at_zero_and_far_out(name, gradient):
    far_left, left, right, far_right = SLOPES[name]
    low, zero, high = gradient(Network([Activation(function(name))]))

    # Gradients have no derived bound; the right form computed in float64 gives the right number in 24 bits. A slope below
    # float32's smallest normal may vanish (the derivative of expm1 is computed as expm1 + 1).
    def rounded32(value):
        mantissa, exponent = math.frexp(value)
        return 0.0 if abs(value) < 2.0**-126 else math.ldexp(round(mantissa * 2**24), exponent - 24)

    assert rounded32(low) == rounded32(far_left)
    assert rounded32(high) == rounded32(far_right)
    assert rounded32(left) <= rounded32(zero) <= rounded32(right) or rounded32(right) <= rounded32(zero) <= rounded32(
        left
    )


def test_names_and_aliases():
    assert activations.get("logistic") is activations.sigmoid
    assert activations.get("Swish") is activations.silu
    assert activations.get("gelu_new") is activations.gelu_tanh
    assert set(LIMITS) | set(VECTORS) == set(activations.names())
    with pytest.raises(UnknownNameError, match="'sigmoid'"):
        activations.get("sigmod")


def test_calling_computes_or_binds():
    x = np.array([-1.0, 2.0])
    assert np.array_equal(activations.leaky_relu(x), [-0.01, 2.0])
    assert np.array_equal(activations.leaky_relu(x, negative_slope=0.5), [-0.5, 2.0])
    assert np.array_equal(activations.leaky_relu(negative_slope=0.5)(x), [-0.5, 2.0])
    assert np.array_equal(activations.prelu(negative_slope=[0.5, 0.1])(x), [-0.5, 2.0])
    assert repr(activations.leaky_relu(negative_slope=0.5)) == "leaky_relu(negative_slope=0.5)"
    with pytest.raises(DtypeError, match="needs negative_slope"):
        activations.prelu(x)


def test_constants_keep_the_dtype():
    for name in activations.names():
        for dtype in ("float16", "float32", "float64"):
            assert function(name)(np.ones((2, 3), dtype=dtype)).dtype == dtype, name


def test_a_callable_of_ones_own():
    def square(x, /, *, xp):
        return xp.multiply(x, x)

    square.scalar = lambda t: t * t
    net = Network([nnfwd.Dense([[1.0, 2.0]], [0.5], square)])
    assert net(np.array([1.0, 1.0])) == 3.5**2
    assert nnfwd.looped_feed_forward([1, 1], net) == [3.5**2]
    assert "square" in repr(net)


def test_pickling_keeps_parameters():
    f = activations.prelu(negative_slope=np.array([0.5, 0.1]))
    again = pickle.loads(pickle.dumps(f))
    assert again.formula is f.formula
    assert np.array_equal(again.parameters["negative_slope"], [0.5, 0.1])
    assert pickle.loads(pickle.dumps(activations.sigmoid)).formula is activations.sigmoid.formula
