"""lwtnn's sequential JSON: what is read is what lwtnn computes, and everything else is refused by name."""

import copy
import json
import math
import re

import numpy as np
import pytest
from hostile import attempt, survives

import nnfwd
from nnfwd import Activation, Dense, Limits, Network, Scale, activations
from nnfwd.errors import ModelFileError

SMALL = {
    "inputs": [{"name": "pt", "offset": -0.5, "scale": 2}, {"name": "eta", "offset": 1.0, "scale": 0.25}],
    "layers": [
        {"architecture": "dense", "weights": [1, 2.0, -0.5, 0.25, 0, -1], "bias": [0.5, 0, -2], "activation": "rectified"},
        {"architecture": "normalization", "weights": [2.0, 4.0, 0.5], "bias": [-1.0, 0.0, 2.0]},
        {"architecture": "dense", "weights": [2, -4, 1, 0, 1, 0.5], "bias": [], "activation": "linear"},
        {"architecture": "dense", "weights": [], "bias": [], "activation": "softmax"},
    ],
    "outputs": ["light", "b"],
    "defaults": {"pt": 0.0},
    "miscellaneous": {"made": "by hand"},
}  # fmt: skip


def changed(change=None, **top):
    document = copy.deepcopy(SMALL) | top
    if change is not None:
        change(document)
    return document


def write(tmp_path, document):
    path = tmp_path / "small.json"
    path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    return path


def load(tmp_path, document, **arguments):
    return nnfwd.load(write(tmp_path, document), **arguments)


def test_a_small_network(tmp_path):
    net = load(tmp_path, SMALL)
    expected = Network(
        [
            Scale([2.0, 0.25], center=[0.5, -1.0]),
            Dense([[1.0, 2], [-0.5, 0.25], [0, -1]], [0.5, 0, -2], "relu"),
            Scale([2.0, 4.0, 0.5], center=[1.0, 0.0, -2.0]),
            Dense([[2.0, -4, 1], [0, 1, 0.5]], None, "softmax"),
        ],
        classes=("light", "b"),
    )
    assert net == expected
    assert net.classes == ("light", "b")
    # pt 1, eta 3: (1, 1); relu (3.5, 0, 0); normalized (5, 0, 1)
    assert net[:3]([1.0, 3.0]).tolist() == [5.0, 0.0, 1.0]


def test_inputs_that_are_taken_as_they_are(tmp_path):
    plain = [{"name": name, "offset": 0, "scale": 1.0} for name in "ab"]
    assert load(tmp_path, changed(inputs=plain)) == Network(load(tmp_path, SMALL)[1:], classes=("light", "b"))


def test_a_bias_without_weights_and_an_activation_of_the_inputs(tmp_path):
    layers = [
        {"architecture": "dense", "weights": [], "bias": [], "activation": "tanh"},
        {"architecture": "dense", "weights": [], "bias": [1.0, -2.0], "activation": "linear"},
    ]
    net = load(tmp_path, changed(layers=layers))
    assert list(net)[1:] == [Activation("tanh"), Scale(1.0, shift=[1.0, -2.0])]


def test_a_single_output_has_no_classes(tmp_path):
    layers = [{"architecture": "dense", "weights": [1, 2], "bias": [0], "activation": "sigmoid"}]
    net = load(tmp_path, changed(layers=layers, outputs=["discriminant"]))
    assert net.classes is None
    assert net.out_features == 1


