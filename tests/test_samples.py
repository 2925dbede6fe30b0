"""Real networks with the numbers their authors published: the samples folder beside the repository, where there is one.

Tolerances are absolute and the folder's own, printed digits or README.md's table: how exact its numbers are, not ours.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from oracles import agree

import nnfwd
from nnfwd import Activation, Dense, Network, Scale, activations

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
pytestmark = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"no samples in {SAMPLES}")


def read(name):
    return json.loads((SAMPLES / name).read_text())


def published(y, expected, rounding):
    """Asserts that y is a printed number, which was rounded by so much at most."""
    assert np.shape(y) == np.shape(expected)
    assert np.all(np.abs(np.asarray(y) - expected) <= rounding)


def computed(net, x, expected):
    """Asserts that the output for x is what plain NumPy computed in float64, inside both errors."""
    agree(net, np.asarray(x, "float64"), np.asarray(expected), "numpy", "float64")


# tutorials


@pytest.mark.parametrize("name", ["thomas", "thomas_deeper", "mazur", "sklearn_test_fit"])
def test_worked_examples(name):
    case = read("tutorials/tutorials.json")[name]
    weights = [np.array(w) if case["layout"] == "out,in" else np.array(w).T for w in case["W"]]
    net = Network.from_arrays(weights, case["b"], "sigmoid")
    hidden = net[:1](case["x"])
    computed(net[:1], case["x"], case["float64_hidden"])
    computed(net, case["x"], case["float64"])
    if "published_hidden" in case:
        published(hidden, case["published_hidden"], case["atol"])
    if "published" in case:
        published(net(case["x"]), case["published"], case["atol"])


# keras_js


def keras_2(parameters):
    """The activation as Keras 2 defines it."""
    name = parameters["activation"]
    if "max_value" in parameters:
        return activations.clip(lower=0.0, upper=parameters["max_value"])
    if name == "hard_sigmoid":
        return activations.hard_sigmoid(alpha=0.2)
    if "theta" in parameters:
        return activations.thresholded_relu(alpha=parameters["theta"])
    if "alpha" in parameters:
        key = {"elu": "alpha", "leaky_relu": "negative_slope"}[name]
        return activations.named(name)(**{key: parameters["alpha"]})
    return name


def test_keras_js():
    cases = read("keras_js/parameters.json")
    assert len(cases) == 53
    for name, parameters in cases.items():
        case = read(f"keras_js/{parameters['file']}")[name]
        x, y = (np.array(case[key]["data"], "float64").reshape(case[key]["shape"]) for key in ("input", "expected"))
        weights = [np.array(w["data"]).reshape(w["shape"]) for w in case.get("weights", [])]
        if parameters["activation"] == "prelu":
            net = Network([Activation(activations.prelu(negative_slope=weights[0]))])
        elif weights:
            net = Network([Dense(weights[0].T, *weights[1:], activation=keras_2(parameters))])
        else:
            net = Network([Activation(keras_2(parameters))])
        published(net(x), y, 1e-6)


# dlfs_mnist


def test_dlfs_mnist():
    with np.load(SAMPLES / "dlfs_mnist" / "weights.npz") as w, np.load(SAMPLES / "dlfs_mnist" / "expected.npz") as e:
        weights, biases = [w[f"W{i}"].T for i in (1, 2, 3)], [w[f"b{i}"] for i in (1, 2, 3)]
        net = Network.from_arrays(weights, biases, ["sigmoid", "sigmoid", "softmax"])
        linear = Network.from_arrays(weights, biases, ["sigmoid", "sigmoid", "identity"])
        computed(net, e["x"], e["y"])
        computed(linear, e["x"], e["logits"])


# rosetta_v1


def scaled(columns):
    """(scale, center, shift) of each column; log10 of an input is the caller's."""
    formulas = {
        "division": lambda p: (1 / p[0], 0.0, 0.0),
        "logtr": lambda p: (1 / p[0], 0.0, p[1]),
        "affine": lambda p: (p[0], -p[1], 0.0),
        "minmax": lambda p: (p[1], p[0], p[2]),
        "linear": lambda p: (p[0], 0.0, p[1]),
    }
    scale, center, shift = np.array([formulas[c["scale"]](c["params"]) for c in columns]).T
    return Scale(scale, center=center, shift=shift)


def ensemble(name):
    """All members of one of Rosetta's ensembles as one network, from its inputs to its outputs."""
    about = read("rosetta_v1/networks.json")["networks"][name]
    with np.load(SAMPLES / "rosetta_v1" / f"{name}.npz") as w:
        arrays = [w[key] for key in ("W1", "b1", "W2", "b2")]
    ends = scaled(about["inputs"]), scaled(about["outputs"])
    members = [
        Network([ends[0], Dense(w1, b1, about["activations"][0]), Dense(w2, b2, about["activations"][1]), ends[1]])
        for w1, b1, w2, b2 in zip(*arrays, strict=True)
    ]
    net = Network.stack(members)
    assert net.members() == members
    assert len(members) == about["members"]
    logarithmic = [i for i, column in enumerate(about["inputs"]) if column["scale"] == "logtr"]

    def run(x):
        x = np.array(x, dtype="float64")
        x[:, logarithmic] = np.log10(x[:, logarithmic])
        return net(x)  # (members, soils, outputs)

    return run


