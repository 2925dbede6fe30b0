"""Arrays by name: their order by number or as asked for, activations and epsilon asked for, the rest refused by name."""

import itertools

import numpy as np
import pytest
from networks import tutorial
from places import need

import nnfwd
from nnfwd import Activation, Dense, Network, Scale, activations, from_state_dict
from nnfwd.errors import ModelFileError, ShapeError, UnknownNameError

RNG = np.random.default_rng(0)


def array(*shape):
    return RNG.standard_normal(shape).astype("float32")


def numbered(widths, name="{}"):
    """A state dict of linear layers with activations between them, its names sorted as text: 10 before 2."""
    found = {}
    for i, (taken, given) in enumerate(itertools.pairwise(widths)):
        found[name.format(2 * i) + ".weight"] = array(given, taken)
        found[name.format(2 * i) + ".bias"] = array(given)
    return dict(sorted(found.items()))


def squares(*names):
    return {f"{name}.weight": array(4, 4) for name in names}


@pytest.mark.parametrize("name", ["{}", "net.{}", "layers.{}.linear", "a.b1.{}"])
def test_layers_are_taken_by_their_numbers(name):
    given = numbered([2, 3, 4, 5, 6, 7, 8], name)
    assert next(iter(given)).startswith(name.format(0))
    assert list(given)[2].startswith(name.format(10))
    net = from_state_dict(given, activations="tanh")
    assert [layer.out_features for layer in net] == [3, 4, 5, 6, 7, 8]
    for i, layer in enumerate(net):
        assert layer == Dense(given[name.format(2 * i) + ".weight"], given[name.format(2 * i) + ".bias"], "tanh")


@pytest.mark.parametrize("first", [0, 1])
def test_names_that_count(first):
    names = [f"fc{i}" for i in range(first, first + 12)]
    given = squares(*reversed(names))
    net = from_state_dict(given, activations="tanh")
    assert [layer.weight.tolist() for layer in net] == [given[f"{name}.weight"].tolist() for name in names]


def test_a_checkpoint():
    inside = numbered([2, 3, 1])
    expected = from_state_dict(inside, activations="tanh")
    assert from_state_dict({"epoch": 3, "optimizer": [], "model": inside}, activations="tanh") == expected
    several = {"epoch": 3, "model": inside, "ema": numbered([2, 3, 1]), "hyper": {"lr": 0.1}}
    assert from_state_dict(several, activations="tanh", prefix="model") == expected
    for wrong in ("net.pt", [array(2, 2)], None):
        with pytest.raises(ModelFileError, match="a state dict is a dict of arrays, not a"):
            from_state_dict(wrong, activations="tanh")


def test_a_head_of_another_name_and_nested_prefixes():
    given = numbered([4, 8, 8], "policy.net.{}") | numbered([4, 9, 9], "value.net.{}")
    given |= {"head.weight": array(2, 8), "epoch": 3}
    net = from_state_dict(given, activations=["tanh", "relu", "identity"], prefix=["policy.net", "head"])
    assert [layer.activation.name for layer in net] == ["tanh", "relu", "identity"]
    assert net[2] == Dense(given["head.weight"])
    assert from_state_dict(given, activations="tanh", prefix="value.").out_features == 9
    assert from_state_dict(given, activations="tanh", prefix="value.net").out_features == 9


def test_batch_normalisation_and_the_activation_after_it():
    gamma, beta, mean, variance = array(3), array(3), array(3), np.abs(array(3))
    given = {"0.weight": array(3, 2), "1.weight": gamma, "1.bias": beta, "1.running_mean": mean,
             "1.running_var": variance, "1.num_batches_tracked": np.int64(7), "3.weight": array(1, 3)}  # fmt: skip
    net = from_state_dict(given, activations=["identity", "relu", "sigmoid"], epsilon=1e-3)
    scale = (gamma.astype("float64") / np.sqrt(variance.astype("float64") + 1e-3)).astype("float32")
    expected = Scale(scale, center=mean, shift=beta)
    assert (
        np.max(np.abs(net[1].scale - scale) / np.spacing(np.abs(scale))) <= 1
    )  # one rounding, of 1 / sqrt times gamma
    assert net == Network(
        [Dense(given["0.weight"]), expected.replace({"scale": net[1].scale}), Activation("relu"),
         Dense(given["3.weight"], None, "sigmoid")]
    )  # fmt: skip
    with pytest.raises(ModelFileError, match=r"1 is a batch normalisation.*epsilon=, 1e-5"):
        from_state_dict(given, activations=["identity", "relu", "sigmoid"])
    for epsilon in (-1, np.nan, np.inf, True, "1e-5", [1e-5]):
        with pytest.raises(ModelFileError, match=r"epsilon is .*: it must be one number, positive or 0"):
            from_state_dict(given, activations=["identity", "relu", "sigmoid"], epsilon=epsilon)
    with pytest.raises(ModelFileError, match="list with one for each"):
        from_state_dict(given, activations="relu", epsilon=1e-5)
    plain = {"0.running_mean": mean, "0.running_var": variance}
    assert from_state_dict(plain, activations="identity", epsilon=0.5)[0].shift == 0.0


@pytest.mark.parametrize("slopes", [np.float32([0.25]), array(3)])
def test_slopes_of_a_prelu(slopes):
    given = {"0.weight": array(3, 2), "1.weight": slopes, "2.weight": array(1, 3)}
    net = from_state_dict(given, activations=["prelu", "identity"])
    value = float(slopes[0]) if slopes.shape == (1,) else slopes
    assert net[0].activation.structure == activations.prelu(negative_slope=value).structure
    assert np.array_equal(net[0].activation.parameters["negative_slope"], value)
    with pytest.raises(ModelFileError, match=r"1 has only a weight .*PReLU.*'prelu'"):
        from_state_dict(given, activations=["relu", "identity"])


