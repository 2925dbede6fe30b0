"""The oracle is strong: faults put into a copy of the pass are seen, and another order of summation is not taken for one.

In small-integer mode, where no operation can round, every fault that changes a result is caught. In general mode a
fault may be smaller than what rounding is allowed; of the gross ones, at least 95 in 100 are caught.
"""

import collections

import emulated
import numpy as np
import pytest
from places import Place

from nnfwd import Activation, Dense, Network
from nnfwd.bounds import arithmetic_of, array_bound
from nnfwd.cases import INTEGER_SAFE, Case, Signature

BROKEN, NETWORKS = Place("emulated", "broken"), 300
WEIGHTS = ("one weight off by 1e-6", "a dropped bias", "swapped columns", "a dropped input")
SMOOTH = (
    "identity",
    "tanh",
    "sigmoid",
    "softplus",
    "elu",
    "silu",
    "gelu",
    "gelu_tanh",
    "softsign",
    "leaky_relu",
    "mish",
)


def with_fault(net, fault, rng):
    """The network with a fault in one of its layers."""
    layers = list(net)
    i = int(rng.integers(len(layers)))
    weight, bias, activation = layers[i].weight.copy(), layers[i].bias.copy(), layers[i].activation
    if fault == "one weight off by 1e-6":
        where = tuple(rng.integers(weight.shape))
        weight = weight.astype("float64")
        weight[where] = weight[where] * (1 + 1e-6) if weight[where] else 1e-6
        weight = weight.astype(net.dtype)
    elif fault == "a dropped bias":
        bias[...] = 0
    elif fault == "swapped columns":
        j, k = rng.choice(weight.shape[1], 2, replace=False)
        weight[:, [j, k]] = weight[:, [k, j]]
    else:
        weight[:, -1] = 0
    layers[i] = Dense(weight, bias, activation)
    return Network(layers)


def drawn(seed, dtype, regime, names):
    """A network of one to three Dense layers with biases, and eight rows."""
    rng = np.random.default_rng([seed, len(names)])
    layers = [
        ("dense", int(rng.integers(2, 9)), str(rng.choice(names)), True, False) for _ in range(rng.integers(1, 4))
    ]
    return Case(Signature(int(rng.integers(2, 9)), (8,), tuple(layers), 0), dtype, regime, "none", seed), rng


def outcome(net, faulty, x, *, fault="", claimed=None):
    """Whether a fault changed the outputs that are claimed, and whether one of them is outside the bound."""
    dtype = str(x.dtype)
    bounded = array_bound(x, net, arithmetic=arithmetic_of(BROKEN.adapter, dtype, device="broken"))
    with emulated.set_to(emulated.fault, "none"):
        right = BROKEN.adapter.to_numpy(net(BROKEN.put(x, dtype)))
    with emulated.set_to(emulated.fault, fault or "none"):
        wrong = BROKEN.adapter.to_numpy(faulty(BROKEN.put(x, dtype)))
    assert bounded.ratio(right).max() <= 1, "a false alarm"
    about = ~bounded.unclaimed if claimed is None else claimed(bounded)
    return bool((right != wrong)[about].any()), bool(bounded.ratio(wrong).max() > 1)


def caught(outcomes):
    changed = [seen for differs, seen in outcomes if differs]
    assert len(changed) >= 30, "the fault hardly ever shows: draw other networks"
    return sum(changed) / len(changed), len(changed)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("fault", WEIGHTS)
def test_small_integers_show_every_fault(fault, dtype, note):
    found = []
    for seed in range(NETWORKS):
        case, rng = drawn(seed, dtype, "small-integer", INTEGER_SAFE)
        found.append(
            outcome(case.network, with_fault(case.network, fault, rng), case.x, claimed=lambda b: b.error == 0)
        )
    share, n = caught(found)
    note(f"small integers, {dtype}, {fault}: {share:.1%} of {n} caught")
    assert share == 1


@pytest.mark.parametrize("fault", ["tf32", "bfloat16"])
def test_integers_of_more_bits_than_the_operands_show(fault, note):
    found = []
    for seed in range(NETWORKS):
        rng = np.random.default_rng(seed)
        net = Network([Dense(rng.integers(-3, 4, (4, 6)).astype("float32"), None, "relu")])
        x = rng.integers(-(2**18), 2**18, (8, 6)).astype("float32")
        found.append(outcome(net, net, x, fault=fault, claimed=lambda b: b.error == 0))
    share, n = caught(found)
    note(f"large integers, {fault} operands: {share:.1%} of {n} caught")
    assert share == 1


@pytest.mark.parametrize("fault", WEIGHTS[1:])
def test_general_networks_show_gross_faults_of_weights(fault, note):
    found = []
    for seed in range(NETWORKS):
        case, rng = drawn(seed, "float32", "ordinary", SMOOTH)
        found.append(outcome(case.network, with_fault(case.network, fault, rng), case.x))
    share, n = caught(found)
    note(f"general networks, {fault}: {share:.1%} of {n} caught")
    assert share >= 0.95


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [("tf32", "float32"), ("bfloat16", "float32"), ("float32", "float64"), ("transposed", "float32"), ("narrowed", "float32"),
     ("naive softplus", "float32"), ("tanh-gelu", "float32")],
)  # fmt: skip
def test_general_networks_show_gross_faults_of_the_arithmetic(fault, dtype, note):
    found = []
    for seed in range(NETWORKS):
        case, rng = drawn(seed, dtype, "ordinary", SMOOTH)
        net, faulty, x = case.network, None, case.x
        if fault == "transposed":
            weight = rng.standard_normal((4, 4)).astype(dtype)
            net, x = Network([Dense(weight, None, "tanh"), Dense(weight[:2])]), x[:, [0, 1, 0, 1]]
        if fault == "naive softplus":  # an output, as of a rate or a variance: small, and to be right relatively
            width = case.network.out_features
            net = Network([*net, Dense(np.eye(width, dtype=dtype) * 2, np.full(width, -9, dtype), "softplus")])
        if fault == "tanh-gelu":
            net, faulty = Network([Activation("gelu"), *net]), Network([Activation("gelu_tanh"), *net])
        found.append(outcome(net, faulty or net, x, fault=fault))
    share, n = caught(found)
    note(f"general networks, {fault}: {share:.1%} of {n} caught")
    assert share >= 0.95


WIDE = Signature(40, (8,), (("dense", 30, "tanh", True, False), ("dense", 4, "identity", True, False)), 0)


@pytest.mark.parametrize("device", ["reversed", "blocked"])
def test_another_order_of_summation_is_no_fault(device):
    place, differ = Place("emulated", device), collections.Counter()
    for seed in range(NETWORKS):
        case = Case(WIDE, "float32", "ordinary", "none", seed)
        bounded = array_bound(case.x, case.network, arithmetic=arithmetic_of(place.adapter, "float32", device=device))
        y = place.adapter.to_numpy(case.network(place.put(case.x, "float32")))
        assert bounded.ratio(y).max() <= 1
        differ[bool((y != case.network(case.x)).any())] += 1
    assert differ[True] > NETWORKS / 2, "the order hardly made a difference"
