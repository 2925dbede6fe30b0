"""The bound and the comparison are sharp: what is wrong is seen to be wrong."""

import itertools
import math

import agreement
import numpy as np
import pytest
from cases import cases
from hypothesis import given, settings
from networks import inputs, mixed, tutorial
from places import DTYPES, Place, places

import nnfwd
from nnfwd import Activation, Dense, Network, Scale, activations, backend
from nnfwd.bounds import Arithmetic, Bounded, arithmetic_of, array_bound, error_bound, looped_bound
from nnfwd.cases import POOL, REGIMES, SPECIALS, Case
from nnfwd.demo import digits as digits_network
from nnfwd.reference import digits

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
    net = Network([Dense(np.full((1, 2), 1e30, "float32"), [0.0])])
    arithmetic = Arithmetic("float32")
    assert looped_bound(np.array([1e30, 1.0], "float32"), net, arithmetic=arithmetic).unclaimed.all()
    came_in = looped_bound([[math.inf, 1.0], [math.inf, -math.inf]], net, arithmetic=arithmetic)
    assert not came_in.unclaimed.any()
    assert list(came_in.ratio(np.array([[math.inf], [math.nan]])).ravel()) == [0, 0]
    assert np.isinf(came_in.ratio(np.array([[-math.inf], [1.0]]))).all()


@pytest.mark.parametrize("form", [looped_bound, array_bound])
def test_overflow_on_the_way_is_unclaimed(form):
    """Though the result itself would not overflow, or only by the error of the function."""
    plain, narrow = Arithmetic("float32"), Arithmetic("float32", u_in=2.0**-8, u_acc=2.0**-23)
    large = np.array([3.4e38, -3.4e38], "float32")
    for layer, arithmetic in (
        (Scale(0.125, center=np.array([-3e38, 3e38], "float32")), plain),
        (Activation("log_softmax"), plain),
        (Dense(np.full((1, 2), 2.0**-20, "float32")), narrow),
    ):
        assert form(large, [layer], arithmetic=arithmetic).unclaimed.any()
        assert not form(large * np.float32(2.0**-5), [layer], arithmetic=arithmetic).unclaimed.any()


def test_a_clip_at_one_side_has_a_bound():
    net, x = Network([Activation(activations.clip(lower=-math.inf, upper=1.0))]), np.array([-2.0, 3.0], "float32")
    for form in (looped_bound, array_bound):
        bounded = form(x, net, arithmetic=Arithmetic("float32"))
        assert not bounded.error.any()
        assert not bounded.ratio(net(x)).any()


def test_arithmetic_of_every_format():
    for dtype in ("float16", "float32", "float64"):
        info, found = np.finfo(dtype), Arithmetic(dtype)
        assert (2 * found.u, found.smallest_normal, found.smallest, found.largest) == (
            float(info.eps), float(info.tiny), float(info.smallest_subnormal), float(info.max),
        )  # fmt: skip


HOW = [
    pytest.param(dtype, changes, id=f"{dtype}-{name}")
    for dtype in DTYPES
    for name, changes in {
        "ieee": {},
        "flushing": {"flushes": True},
        "wide sums": {"u_acc": 2.0**-24, "flushes": True}
        if dtype.endswith("16")
        else {"u_in": 2.0**-10, "u_acc": 2.0**-23},
    }.items()
    if dtype != "float64" or name != "wide sums"
]