@pytest.mark.parametrize(
    ("given", "arguments", "match"),
    [
        (numbered([2, 3, 1]), {}, r"activations=.*each of the 2: 0 \(2 -> 3\), 2 \(3 -> 1\)"),
        (numbered([2, 3, 1]), {"activations": ["relu"]}, r"1 activations do not fit 2 layers: 0 \(2 -> 3\)"),
        ({"a.weight": array(3, 2), "b.weight": array(1, 3)}, {"activations": "relu"}, r"a, b do not say.*prefix=\["),
        (numbered([2, 3]), {"activations": "relu", "prefix": "net"}, r"no array's name starts with 'net.': there are 0"),
        ({}, {"activations": "relu"}, "no arrays"),
        ({"0.weight": array(3, 2), "0._packed": (1,)}, {"activations": "relu"}, "0._packed is no array but tuple"),
        ({"m": {"0.weight": array(3, 2)}, "h": {"lr": 1}}, {"activations": "relu"}, "h.lr is no array but int.*'m'"),
        (squares("fc1", "fc21", "fc22", "fc3"), {"activations": "relu"}, r"fc1, fc21, fc22, fc3 do not say.*prefix=\["),
        (squares("fc256", "fc128"), {"activations": "relu"}, "do not say in which order"),
        (squares("nets.0.0", "nets.0.2", "nets.1.0", "nets.1.2"), {"activations": "tanh"}, "do not say in which order"),
        (squares("a.1", "a.01"), {"activations": "relu"}, "do not say in which order"),
        (squares("a.0", "b.0"), {"activations": "tanh"}, "do not say in which order"),
        (squares("a", "b"), {"activations": "tanh", "prefix": ["a", "b", "a"]}, "a is chosen by two of the prefixes"),
        (squares("a"), {"activations": "tanh", "epsilon": 1e-5}, "no batch normalisation: leave epsilon= out"),
        (squares("a"), {"activations": "prelu"}, "a prelu's slopes are not in it"),
        (squares("a", "b"), {"activations": ["prelu", "relu"], "prefix": ["a", "b"]}, "a prelu's slopes are not in it"),
        ({"0.weight": array(3, 2, 5, 5)}, {"activations": "relu"}, r"0 holds weight \(3, 2, 5, 5\): only linear layers"),
        ({"0.weight_ih_l0": array(3, 2)}, {"activations": "relu"}, "0 holds weight_ih_l0"),
        ({"0.weight": array(3), "0.bias": array(3)}, {"activations": "relu"}, r"0 holds weight \(3,\), bias"),
        ({"0.weight": np.ones((3, 2), "int8")}, {"activations": "relu"}, "0.weight is int8: it must be float16"),
        ({f"{i}.weight": array(1, 1) for i in range(5000)}, {"activations": "relu"}, "5000 tensors are more than 4096"),
    ],
)  # fmt: skip
def test_what_is_not_stated_is_asked_for(given, arguments, match):
    with pytest.raises(ModelFileError, match=match):
        from_state_dict(given, **{"activations": None} | arguments)


def test_errors_of_the_layers_keep_their_types():
    with pytest.raises(ShapeError, match="layer 1"):
        from_state_dict({"0.weight": array(3, 2), "1.weight": array(1, 4)}, activations="relu")
    with pytest.raises(UnknownNameError, match="did you mean 'relu'"):
        from_state_dict({"0.weight": array(3, 2)}, activations="rellu")


@pytest.mark.parametrize("library", ["jax", "torch"])
def test_arrays_of_other_libraries(library):
    need(library)
    given = numbered([2, 3, 1])
    placed = Network([Dense(a) for a in given.values() if a.ndim == 2]).to(library)
    theirs = {"0.weight": placed[0].weight, "2.weight": placed[1].weight}
    net = from_state_dict(theirs, activations="relu")
    assert type(net[0].weight) is np.ndarray
    assert net == from_state_dict({k: v for k, v in given.items() if "weight" in k}, activations="relu")
    half = placed.to(library, dtype="bfloat16")[0].parameters
    assert from_state_dict(half, activations="relu").dtype == "float32"


@pytest.mark.parametrize("extension", [".npz", ".npy"])
def test_numpy_files_without_a_description(extension, tmp_path):
    path = tmp_path / f"a{extension}"
    given = numbered([2, 3, 1])
    if extension == ".npz":
        np.savez_compressed(path, **given)
        assert nnfwd.load(path, activations=["relu", "identity"]) == from_state_dict(
            given, activations=["relu", "identity"]
        )
    else:
        np.save(path, np.asfortranarray(given["0.weight"]))
        assert nnfwd.load(path, activations="relu") == Network([Dense(given["0.weight"], None, "relu")])
    with pytest.raises(ModelFileError, match=rf"a{extension}: the activations are not in it"):
        nnfwd.load(path)


def test_what_a_file_states_is_not_asked_for(tmp_path):
    nnfwd.save(tutorial()[0], tmp_path / "a.npz")
    with pytest.raises(ModelFileError, match=r"a.npz: the file itself states its activations: leave activations= out"):
        nnfwd.load(tmp_path / "a.npz", activations="relu")
    with pytest.raises(ModelFileError, match=r"weights is nothing that a file of NumPy npz needs: leave weights= out"):
        nnfwd.load(tmp_path / "a.npz", weights="b.h5")