@pytest.mark.parametrize("activation", ["linear", "sigmoid", {"function": "elu", "alpha": 1.0}])
def test_outputs_that_are_no_probabilities_of_classes_are_none(activation, tmp_path):
    layers = [{"architecture": "dense", "weights": [1, 2, 3, 4], "bias": [0, 0], "activation": activation}]
    assert load(tmp_path, changed(layers=layers)).classes is None
    layers[0]["activation"] = "softmax"
    assert load(tmp_path, changed(layers=layers)).classes == ("light", "b")
    layers.append({"architecture": "normalization", "weights": [1.0, 2.0], "bias": [0.0, 1.0]})
    assert load(tmp_path, changed(layers=layers)).classes is None


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# As include/lwtnn/generic/Stack.tcc computes them.
FUNCTIONS = {
    "linear": ("linear", lambda x: x),
    "rectified": ("rectified", lambda x: x if x > 0 else 0.0),
    "sigmoid": ("sigmoid", sigmoid),
    "hard_sigmoid": ("hard_sigmoid", lambda x: min(max(0.2 * x + 0.5, 0.0), 1.0)),
    "tanh": ("tanh", math.tanh),
    "abs": ("abs", abs),
    "elu of old": ("elu", lambda x: x if x >= 0 else math.exp(x) - 1),
    "elu": ({"function": "elu", "alpha": 0.3}, lambda x: x if x >= 0 else 0.3 * (math.exp(x) - 1)),
    "leakyrelu": ({"function": "leakyrelu", "alpha": 0.2}, lambda x: x if x > 0 else 0.2 * x),
    "swish": ({"function": "swish", "alpha": 1.0}, lambda x: x * sigmoid(x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations(name, tmp_path):
    """Inside our bound and the few roundings of the transcription, each worth a unit of the largest intermediate."""
    given, theirs = FUNCTIONS[name]
    layer = {"architecture": "dense", "weights": [1.0], "bias": [0.0], "activation": given}
    document = {"inputs": [{"name": "x", "offset": 0, "scale": 1}], "layers": [layer], "outputs": ["y"]}
    net = load(tmp_path, document)
    x = np.linspace(-6, 6, 241)[:, None]
    expected = np.array([[theirs(value)] for (value,) in x.tolist()])
    allowed = nnfwd.error_bound(net, x).error + 8 * 2.0**-53 * np.maximum(1, abs(expected))
    assert np.all(abs(net(x) - expected) <= allowed)
    assert net.dtype == "float64"


def test_abs_is_exact(tmp_path):
    layer = {"architecture": "dense", "weights": [1.0], "bias": [0.0], "activation": "abs"}
    document = {"inputs": [{"name": "x", "offset": 0, "scale": 1}], "layers": [layer], "outputs": ["y"]}
    x = np.array([-np.inf, -1e308, -0.1, -5e-324, 0.0, 3.3, np.inf, np.nan])
    assert np.array_equal(load(tmp_path, document)(x[:, None])[:, 0], abs(x), equal_nan=True)


def test_parameters_are_the_files(tmp_path):
    def functions(given):
        layers = changed()["layers"]
        layers[0]["activation"] = given
        return load(tmp_path, changed(layers=layers))[1].activation.structure

    assert functions("hard_sigmoid") == activations.hard_sigmoid(alpha=0.2, beta=0.5).structure
    assert functions({"function": "elu", "alpha": 0.7}) == activations.elu(alpha=0.7).structure
    assert functions({"function": "leakyrelu", "alpha": 0.3}) == activations.leaky_relu(negative_slope=0.3).structure


def test_numbers_that_are_not_finite_are_kept(tmp_path):
    document = json.dumps(SMALL).replace("-0.5, 0.25, 0, -1]", "NaN, Infinity, 0, -1]").encode()
    weight = load(tmp_path, document)[1].weight
    assert np.isnan(weight[1, 0])
    assert weight[1, 1] == np.inf


def layer(**values):
    return lambda document: document["layers"][0].update(values)


def without(*path):
    def change(document):
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return change


def given(function, **more):
    return layer(activation={"function": function, **more})


GRAPH = {"inputs": [{"name": "n", "variables": []}], "input_sequences": [], "nodes": [], "layers": [], "outputs": {}}
REFUSED = {
    **{
        f"architecture {name}": (changed(layer(architecture=name)), f"layer 0: the architecture '{name}' cannot be")
        for name in ("lstm", "gru", "simplernn", "embedding", "maxout", "highway", "time_distributed", "conv1d", "")
    },
    "a graph": (GRAPH, "it has nodes: a graph of lwtnn"),
    "an architecture that is none": (changed(layer(architecture=["dense"])), r"the architecture \['dense'\] cannot"),
    "a layer that is none": (changed(layers=[3]), "layer 0: the architecture 3 cannot"),
    "no architecture": (changed(without("layers", 0, "architecture")), "the architecture None cannot"),
    "no weights": (changed(without("layers", 0, "weights")), "layer 0: dense has no weights"),
    "no bias": (changed(without("layers", 1, "bias")), "layer 1: normalization has no bias"),
    "no activation": (changed(without("layers", 0, "activation")), "layer 0: dense has no activation"),
    "an activation of a normalization": (
        changed(lambda d: d["layers"][1].update(activation="tanh")),
        "layer 1: normalization has an unknown activation",
    ),
    "weights of a recurrent layer": (changed(layer(U=[1.0])), "layer 0: dense has an unknown U"),
    "weights that do not fit": (changed(layer(weights=[1.0] * 5)), "layer 0: 5 weights do not fit 2 inputs"),
    "a bias that does not fit": (changed(layer(bias=[1.0])), "layer 0: bias .* does not fit weight"),
    "a normalization that does not fit": (
        changed(lambda d: d["layers"][1].update(weights=[1.0])),
        "layer 1: .* of a Scale must be",
    ),
    "an empty normalization": (
        changed(lambda d: d["layers"][1].update(weights=[], bias=[])),
        "layer 1: .* has a width of zero",
    ),
    "a normalization of another width": (
        changed(lambda d: d["layers"][1].update(weights=[1.0] * 4, bias=[0.0] * 4)),
        r"cannot take x \(\.\.\., 3\)",
    ),
    "a weight that is a string": (changed(layer(weights=[1.0] * 5 + ["1"])), "weights must be a list of numbers"),
    "a weight that is true": (changed(layer(weights=[1.0] * 5 + [True])), "weights must be a list of numbers"),
    "weights in rows": (changed(layer(weights=[[1.0, 2.0]] * 3)), "weights must be a list of numbers"),
    "weights that are none": (changed(layer(weights=None)), "weights must be a list"),
    "a huge number": (changed(layer(weights=[10**400] * 6)), "not a valid .json file: .*too large"),
    "a number of many digits": (b'{"inputs": ' + b"9" * 5000 + b"}", "not a valid .json file: .*digits"),
    "an unknown activation": (changed(layer(activation="mish")), "layer 0: the activation 'mish' is unknown"),
    "an activation that is none": (changed(layer(activation=7)), "layer 0: the activation 7 is unknown"),
    "a slope that is not stated": (changed(layer(activation="leakyrelu")), "'leakyrelu' is .*without its alpha"),
    "swish without alpha": (changed(layer(activation="swish")), "'swish' is unknown, or stated without its alpha"),
    "swish with another alpha": (changed(given("swish", alpha=2.0)), r"\{'function': 'swish', 'alpha': 2.0\} is unk"),
    "a function without alpha": (changed(given("elu")), "layer 0: the activation has no alpha"),
    "an alpha that is no number": (changed(given("elu", alpha="1")), "alpha must be a list of numbers"),
    "an alpha too many": (changed(given("tanh", alpha=1.0)), "is unknown"),
    "a parameter too many": (changed(given("elu", alpha=1.0, beta=2.0)), "the activation has an unknown beta"),
    "no inputs": (changed(inputs=[]), "it has no inputs"),
    "inputs that are none": (changed(inputs={}), "inputs must be a list"),
    "an input without a scale": (changed(without("inputs", 1, "scale")), "input 1 has no scale"),
    "an input that is none": (changed(inputs=["pt", "eta"]), "input 0 is no JSON object"),
    "a scale that is no number": (changed(lambda d: d["inputs"][0].update(scale=None)), "scales must be a list of num"),
    "an output too few": (changed(outputs=["b"]), "1 outputs do not name the 2 of the last layer"),
    "outputs that are none": (changed(outputs=[1, 2]), "2 outputs do not name"),
    "an output twice": (changed(outputs=["b", "b"]), "are the same"),
    "no layers": (changed(without("layers")), "the network has no layers"),
    "something unknown": (changed(extra=1), "the network has an unknown extra"),
    "a list": ([1, 2], "it holds no JSON object"),
    "nothing": (b"", "the file is empty"),
    "no JSON": (b"{]", "not a valid .json file"),
    "no text": (b"\xff\xfe{}", "not a valid .json file"),
    "a key twice": (json.dumps(SMALL).replace('"scale": 2', '"scale": 2, "scale": 3').encode(), "'scale' stands twice"),
    "deep JSON": (b'{"inputs": ' + b"[" * 100_000, "nested deeper than 32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    document, message = REFUSED[name]
    load(tmp_path, SMALL)
    error = attempt(write(tmp_path, document))
    assert isinstance(error, ModelFileError)
    assert re.search(message, str(error)), error


def test_it_takes_no_weights(tmp_path):
    with pytest.raises(ModelFileError, match="leave weights= out"):
        load(tmp_path, SMALL, weights=tmp_path / "weights.h5")


def test_limits(tmp_path):
    for limits, message in (
        (Limits(metadata=100), "limits.metadata"),
        (Limits(layers=3), "layer 2: more than 3 layers: raise limits.layers"),
        (Limits(depth=3), "deeper than 3"),
    ):
        with pytest.raises(ModelFileError, match=message):
            load(tmp_path, SMALL, limits=limits)


def test_damaged_files(tmp_path, note):
    survives(tmp_path, ".json", json.dumps(SMALL).encode(), note)