@pytest.mark.parametrize("model", [2, 3, 4, 5])
def test_rosetta(model):
    expected = read("rosetta_v1/expected.json")
    x = np.array(expected["features"]["rows"])[:, : model + 1]
    both = [ensemble(f"rose1_mod{model}_{i}")(x).mean(axis=0) for i in (0, 1)]
    published(np.concatenate(both, axis=1), expected["mean"][f"mod{model}"], 1e-12)


def test_rosetta_unsaturated():
    expected = read("rosetta_v1/expected.json")["unsat_k"]
    y = ensemble("rose1_unsat_k")(expected["x"])
    published(y.mean(axis=0), expected["mean"], 1e-12)
    published(y.std(axis=0, ddof=1), expected["std"], 1e-12)


@pytest.mark.parametrize("model", [2, 3, 4, 5])
def test_rosetta_on_a_grid_of_soils(model):
    with open(SAMPLES / "rosetta_v1" / f"grid_mod{model}.csv") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0])
    x = np.array([[float(row[name]) for name in names[: model + 1]] for row in rows])
    assert len(x) == {2: 7, 3: 14, 4: 28, 5: 56}[model]
    y = np.concatenate([_moments(ensemble(f"rose1_mod{model}_{i}"), x) for i in (0, 1)], axis=2)
    mean, std = y
    mean[:, 2:] = 10 ** mean[:, 2:]  # alpha, n, ksat
    k_mean, k_std = _moments(ensemble("rose1_unsat_k"), mean[:, :4])
    k_mean[:, 0] = 10 ** k_mean[:, 0]
    ours = np.concatenate([mean, k_mean, std, k_std], axis=1)
    theirs = np.array([[float(row[name]) for name in names[model + 1 :]] for row in rows])
    published(ours, theirs, 1e-5 + 1e-5 * np.abs(theirs))  # seven digits of a mean and of what was made from means


def _moments(run, x):
    y = run(x)
    return np.stack([y.mean(axis=0), y.std(axis=0, ddof=1)])


# Files


ACASXU = ("ACASXU_run2a_1_1_batch_2000.nnet", "ACASXU_run2a_2_9_batch_2000.nnet", "sisl_TestNetwork.nnet")


@pytest.mark.parametrize("name", ACASXU)
def test_acasxu(name):
    case = read("acasxu/expected.json")["published"][name]
    net = nnfwd.load(SAMPLES / "acasxu" / name)
    published(net(case["x"]), case["y"], case["atol"])


def test_acasxu_onnx():
    pytest.importorskip("onnx")
    case = read("acasxu/expected.json")["computed"]["sisl_TestNetwork2.onnx"]
    net = nnfwd.load(SAMPLES / "acasxu" / "sisl_TestNetwork2.onnx")
    computed(net, case["x"], case["y_float64"])
    agree(net, case["x"], np.array(case["y_onnxruntime"], "float32"), "onnxruntime", "float32")


def test_acasxu_keras():
    case = read("acasxu/expected.json")["computed"]["sisl_KerasTestNetwork.h5"]
    net = nnfwd.load(SAMPLES / "acasxu" / "sisl_KerasTestNetwork.h5")
    computed(net, case["x"], case["y_float64"])


def test_atlas_hft():
    expected = read("atlas_hft/expected.json")
    net = nnfwd.load(SAMPLES / "atlas_hft" / "test_NN.json")
    kinds = [(type(layer).__name__, layer.out_features, layer.activation.name) for layer in net]
    assert kinds == [
        ("Dense", 64, "relu"),
        ("Scale", 64, "identity"),
        ("Dense", 40, "softmax"),
        ("Scale", 40, "identity"),
        ("Dense", 52, "softmax"),
        ("Dense", 1, "sigmoid"),
    ]
    published(net(expected["published"]["x"]), expected["published"]["y"], expected["published"]["atol"])
    computed(net, expected["computed"]["x"], expected["computed"]["y_float64"])


@pytest.mark.parametrize(("head", "key"), [("policy", "logits"), ("value", "value")])
def test_sb3_ppo_cartpole(head, key):
    last = {"policy": "action_net", "value": "value_net"}[head]
    net = nnfwd.load(
        SAMPLES / "sb3_ppo_cartpole" / "policy.pth",
        prefix=[f"mlp_extractor.{head}_net", last],
        activations=["tanh", "tanh", "identity"],
    )
    with np.load(SAMPLES / "sb3_ppo_cartpole" / "expected.npz") as expected:
        computed(net, expected["x"], expected[key])


def test_mujoco_go1():
    pytest.importorskip("onnx")
    net = nnfwd.load(SAMPLES / "mujoco_go1" / "go1.onnx")
    with np.load(SAMPLES / "mujoco_go1" / "expected.npz") as expected:
        computed(net, expected["x"], expected["y_float64"])
        agree(net, expected["x"], expected["y_onnxruntime"], "onnxruntime", "float32")


@pytest.mark.parametrize("name", ["mnist5x20_leaky_relu", "mnist2x5_sigmoid", "softmax-last-layer"])
def test_marabou_mnist(name):
    pytest.importorskip("onnx")
    net = nnfwd.load(SAMPLES / "marabou_mnist" / f"{name}.onnx")
    assert net.input_shape == (1, 28, 28)
    with np.load(SAMPLES / "marabou_mnist" / "expected.npz") as expected:
        x = expected["x"].reshape(-1, 784)
        computed(net, x, expected[f"{name}.float64"])
        agree(net, x, expected[f"{name}.onnxruntime"], "onnxruntime", "float32")
