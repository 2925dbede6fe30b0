"""What holds bit for bit at every place, and what differs by rounding and stays inside the sum of two bounds."""

import numpy as np
import pytest
from networks import ensemble, inputs, mixed
from places import DTYPES, need, places

from nnfwd import Activation, Dense, Network, activations
from nnfwd.bounds import arithmetic_of, array_bound
from nnfwd.cases import rounded_network
from nnfwd.placement import dtype_name, rounded

EVERYWHERE = [(place, dtype) for place in places() for dtype in DTYPES if place.has(dtype)]
everywhere = pytest.mark.parametrize(("place", "dtype"), EVERYWHERE, ids=lambda value: str(value))


def draw(dtype, *shape, seed=0):
    return rounded(np.random.default_rng(seed).standard_normal(shape), dtype)


def relu_network(dtype, names=("relu", "leaky_relu", "identity")):
    leaky = activations.leaky_relu(negative_slope=0.25)
    return Network(
        [
            Dense(draw(dtype, 9, 5, seed=1), draw(dtype, 9, seed=2), names[0]),
            Dense(draw(dtype, 7, 9, seed=3), draw(dtype, 7, seed=4), leaky if names[1] == "leaky_relu" else names[1]),
            Dense(draw(dtype, 3, 7, seed=5), draw(dtype, 3, seed=6), names[2]),
        ]
    )


def smooth_network(dtype):
    return relu_network(dtype, ("gelu", "tanh", "softmax"))


def run(place, dtype, net, x):
    """The output at a place, at home."""
    with place.context(dtype):
        return place.adapter.to_numpy(net(place.put(x, dtype)))


def bounded(place, dtype, net, x):
    return array_bound(x, net, arithmetic=arithmetic_of(place.adapter, dtype, device=place.device))


def assert_near(place, dtype, net, x, y, other):
    """Two results for one x are both inside the bound, so they differ by at most twice the bound."""
    bound = bounded(place, dtype, net, x)
    assert not bound.unclaimed.any()
    assert (abs(y.astype("float64") - other.astype("float64")) <= 2 * bound.error).all()


@everywhere
def test_scaling_by_a_power_of_two(place, dtype):
    net, x, factor = relu_network(dtype), draw(dtype, 6, 5, seed=7), 8.0
    scaled = Network(
        Dense(layer.weight, layer.bias * np.asarray(factor, layer.bias.dtype), layer.activation) for layer in net
    )
    np.testing.assert_array_equal(
        run(place, dtype, scaled, x * np.asarray(factor, x.dtype)).astype("float64"),
        run(place, dtype, net, x).astype("float64") * factor,
    )


@everywhere
@pytest.mark.parametrize("name", ["relu", "sigmoid", "gelu", "softmax", "softplus"])
def test_zero_weights_give_the_activation_of_the_bias(place, dtype, name):
    bias = draw(dtype, 7, seed=8)
    net = Network([Dense(np.zeros((7, 5), bias.dtype), bias, name)])
    of_bias = Network([Activation(name)])
    np.testing.assert_array_equal(
        run(place, dtype, net, draw(dtype, 6, 5)), run(place, dtype, of_bias, np.tile(bias, (6, 1)))
    )


@everywhere
def test_an_identity_layer_gives_x(place, dtype):
    x = draw(dtype, 6, 5)
    np.testing.assert_array_equal(run(place, dtype, Network([Dense(np.eye(5, dtype=x.dtype))]), x), x)


@everywhere
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_of_nan_or_infinity_leaves_the_others_as_they_are(place, dtype, value):
    net, x = smooth_network(dtype), draw(dtype, 6, 5)
    spoilt = x.copy()
    spoilt[2] = value
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(run(place, dtype, net, spoilt)[others], run(place, dtype, net, x)[others])


@everywhere
def test_a_row_does_not_depend_on_what_the_other_rows_hold(place, dtype):
    net, x, y = smooth_network(dtype), draw(dtype, 6, 5), draw(dtype, 6, 5, seed=9)
    y[4] = x[4]
    np.testing.assert_array_equal(run(place, dtype, net, x)[4], run(place, dtype, net, y)[4])


@everywhere
def test_x_and_the_weights_are_not_changed_and_dtype_and_device_are_kept(place, dtype):
    net, x = smooth_network(dtype), draw(dtype, 6, 5)
    with place.context(dtype):
        given = place.put(x, dtype)
        placed = net if place.name == "dask" else net.to(place.name, device=place.device, dtype=dtype)
        before = [place.adapter.to_numpy(given).copy(), *(np.array(layer.weight) for layer in net)]
        y = placed(given)
        assert place.holds(y)
        assert dtype_name(y.dtype) == dtype
        after = [place.adapter.to_numpy(given), *(np.array(layer.weight) for layer in net)]
        assert place.name == "dask" or placed == net.to(place.name, device=place.device, dtype=dtype)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


@everywhere
def test_a_row_alone_is_near_itself_in_a_batch(place, dtype):
    net, x = smooth_network(dtype), draw(dtype, 40, 5)
    alone = np.stack([run(place, dtype, net, row) for row in x[:5]])
    assert_near(place, dtype, net, x[:5], run(place, dtype, net, x)[:5], alone)


@everywhere
def test_permuted_rows_are_near(place, dtype):
    net, x = smooth_network(dtype), draw(dtype, 40, 5)
    order = np.random.default_rng(1).permutation(40)
    assert_near(place, dtype, net, x[order], run(place, dtype, net, x)[order], run(place, dtype, net, x[order]))


@everywhere
def test_permuted_hidden_units_are_near(place, dtype):
    net, x = smooth_network(dtype), draw(dtype, 6, 5)
    order = np.random.default_rng(1).permutation(9)
    first, second, last = net
    other = Network(
        [
            Dense(first.weight[order], first.bias[order], first.activation),
            Dense(second.weight[:, order], second.bias, second.activation),
            last,
        ]
    )
    assert_near(place, dtype, net, x, run(place, dtype, net, x), run(place, dtype, other, x))


@everywhere
@pytest.mark.parametrize("make", [mixed, ensemble])
def test_a_compiled_network_is_near(place, dtype, make):
    made = make("float32" if dtype == "bfloat16" else dtype)
    net = rounded_network(made, dtype)
    x = rounded(inputs(6, 4), dtype)
    with place.context(dtype):
        compiled = net.compile(backend=place.name, device=place.device, dtype=dtype)
        y = place.adapter.to_numpy(compiled(place.put(x, dtype)))
    assert_near(place, dtype, net, x, run(place, dtype, net, x), y)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [1, 7, (3, 30, 7)])
def test_any_chunks_of_dask_are_near(dtype, rows):
    need("dask")
    place = next(place for place in places() if place.name == "dask")
    net, x = smooth_network(dtype), draw(dtype, 40, 5)
    y = np.asarray(net(place.put(x, dtype).rechunk({0: rows, 1: -1})))
    assert_near(place, dtype, net, x, run(place, dtype, net, x), y)
