"""The bound and the comparison are sharp: what is wrong is seen to be wrong."""

import dataclasses
import itertools
import math

import agreement
import numpy as np
import pytest
from networks import inputs, mixed, tutorial
from places import Place, places

import nnfwd
from nnfwd import Dense, Network, backend
from nnfwd.bounds import Arithmetic, Bounded, arithmetic_of, looped_bound

NUMPY = Place("numpy", "cpu")


@pytest.fixture
def case():
    net, x = mixed(), inputs(5, 4)
    bounded = looped_bound(x, net, arithmetic=arithmetic_of(backend.load("numpy"), "float32"))
    return net, x, bounded


def test_the_right_result_is_inside(case):
    net, x, bounded = case
    assert not bounded.unclaimed.any()
    agreement.check(net(x), NUMPY, "float32", bounded)


@pytest.mark.parametrize("element", range(10))
def test_an_output_moved_by_one_bound_is_outside(case, element):
    net, x, bounded = case
    y = net(x).astype("float64")
    i = np.unravel_index(element, y.shape)
    assert y[i] != bounded.exact[i]
    y[i] += math.copysign(bounded.error[i], y[i] - bounded.exact[i])
    with pytest.raises(AssertionError, match="bounds away"):
        agreement.check(y, NUMPY, "float64", bounded)


def test_a_wrong_dtype_place_or_shape_is_seen(case):
    net, x, bounded = case
    y = net(x)
    with pytest.raises(AssertionError):
        agreement.check(y.astype("float64"), NUMPY, "float32", bounded)
    with pytest.raises(AssertionError):
        agreement.check(y[:, :1], NUMPY, "float32", bounded)
    for place in places():
        if place != NUMPY and place.name in ("array_api_strict", "jax", "torch"):
            with pytest.raises(AssertionError, match="not at"):
                agreement.check(y, place, "float32", bounded)
    strict = [place for place in places() if place.name == "array_api_strict"]
    for here, there in itertools.pairwise(strict):
        with pytest.raises(AssertionError, match="not at"):
            agreement.check(here.put(y, "float32"), there, "float32", bounded)


def test_gross_faults_are_outside(case):
    net, x, bounded = case
    weight, bias = net[1].weight, net[1].bias
    faults = {
        "a dropped bias": [net[0], Dense(weight, None, net[1].activation), *net[2:]],
        "two swapped columns": [net[0], Dense(weight[:, [1, 0, 2, 3]], bias, net[1].activation), *net[2:]],
        "one weight off by 1e-3": [
            net[0],
            Dense(weight + 1e-3 * (weight == weight.max()), bias, net[1].activation),
            *net[2:],
        ],
        "another slope": [net[0], Dense(weight, bias, "relu"), *net[2:]],
        "tanh-gelu for gelu": [*net[:2], Dense(net[2].weight, None, "gelu_tanh"), net[3]],
    }
    for fault, layers in faults.items():
        with pytest.raises(AssertionError, match="bounds away"):
            agreement.check(Network(layers)(x), NUMPY, "float32", bounded)
            pytest.fail(f"not seen: {fault}")


def test_a_transposed_weight_is_outside():
    net, x = tutorial()
    turned = Network.from_arrays([net[0].weight.T, net[1].weight], [net[0].bias, net[1].bias], "sigmoid")
    bounded = looped_bound(x, net, arithmetic=arithmetic_of(backend.load("numpy"), "float64"))
    with pytest.raises(AssertionError, match="bounds away"):
        agreement.check(turned(np.array(x)), NUMPY, "float64", bounded)


def test_small_integers_are_exact_at_any_width():
    rng = np.random.default_rng(0)
    net = Network(
        [
            Dense(rng.integers(-3, 4, (300, 1000)), rng.integers(-3, 4, 300), "relu"),
            Dense(rng.integers(-3, 4, (2, 300))),
        ]
    )
    x = rng.integers(-3, 4, (1, 1000)).astype("float32")
    bounded = looped_bound(x, net, arithmetic=Arithmetic("float32"))
    assert not bounded.error.any()
    y = net(x)
    assert not bounded.ratio(y).any()
    assert np.isinf(bounded.ratio(np.nextafter(y, np.float32(np.inf)))).all()


def test_float64_is_judged_with_more_than_float64():
    net, x = tutorial()
    bounded = looped_bound(x, net, arithmetic=arithmetic_of(backend.load("numpy"), "float64"))
    assert 0 < bounded.ratio(net(np.array(x))).max() < 1


def test_overflow_is_unclaimed_and_nan_keeps_its_class():
    net = Network([Dense([[1e30, 1e30]], [0.0])])
    arithmetic = Arithmetic("float32")
    assert looped_bound([1e30, 1.0], net, arithmetic=arithmetic).unclaimed.all()
    came_in = looped_bound([[math.inf, 1.0], [math.inf, -math.inf]], net, arithmetic=arithmetic)
    assert not came_in.unclaimed.any()
    assert list(came_in.ratio(np.array([[math.inf], [math.nan]])).ravel()) == [0, 0]
    assert np.isinf(came_in.ratio(np.array([[-math.inf], [1.0]]))).all()


def test_arithmetic_of_every_format():
    for dtype in ("float16", "float32", "float64"):
        info, found = np.finfo(dtype), Arithmetic(dtype)
        assert (2 * found.u, found.smallest_normal, found.smallest, found.largest) == (
            float(info.eps), float(info.tiny), float(info.smallest_subnormal), float(info.max),
        )  # fmt: skip


@pytest.mark.parametrize("ingredient", [{"u_acc": 0.0}, {"ulp": dict.fromkeys(Arithmetic("float32").ulp, 0.0)}])
def test_an_ingredient_left_out_makes_the_bound_smaller(case, ingredient):
    net, x, bounded = case
    full = arithmetic_of(backend.load("numpy"), "float32")
    less = looped_bound(x, net, arithmetic=dataclasses.replace(full, **ingredient))
    assert (less.error < bounded.error).all()


def test_shapes():
    net = mixed()
    assert isinstance(looped_bound(inputs(2, 3, 4), net, arithmetic=Arithmetic("float32")), Bounded)
    assert looped_bound(inputs(0, 4), net, arithmetic=Arithmetic("float32")).exact.shape == (0, 2)
    with pytest.raises(nnfwd.errors.ArrayError, match="cannot be compared"):
        looped_bound(inputs(4), net, arithmetic=Arithmetic("float32")).ratio(np.zeros(3))