@pytest.mark.parametrize(("dtype", "changes"), HOW)
def test_the_bound_in_arrays_is_that_of_the_loops(dtype, changes, note):
    """Never below, at most 1.01 of it, and the exact value inside; but for a few of the smallest float64 numbers."""
    arithmetic = Arithmetic(dtype, **changes)
    largest = []

    @settings(max_examples=settings.default.max_examples // 3)
    @given(case=cases(dtype))
    def every_network(case):
        looped = looped_bound(case.x, case.network, arithmetic=arithmetic)
        arrays = array_bound(case.x, case.network, arithmetic=arithmetic)
        assert (looped.unclaimed == arrays.unclaimed).all()
        claimed = ~looped.unclaimed
        below, above = looped.error[claimed], arrays.error[claimed]
        few = 4 * Arithmetic("float64").smallest
        assert (above + few >= below).all()
        assert (above <= 1.01 * below + few).all()
        normal = below > Arithmetic("float64").smallest_normal
        largest.append((above[normal] / below[normal]).max(initial=1))
        for wide, exact, room in zip(arrays.exact[claimed], looped.exact[claimed], above - below, strict=True):
            if np.isfinite(wide):
                assert abs(number(wide) - exact) <= room + few

    every_network()
    note(f"bound in arrays / by loops, {dtype} {', '.join(changes) or 'ieee'}: at most {max(largest):.6f}")


def number(wide):
    """A wide float as a number of the loops'."""
    return digits().number(float(wide)) + digits().number(float(wide - float(wide)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_little_is_left_unclaimed(dtype, note):
    """Nothing is claimed about at most 3 in 100 outputs, where numbers are not huge on purpose."""
    usual = [regime for regime in REGIMES if regime != "huge"]
    unclaimed = []
    for seed in range(600):
        case = Case(POOL[seed % len(POOL)], dtype, usual[seed % 4], SPECIALS[seed // 4 % 5], seed)
        bounded = array_bound(case.x, case.network, arithmetic=Arithmetic(dtype, flushes=True))
        unclaimed += bounded.unclaimed.ravel().tolist()
    note(f"unclaimed, {dtype}: {np.mean(unclaimed):.2%} of {len(unclaimed)} outputs")
    assert np.mean(unclaimed) <= 0.03


def test_ten_thousand_rows():
    net, images, _ = digits_network()
    net, x = net.to("numpy", dtype="float32"), np.tile(images, (23, 1))[:10_000].astype("float32")
    bounded = error_bound(net, x)
    assert bounded.exact.shape == bounded.error.shape == (10_000, 10)
    assert not bounded.unclaimed.any()
    assert 0 < bounded.ratio(net(x)).max() < 1


def test_error_bound_follows_dtype_backend_and_precision():
    net, x = tutorial()
    plain = error_bound(net, x)
    assert 0 < plain.error[0] < 1e-15
    assert abs(float(plain.exact[0]) - 0.83545566) < 1e-8  # published
    half = error_bound(net, x, dtype="float16")
    assert half.error[0] > 1e12 * plain.error[0]
    assert half.ratio(net(x, dtype="float16")).max() <= 1
    single, coarse = (
        error_bound(net, x, backend="emulated", dtype="float32", precision=p) for p in ("highest", "high")
    )
    assert coarse.error[0] > 100 * single.error[0]
    y = net(x, backend="emulated", dtype="float32", precision="high")
    assert coarse.ratio(y).max() <= 1 < single.ratio(y).max()
    with pytest.raises(nnfwd.errors.UnknownNameError, match="unknown precision"):
        error_bound(net, x, precision="best")
    with pytest.raises(nnfwd.errors.DtypeError, match="numpy has no bfloat16"):
        error_bound(net, x, dtype="bfloat16")


@pytest.mark.parametrize("place", places(), ids=str)
def test_error_bound_takes_the_arrays_of_any_library(place):
    net, x = mixed(), inputs(5, 4)
    bounded = error_bound(net, place.put(x, "float32"))
    agreement.check(net(place.put(x, "float32")), place, "float32", bounded)


def test_a_float64_without_wider_floats_goes_by_the_loops(monkeypatch):
    net, x = mixed("float64"), inputs(3, 4, dtype="float64")
    wide = error_bound(net, x)
    monkeypatch.setattr("nnfwd.bounds.arrays._WIDE", False)
    looped = error_bound(net, x)
    assert looped.exact.dtype == object
    assert (looped.error <= wide.error).all()


def test_numbers_that_are_not_of_the_dtype_are_refused():
    for form in (looped_bound, array_bound):
        with pytest.raises(nnfwd.errors.DtypeError, match="x holds numbers that float32 does not"):
            form([0.1], [Dense([[1.0]])], arithmetic=Arithmetic("float32"))
        with pytest.raises(nnfwd.errors.DtypeError, match="layer 1 holds numbers that bfloat16 does not"):
            form([1.0], [Dense([[1.0]]), Dense([[1.01]])], arithmetic=Arithmetic("bfloat16"))


def test_a_callable_of_ones_own_is_refused():
    def double(x, /, *, xp):
        return 2 * x

    for form in (looped_bound, array_bound):
        with pytest.raises(nnfwd.errors.ArrayError, match="the rounding of the activation double is unknown"):
            form([1.0], [Dense([[1.0]], None, double)], arithmetic=Arithmetic("float32"))


def test_shapes():
    net = mixed()
    assert isinstance(looped_bound(inputs(2, 3, 4), net, arithmetic=Arithmetic("float32")), Bounded)
    assert looped_bound(inputs(0, 4), net, arithmetic=Arithmetic("float32")).exact.shape == (0, 2)
    with pytest.raises(nnfwd.errors.ArrayError, match="cannot be compared"):
        looped_bound(inputs(4), net, arithmetic=Arithmetic("float32")).ratio(np.zeros(3))
