"""Keras models of versions 1 to 3: Keras 3 as the oracle, files of 1 and 2 made by hand, and hostile files."""

import copy
import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hostile import ALL, attempt, survives, watched
from oracles import agree

import nnfwd
from nnfwd import Activation, Dense, Scale, activations
from nnfwd.errors import ModelFileError
from nnfwd.io import Limits
from nnfwd.io.keras import from_keras

os.environ.setdefault("KERAS_BACKEND", "jax")  # before anything imports it
# Keras 3.15 uses what NumPy deprecates when it writes a file. Ours does not, see `check`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SAMPLES = Path(__file__).parents[2] / "shared" / "samples"


@pytest.fixture(scope="module")
def keras():
    return pytest.importorskip("keras")


@pytest.fixture(scope="module")
def h5py(tmp_path_factory):
    module = pytest.importorskip("h5py")
    nnfwd.load(packed(tmp_path_factory.mktemp("warm"), hdf5_of(module)))  # what loading imports, it imports now
    return module


def randomised(model, seed=0):
    """A model with random weights; variances and counts are positive."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        value = 0.5 * rng.standard_normal(variable.shape)
        if "variance" in variable.path or "count" in variable.path:
            value = np.abs(value) + 0.1
        variable.assign(value.astype(variable.dtype))
    for layer in model.layers:
        if hasattr(layer, "finalize_state"):  # of a Normalization, which computes with copies of its variables
            layer.finalize_state()
    return model


def sequential(keras, shape, *layers, seed=0):
    return randomised(keras.Sequential([keras.Input(shape), *layers]), seed)


def from_files(model, folder):
    """The network of each kind of file that Keras writes."""
    model.save(folder / "model.keras")
    model.save(folder / "model.h5")
    model.save_weights(folder / "model.weights.h5")
    (folder / "model.json").write_text(model.to_json())
    return {
        "keras": nnfwd.load(folder / "model.keras"),
        "h5": nnfwd.load(folder / "model.h5"),
        "json": nnfwd.load(folder / "model.json", weights=folder / "model.weights.h5"),
        "json, whole": nnfwd.load(folder / "model.json", weights=folder / "model.h5"),
    }


def check(model, folder, x=None):
    """Every file and the live model give the same network, and it agrees with Keras; that network."""
    with warnings.catch_warnings(action="error"):
        net = from_keras(model)
    for kind, loaded in from_files(model, folder).items():
        assert loaded == net, kind
        assert loaded.input_shape == net.input_shape, kind
    if x is None:
        x = np.random.default_rng(1).standard_normal((7, *model.input_shape[1:])).astype("float32")
    flat = x if net.input_shape is None else x.reshape(len(x), -1)
    agree(net, flat, model.predict(x, verbose=0), "keras", "float32")
    return net


# Keras 3 as the oracle

SHARED = {
    "celu": "celu(alpha=1.0)",
    "elu": "elu(alpha=1.0)",
    "exponential": "exp",
    "gelu": "gelu",
    "hard_sigmoid": f"hard_sigmoid(alpha={1 / 6}, beta=0.5)",
    "hard_silu": "hard_silu",
    "hard_swish": "hard_silu",
    "hard_tanh": "hard_tanh",
    "leaky_relu": "leaky_relu(negative_slope=0.2)",
    "linear": "identity",
    "log_sigmoid": "log_sigmoid",
    "log_softmax": "log_softmax",
    "mish": "mish",
    "relu": "relu",
    "relu6": "relu6",
    "selu": "selu",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "softmax": "softmax",
    "softplus": "softplus",
    "softsign": "softsign",
    "sparse_sigmoid": "hard_sigmoid(alpha=0.5, beta=0.5)",
    "swish": "silu",
    "tanh": "tanh",
}


@pytest.mark.parametrize("name", SHARED)
def test_every_activation_we_share(keras, name, tmp_path):
    model = sequential(keras, (5,), keras.layers.Dense(6, activation=name), keras.layers.Dense(3))
    net = check(model, tmp_path)
    assert repr(net[0].activation) == SHARED[name]


def test_every_other_activation_of_keras_is_refused_by_name(keras, tmp_path):
    names = {name for name in dir(keras.activations) if callable(getattr(keras.activations, name))}
    others = names - {"get", "serialize", "deserialize"} - set(SHARED)
    assert len(others) >= 5
    model = sequential(keras, (5,), keras.layers.Dense(2, activation="relu"))
    model.save_weights(tmp_path / "model.weights.h5")
    path = tmp_path / "model.json"
    for name in others:
        path.write_text(model.to_json().replace('"relu"', json.dumps(name)))
        with pytest.raises(ModelFileError, match=f"activation {name} cannot be represented"):
            nnfwd.load(path, weights=tmp_path / "model.weights.h5")


LAYERS = {
    "ReLU": (lambda layers: layers.ReLU(), "relu"),
    "ReLU 6": (lambda layers: layers.ReLU(max_value=6), "relu6"),
    "ReLU none": (lambda layers: layers.ReLU(max_value=None, negative_slope=0.0, threshold=0.0), "relu"),
    "ReLU 2.5": (lambda layers: layers.ReLU(max_value=2.5), "clip(lower=0.0, upper=2.5)"),
    "ReLU slope": (lambda layers: layers.ReLU(negative_slope=0.125), "leaky_relu(negative_slope=0.125)"),
    "ReLU threshold": (lambda layers: layers.ReLU(threshold=0.25), "thresholded_relu(alpha=0.25)"),
    "LeakyReLU": (lambda layers: layers.LeakyReLU(), "leaky_relu(negative_slope=0.3)"),
    "LeakyReLU slope": (lambda layers: layers.LeakyReLU(negative_slope=0.4), "leaky_relu(negative_slope=0.4)"),
    "ELU": (lambda layers: layers.ELU(alpha=0.5), "elu(alpha=0.5)"),
    "PReLU": (lambda layers: layers.PReLU(), "prelu(negative_slope=array(4,))"),
    "Softmax": (lambda layers: layers.Softmax(), "softmax"),
    "Softmax axis": (lambda layers: layers.Softmax(axis=1), "softmax"),
    "Activation": (lambda layers: layers.Activation("tanh"), "tanh"),
    "Activation layer": (lambda layers: layers.Activation(layers.ELU(alpha=0.25)), "elu(alpha=0.25)"),
    "Activation linear": (lambda layers: layers.Activation("linear"), "identity"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_are_activations(keras, name, tmp_path):
    make, expected = LAYERS[name]
    net = check(sequential(keras, (5,), keras.layers.Dense(4), make(keras.layers)), tmp_path)
    assert repr(net[0].activation) == expected
    assert len(net) == 1


@pytest.mark.parametrize(("units", "settings"), [(1, {}), (4, {"shared_axes": [1]})], ids=["one unit", "shared"])
def test_a_single_slope_is_a_number(keras, units, settings, tmp_path):
    model = sequential(keras, (5,), keras.layers.Dense(units), keras.layers.PReLU(**settings))
    net = check(model, tmp_path)
    slope = net[0].activation.parameters["negative_slope"]
    assert type(slope) is float
    assert slope == float(np.asarray(model.layers[1].alpha).reshape(()))


def test_a_layer_as_the_activation_of_a_dense_layer(keras, tmp_path):
    layers = keras.layers
    net = check(sequential(keras, (5,), layers.Dense(4, activation=layers.LeakyReLU(negative_slope=0.5))), tmp_path)
    assert net[0].activation == activations.leaky_relu(negative_slope=0.5) or "0.5" in repr(net[0].activation)


SCALES = {
    "BatchNormalization": lambda layers: layers.BatchNormalization(epsilon=0.02),
    "BatchNormalization without scale": lambda layers: layers.BatchNormalization(scale=False),
    "BatchNormalization without center": lambda layers: layers.BatchNormalization(center=False, axis=1),
    "BatchNormalization alone": lambda layers: layers.BatchNormalization(center=False, scale=False),
    "Normalization": lambda layers: layers.Normalization(),
    "Normalization of all": lambda layers: layers.Normalization(axis=None),
    "Normalization given": lambda layers: layers.Normalization(mean=[1.0, 2, 3, 4], variance=[0.5, 1, 2, 3]),
    "Normalization by one number": lambda layers: layers.Normalization(mean=1.5, variance=0.3),
    "Normalization by whole numbers": lambda layers: layers.Normalization(mean=1, variance=2),
    "Normalization of variance 0": lambda layers: layers.Normalization(mean=[0.0, 0, 0, 0], variance=[0.0, 1, 2, 3]),
    "Normalization backwards": lambda layers: layers.Normalization(
        mean=[1.0, 2, 3, 4], variance=[0.0, 1, 2, 3], invert=True
    ),
    "Rescaling": lambda layers: layers.Rescaling(1 / 255, offset=-0.5),
    "Rescaling by feature": lambda layers: layers.Rescaling(np.array([1.0, 2, 3, 4]), offset=[0.0, 1, 2, 3]),
}


@pytest.mark.parametrize("name", SCALES)
def test_normalisations_become_a_scale_that_is_not_folded(keras, name, tmp_path):
    layer = SCALES[name](keras.layers)
    net = check(sequential(keras, (4,), layer, keras.layers.Dense(3), keras.layers.ELU()), tmp_path)
    assert [type(step) for step in net] == [Scale, Dense]
    net = check(sequential(keras, (6,), keras.layers.Dense(4), SCALES[name](keras.layers)), tmp_path)
    assert [type(step) for step in net] == [Dense, Scale]


def test_an_adapted_normalisation(keras, tmp_path):
    layer = keras.layers.Normalization()
    layer.adapt(np.random.default_rng(0).normal(3, 2, (50, 4)).astype("float32"))
    net = check(keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(2)]), tmp_path)
    np.testing.assert_array_equal(net[0].center, np.asarray(layer.mean).ravel())


def test_what_does_nothing_at_inference_vanishes(keras, tmp_path):
    layers = keras.layers
    nothing = [
        *(layers.Dropout(0.5), layers.Dropout(0.0, seed=3), layers.GaussianDropout(0.5), layers.GaussianNoise(1.0)),
        *(layers.AlphaDropout(0.5), layers.ActivityRegularization(0.1), layers.Identity(), layers.Flatten()),
        *(layers.Reshape((5,)), layers.Reshape((-1,))),
    ]
    net = check(sequential(keras, (5,), *nothing, layers.Dense(3), layers.Dropout(0.5)), tmp_path)
    assert len(net) == 1


def test_consecutive_linear_layers_and_a_hidden_softmax_stay(keras, tmp_path):
    layers = [keras.layers.Dense(n, activation=a) for n, a in ((4, None), (3, None), (5, "softmax"), (2, "softmax"))]
    net = check(sequential(keras, (3,), *layers), tmp_path)
    assert [layer.activation.name for layer in net] == ["identity", "identity", "softmax", "softmax"]


@pytest.mark.parametrize("first", ["Flatten", "Reshape", "Rescaling", "Reshape of part"])
def test_a_leading_flatten_is_recorded(keras, first, tmp_path):
    layers = keras.layers
    leading = {
        "Flatten": [layers.Flatten()],
        "Reshape": [layers.Reshape((-1,))],
        "Rescaling": [layers.Rescaling(0.5), layers.ReLU(), layers.Flatten()],
        "Reshape of part": [layers.Reshape((2, 3, 1)), layers.Flatten()],
    }[first]
    net = check(sequential(keras, (2, 3, 1), *leading, layers.Dense(4)), tmp_path)
    assert net.input_shape == (2, 3, 1)
    assert net.in_features == 6


CHANNELS = {
    "BatchNormalization": lambda layers, n: layers.BatchNormalization(),
    "BatchNormalization without scale": lambda layers, n: layers.BatchNormalization(scale=False, center=False),
    "BatchNormalization, axis 3": lambda layers, n: layers.BatchNormalization(axis=3),
    "Normalization": lambda layers, n: layers.Normalization(axis=-1),
    "Normalization given": lambda layers, n: layers.Normalization(mean=np.arange(n) + 1.0, variance=[0.5] * n),
    "Rescaling": lambda layers, n: layers.Rescaling([2.0, 3.0, 4.0][:n], offset=[0.5, -1.0, 0.0][:n]),
    "PReLU": lambda layers, n: layers.PReLU(shared_axes=[1, 2]),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CHANNELS)
def test_what_stands_for_each_channel_is_repeated_before_a_flatten(keras, name, channels, tmp_path):
    layers = keras.layers
    made = CHANNELS[name](layers, channels)
    net = check(sequential(keras, (4, 5, channels), made, layers.Flatten(), layers.Dense(3)), tmp_path)
    assert net.input_shape == (4, 5, channels)
    assert net.in_features == 20 * channels
    assert len(net) == 2


def test_an_image_network(keras, tmp_path):
    layers = keras.layers
    image = [layers.Rescaling(1 / 255), layers.BatchNormalization(), layers.PReLU(shared_axes=[1, 2]), layers.Flatten()]
    x = np.random.default_rng(1).uniform(0, 255, (5, 6, 7, 3)).astype("float32")
    net = check(sequential(keras, (6, 7, 3), *image, layers.Dense(4), layers.BatchNormalization()), tmp_path, x)
    assert [type(step) for step in net] == [Scale, Scale, Activation, Dense, Scale]
    np.testing.assert_array_equal(net[1].center, np.tile(net[1].center[:3], 42))


def test_what_is_repeated_has_a_limit(h5py, tmp_path):
    names = ("gamma:0", "beta:0", "moving_mean:0", "moving_variance:0")
    arrays = {f"bn/{name}": array[:3] for name, array in zip(names, STATISTICS, strict=True)}
    settings = {"name": "bn", "axis": [3], "epsilon": 0.01, "batch_input_shape": [None, 2**20, 2**20, 3]}
    layers = [layer("BatchNormalization", **settings), layer("Flatten", name="f")]
    document = {"class_name": "Sequential", "config": {"name": "m", "layers": layers}}
    data = layout(h5py, {"bn": arrays}, model_config=json.dumps(document).encode(), keras_version=b"2.9.0")
    (tmp_path / "m.h5").write_bytes(data)
    assert "would have 39582418599936 bytes for every element: put Flatten first" in str(attempt(tmp_path / "m.h5"))


def test_without_a_flatten_a_dense_layer_works_on_the_last_axis(keras, tmp_path):
    layers = keras.layers
    shared = layers.PReLU(shared_axes=[1])
    net = check(sequential(keras, (2, 3), layers.Dense(4), layers.BatchNormalization(), shared), tmp_path)
    assert net.input_shape is None
    assert net.in_features == 3


def nested(keras, trainable=True):
    layers = keras.layers
    inner = [keras.Input((4,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(3, "tanh", use_bias=False)]
    inner = keras.Sequential(inner)
    inner.layers[0].trainable = trainable
    x = keras.Input((5,))
    y = layers.BatchNormalization()(layers.Dense(4)(x))
    middle = keras.Model(x, layers.Dropout(0.5)(inner(y), training=False))
    outer = keras.Sequential([keras.Input((5,)), layers.Dense(5), middle, layers.Dense(2), layers.Dense(2)])
    return randomised(outer)


@pytest.mark.parametrize("trainable", [True, False])
def test_models_as_layers(keras, trainable, tmp_path):
    net = check(nested(keras, trainable), tmp_path)
    assert [type(step).__name__ for step in net] == [
        "Dense",
        "Dense",
        "Scale",
        "Dense",
        "Scale",
        "Dense",
        "Dense",
        "Dense",
    ]


def test_a_functional_chain_whose_layers_were_made_in_another_order(keras, tmp_path):
    layers = keras.layers
    last, first = layers.Dense(3, "relu"), layers.Dense(3, "tanh")
    x = keras.Input((3,))
    net = check(randomised(keras.Model(x, last(first(x)))), tmp_path)
    assert [step.activation.name for step in net] == ["tanh", "relu"]


def test_more_than_ten_layers_of_a_class(keras, tmp_path):
    check(sequential(keras, (3,), *(keras.layers.Dense(3) for _ in range(12))), tmp_path)


def test_compiled_and_trained_models(keras, tmp_path):
    model = sequential(
        keras, (3,), keras.layers.Dense(4, "relu"), keras.layers.Dropout(0.1, seed=1), keras.layers.Dense(2)
    )
    model.compile(optimizer="adam", loss="mse", metrics=["mae"])
    model.fit(np.ones((8, 3), "f4"), np.ones((8, 2), "f4"), verbose=0)
    check(model, tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(keras, seed, tmp_path):
    rng = np.random.default_rng(seed)
    choices = [*LAYERS.values()]
    made, width = [], int(rng.integers(1, 9))
    first = width
    for _ in range(rng.integers(1, 6)):
        width = int(rng.integers(2, 9))  # Keras warns of a softmax of one
        made.append(keras.layers.Dense(width, use_bias=bool(rng.integers(2))))
        if rng.integers(2):
            made.append(keras.layers.BatchNormalization())
        made.append(choices[rng.integers(len(choices))][0](keras.layers))
        if rng.integers(2):
            made.append(keras.layers.Dropout(0.5))
    check(sequential(keras, (first,), *made, seed=seed), tmp_path)


@pytest.mark.parametrize("policy", ["float16", "bfloat16", "mixed_float16", "mixed_bfloat16"])
def test_weights_are_read_as_they_are_stored(keras, policy, tmp_path):
    model = sequential(keras, (3,), keras.layers.Dense(4, "relu", dtype=policy), keras.layers.Dense(2, dtype=policy))
    net = from_keras(model)
    assert net.dtype == ("float16" if policy == "float16" else "float32")
    np.testing.assert_array_equal(net[0].weight.T, np.asarray(model.layers[0].kernel).astype("float32"))
    model.save(tmp_path / "model.keras")
    assert nnfwd.load(tmp_path / "model.keras") == net
    model.save(tmp_path / "model.h5")
    if policy == "bfloat16":  # Keras does not say there what the bytes are, and cannot read them itself
        with pytest.raises(ModelFileError, match="opaque"):
            nnfwd.load(tmp_path / "model.h5")
    else:
        assert nnfwd.load(tmp_path / "model.h5") == net


def test_weights_that_are_nan_are_kept(keras, tmp_path):
    model = sequential(keras, (3,), keras.layers.Dense(2))
    model.layers[0].kernel.assign(np.full((3, 2), np.nan))
    for kind, net in from_files(model, tmp_path).items():
        assert np.isnan(net[0].weight).all(), kind


# What is refused, by name


def shared(layers, x):
    layer = layers.Dense(4)
    return layer(layer(x))


REFUSED = {
    "a branch": ((4,), lambda layers, x: layers.Add()([layers.Dense(4)(x), x]), "Add"),
    "a concatenation": ((4,), lambda layers, x: layers.Concatenate()([x, x]), "Concatenate"),
    "an operation": ((4,), lambda layers, x: x + 1.0, "Add"),
    "a shared layer": ((4,), shared, "used 2 times"),
    "a convolution": ((4, 1), lambda layers, x: layers.Conv1D(2, 1)(x), "Conv1D"),
    "a recurrent layer": ((4, 1), lambda layers, x: layers.LSTM(2)(x), "LSTM"),
    "layer normalisation": ((4,), lambda layers, x: layers.LayerNormalization()(x), "LayerNormalization"),
    "a later flatten": ((2, 2), lambda layers, x: layers.Flatten()(layers.Dense(2)(x)), "before the first Dense"),
    "a flatten after a softmax": (
        (2, 2),
        lambda layers, x: layers.Flatten()(layers.Softmax()(x)),
        "before the first Dense or Softmax: put Flatten first",
    ),
    "a flatten that reorders": (
        (2, 2),
        lambda layers, x: layers.Flatten(data_format="channels_first")(x),
        "channels_first",
    ),
    "a flatten of any shape": ((None, 2), lambda layers, x: layers.Flatten()(x), "does not state the whole shape"),
    "another shape": ((4,), lambda layers, x: layers.Reshape((2, 2))(x), "only a flattening is read"),
    "a softmax elsewhere": ((2, 2), lambda layers, x: layers.Softmax(axis=1)(x), "axis 1 is not the last"),
    "batch normalisation elsewhere": (
        (2, 2),
        lambda layers, x: layers.BatchNormalization(axis=1)(x),
        "axis 1 is not the last",
    ),
    "normalisation of two axes": ((2, 2), lambda layers, x: layers.Normalization(axis=(1, 2))(x), "is not the last"),
    "a slope for every element": ((2, 2), lambda layers, x: layers.PReLU()(x), "alpha (2, 2) differs"),
    "two settings of ReLU": (
        (4,),
        lambda layers, x: layers.ReLU(6, negative_slope=0.1)(x),
        "together cannot be represented",
    ),
    "training": ((4,), lambda layers, x: layers.Dropout(0.5)(x, training=True), "training=True"),
    "renorm": ((4,), lambda layers, x: layers.BatchNormalization(renorm=True)(x), "renorm"),
}


def refused(model, words, folder):
    model.save(folder / "model.keras")
    for load in (lambda: nnfwd.load(folder / "model.keras"), lambda: from_keras(model)):
        with pytest.raises(ModelFileError, match=re.escape(words)):
            load()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_represented_is_refused_by_name(keras, name, tmp_path):
    shape, make, words = REFUSED[name]
    x = keras.Input(shape)
    refused(keras.Model(x, make(keras.layers, x)), words, tmp_path)


def test_several_inputs_or_outputs_are_refused(keras, tmp_path):
    x, z = keras.Input((4,)), keras.Input((4,))
    y = keras.layers.Dense(2)(x)
    refused(keras.Model(x, [y, keras.layers.Dense(2)(y)]), "output layers must be one", tmp_path)
    refused(keras.Model([x, z], keras.layers.Dense(2)(x)), "input layers must be one", tmp_path)


def test_layers_and_functions_of_ones_own_are_refused(keras, tmp_path):
    @keras.saving.register_keras_serializable("mine")
    class Dense(keras.layers.Dense):
        pass

    @keras.saving.register_keras_serializable("mine")
    def relu(x):
        return -x

    class Model(keras.Model):
        pass

    class Sequential(keras.Sequential):
        pass

    refused(sequential(keras, (4,), Dense(2)), "Dense (mine>Dense) is a layer of somebody's own", tmp_path)
    refused(sequential(keras, (4,), keras.layers.Dense(2, activation=relu)), "mine>relu", tmp_path)
    refused(sequential(keras, (4,), keras.layers.Lambda(relu)), "Lambda", tmp_path)
    with pytest.raises(ModelFileError, match=re.escape("write nnfwd.load('k.keras')")):
        from_keras("k.keras")
    with pytest.raises(ModelFileError, match="write nnfwd.load"):
        from_keras(Path("k.keras"))
    for model in (Model(), Sequential([keras.Input((4,)), keras.layers.Dense(2)]), keras.layers.Dense(2), 5, None):
        with pytest.raises(ModelFileError, match="is no Sequential or functional Model of Keras"):
            from_keras(model)


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`:UserWarning")
def test_a_lambda_as_activation_is_named(keras, tmp_path):
    model = sequential(keras, (4,), keras.layers.Dense(2, activation=lambda x: x))
    refused(model, "(Dense): its activation is a lambda", tmp_path)
    model.save(tmp_path / "model.h5")
    with pytest.raises(ModelFileError, match=r"\(Dense\): its activation is a lambda"):
        nnfwd.load(tmp_path / "model.h5")


def test_what_to_do_with_a_model_of_ones_own_class(keras, tmp_path):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2, activation="tanh")

        def call(self, x):
            return self.dense(x)

    model = Model()
    x = np.random.default_rng(0).standard_normal((4, 3)).astype("float32")
    y = np.asarray(model(x))
    model.save_weights(tmp_path / "model.weights.h5")
    advice = "put its layers into a keras.Sequential .* nnfwd.from_state_dict or Network.from_arrays, which need each k"
    with pytest.raises(ModelFileError, match=advice):
        nnfwd.load(tmp_path / "model.weights.h5")
    with pytest.raises(ModelFileError, match=advice):
        from_keras(model)
    # Both pieces of advice can be followed.
    net = from_keras(keras.Sequential([keras.Input((3,)), model.dense]))
    agree(net, x, y, "keras", "float32")
    arrays = [np.asarray(variable) for variable in model.weights]
    assert nnfwd.Network.from_arrays([arrays[0].T], [arrays[1]], ["tanh"]) == net


@pytest.mark.filterwarnings("ignore:You are saving a model that has not yet been built:UserWarning")
def test_a_model_that_is_not_built_or_is_quantised(keras, tmp_path):
    model = keras.Sequential([keras.layers.Dense(3)])
    refused(model, "0 variables here, it needs kernel, bias: a model that is not built has none: call it", tmp_path)
    model.save(tmp_path / "model.h5")
    with pytest.raises(ModelFileError, match="weights of 0 layers, .* a model that is not built has none: call it"):
        nnfwd.load(tmp_path / "model.h5")
    model = sequential(keras, (4,), keras.layers.Dense(4))
    model.layers[0].enable_lora(2)
    refused(model, "lora_rank", tmp_path)
    model = sequential(keras, (4,), keras.layers.Dense(4))
    with warnings.catch_warnings(action="ignore"):  # of the layers it leaves alone
        model.quantize("int8")
    refused(model, "quantization_config", tmp_path)


# Files of Keras 1 and 2, by hand: https://github.com/keras-team/tf-keras/blob/master/tf_keras/saving/legacy/hdf5_format.py

RNG = np.random.default_rng(5)
KERNEL, BIAS = (RNG.standard_normal(shape).astype("float32") for shape in ((3, 4), (4,)))
STATISTICS = [np.abs(RNG.standard_normal(4)).astype("float32") for _ in range(4)]
DENSE_2 = {"name": "dense", "units": 4, "activation": "hard_sigmoid", "use_bias": True, "batch_input_shape": [None, 3]}
DENSE_1 = {
    "name": "dense_1",
    "output_dim": 4,
    "activation": "hard_sigmoid",
    "bias": True,
    "batch_input_shape": [None, 3],
}


def layer(kind, **config):
    return {"class_name": kind, "config": config}


def layout(h5py, weights, chunked=False, libver="earliest", **attributes):
    """The bytes of an HDF5 file with weights {layer: {name: array}}, below `model_weights` where there is a model_config."""
    data = io.BytesIO()
    with h5py.File(data, "w", libver=libver) as file:
        file.attrs.update(attributes)
        root = file.create_group("model_weights") if "model_config" in attributes else file
        names = np.array([name.encode() for name in weights])
        if chunked:
            root.attrs["layer_names0"], root.attrs["layer_names1"] = names[:1], names[1:]
        else:
            root.attrs["layer_names"] = names
        for name, arrays in weights.items():
            group = root.create_group(name)
            group.attrs["weight_names"] = np.array([key.encode() for key in arrays])
            for key, array in arrays.items():
                group[key] = array
    return data.getvalue()


def load_h5(h5py, folder, document, weights, version, **arguments):
    """The network of a whole-model .h5; that of JSON and weights is the same."""
    text = json.dumps(document)
    (folder / "model.h5").write_bytes(
        layout(h5py, weights, model_config=text.encode(), keras_version=version.encode(), **arguments)
    )
    (folder / "weights.h5").write_bytes(layout(h5py, weights, **arguments))
    (folder / "model.json").write_text(json.dumps({**document, "keras_version": version, "backend": "theano"}))
    net = nnfwd.load(folder / "model.h5")
    assert nnfwd.load(folder / "model.json", weights=folder / "weights.h5") == net
    assert nnfwd.load(folder / "model.json", weights=str(folder / "model.h5")) == net
    return net


@pytest.mark.parametrize("version", ["1.2.1", "1.0.6"])
def test_keras_1(h5py, version, tmp_path):
    layers = [
        layer("Dense", **DENSE_1),
        layer("Dropout", name="dropout_1", p=0.5),
        layer("Activation", name="a", activation="tanh"),
    ]
    weights = {"dense_1": {"dense_1_W": KERNEL, "dense_1_b": BIAS}, "dropout_1": {}, "a": {}}
    net = load_h5(h5py, tmp_path, {"class_name": "Sequential", "config": layers}, weights, version)
    assert repr(net) == repr(nnfwd.Network([Dense(KERNEL.T, BIAS, net[0].activation), Activation("tanh")]))
    assert repr(net[0].activation) == "hard_sigmoid(alpha=0.2, beta=0.5)"
    np.testing.assert_array_equal(net[0].weight, KERNEL.T)
    np.testing.assert_array_equal(net[0].bias, BIAS)


def batch_normalisation(names, **config):
    layers = [
        layer("Dense", **DENSE_1),
        layer("BatchNormalization", name="bn", **{"axis": -1, "epsilon": 0.01, **config}),
    ]
    arrays = dict(zip((f"bn_{name}" for name in names), STATISTICS, strict=True))
    weights = {"dense_1": {"dense_1_W": KERNEL, "dense_1_b": BIAS}, "bn": arrays}
    return {"class_name": "Sequential", "config": layers}, weights


def test_batch_normalisation_of_keras_1(h5py, tmp_path):
    names = ("gamma", "beta", "running_mean", "running_std")
    gamma, beta, mean, variance = STATISTICS
    net = load_h5(h5py, tmp_path, *batch_normalisation(names, mode=0), "1.2.1")
    expected = (gamma.astype("f8") / np.sqrt(variance.astype("f8") + 0.01)).astype("f4")
    assert net[1] == Scale(expected, center=mean, shift=beta)
    for version, mode, words in (("1.1.0", 0, "before Keras 1.2"), ("1.2.1", 1, "mode 1")):
        with pytest.raises(ModelFileError, match=words):
            load_h5(h5py, tmp_path, *batch_normalisation(names, mode=mode), version)
    with pytest.raises(ModelFileError, match="bn_running_std where its moving_mean"):
        load_h5(h5py, tmp_path, *batch_normalisation((*names[:2], *names[:1:-1]), mode=0), "1.2.1")


def test_batch_normalisation_of_no_stated_version(h5py, tmp_path):
    document, weights = batch_normalisation(("gamma", "beta", "running_mean", "running_std"), mode=0)
    path = tmp_path / "model.h5"
    path.write_bytes(layout(h5py, weights, model_config=json.dumps(document).encode()))
    with pytest.raises(ModelFileError, match="bn .*: the file does not state keras_version"):
        nnfwd.load(path)
    (tmp_path / "model.json").write_text(json.dumps(document))
    with pytest.raises(ModelFileError, match="bn .*: the file does not state keras_version"):
        nnfwd.load(tmp_path / "model.json", weights=path)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_functional_model_of_keras_2(h5py, chunked, tmp_path):
    def called(entry, *source):
        return {**entry, "name": entry["config"]["name"], "inbound_nodes": [[[*source, 0, 0, {}]]] if source else []}

    shape = {"class_name": "__tuple__", "items": [None, 3]}
    config = {
        "name": "model",
        "layers": [
            called(layer("InputLayer", name="x", batch_input_shape=shape, dtype="float32", sparse=False, ragged=False)),
            called(
                layer("Dense", **{**DENSE_2, "batch_input_shape": shape, "kernel_initializer": layer("Zeros")}), "x"
            ),
            called(layer("LeakyReLU", name="leaky", alpha=0.125), "dense"),
            called(layer("BatchNormalization", name="bn", axis=[1], epsilon=0.01, center=True, scale=True), "leaky"),
            called(layer("ReLU", name="relu", max_value={"type": "ndarray", "value": 6.0}), "bn"),
            called(layer("ThresholdedReLU", name="t", theta=0.5), "relu"),
        ],
        "input_layers": [["x", 0, 0]],
        "output_layers": [["t", 0, 0]],
    }
    names = ("gamma:0", "beta:0", "moving_mean:0", "moving_variance:0")
    statistics = dict(zip((f"bn_1/{name}" for name in names), STATISTICS, strict=True))
    weights = {"x": {}, "dense": {"dense/kernel:0": KERNEL, "dense/bias:0": BIAS}, "leaky": {}, "bn": statistics}
    document = {"class_name": "Functional", "config": config}
    net = load_h5(h5py, tmp_path, document, weights, "2.9.0", chunked=chunked)
    assert re.findall(r"hard.*?\)|leaky.*?\)|relu6|thresh.*?\)", repr(net)) == [
        "hard_sigmoid(alpha=0.2, beta=0.5)", "leaky_relu(negative_slope=0.125)", "relu6", "thresholded_relu(alpha=0.5)"
    ]  # fmt: skip
    assert [type(step).__name__ for step in net] == ["Dense", "Activation", "Scale", "Activation", "Activation"]


@pytest.mark.parametrize("style", ["inner_1/dense/{}:0", "dense_{}"])
def test_a_model_as_a_layer_of_keras_1_and_2(h5py, style, tmp_path):
    dense, bn = {**DENSE_2, "activation": "tanh"}, {"name": "bn", "axis": -1, "epsilon": 0.01}
    inner = layer("Sequential", name="inner", layers=[layer("Dense", **dense), layer("BatchNormalization", **bn)])
    document = {"class_name": "Sequential", "config": {"name": "m", "layers": [inner]}}
    old = style.startswith("dense")
    names = (
        ("gamma", "beta", "running_mean", "running_std") if old else ("gamma", "beta", "moving_mean", "moving_variance")
    )
    weights = {
        style.format(name): a for name, a in (("W" if old else "kernel", KERNEL), ("b" if old else "bias", BIAS))
    }
    statistics = {style.format(name).replace("dense", "bn"): a for name, a in zip(names, STATISTICS, strict=True)}
    mixed = {**dict(list(statistics.items())[2:]), **weights, **dict(list(statistics.items())[:2])}  # in no order
    net = load_h5(h5py, tmp_path, document, {"inner": mixed}, "1.2.2" if old else "2.15.0")
    np.testing.assert_array_equal(net[0].weight, KERNEL.T)
    np.testing.assert_array_equal(net[1].center, STATISTICS[2])
    np.testing.assert_array_equal(net[1].shift, STATISTICS[1])
    other = {f"{name}x": array for name, array in mixed.items()}
    with pytest.raises(ModelFileError, match="0 weights of inner are called dense/kernel: one is needed"):
        load_h5(h5py, tmp_path, document, {"inner": other}, "2.15.0")
    with pytest.raises(ModelFileError, match="the model inner has 2 variables here, it needs 6"):
        load_h5(h5py, tmp_path, document, {"inner": weights}, "2.15.0")


def test_a_keras_file_of_keras_2_has_its_hard_sigmoid(h5py, tmp_path):
    path = packed(tmp_path, hdf5_of(h5py, root="_layer_checkpoint_dependencies"), version="2.12.0")
    assert repr(nnfwd.load(path)[0].activation) == "hard_sigmoid(alpha=0.2, beta=0.5)"
    path = packed(tmp_path, hdf5_of(h5py), version="3.0.0")
    assert repr(nnfwd.load(path)[0].activation) == f"hard_sigmoid(alpha={1 / 6}, beta=0.5)"


# Hostile files

MODEL = {"class_name": "Sequential", "config": {"name": "m", "layers": [layer("Dense", **DENSE_2)]}}


def hdf5_of(h5py, *arrays, root="layers", name="dense", extra=(), **settings):
    """The bytes of a weights file of Keras 3."""
    data = io.BytesIO()
    with h5py.File(data, "w", **settings) as file:
        for i, array in enumerate(arrays or (KERNEL, BIAS)):
            file[f"{root}/{name}/vars/{i}"] = array
        for path, array in dict(extra).items():
            file[path] = array
    return data.getvalue()


def packed(folder, weights, document=MODEL, version="3.15.1", extra=(), compression=zipfile.ZIP_STORED):
    """A `.keras` file; the document may be text."""
    path = folder / "model.keras"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": version} if version else {}))
        archive.writestr("config.json", document if isinstance(document, str) else json.dumps(document))
        archive.writestr("model.weights.h5", weights)
        for name in extra:
            archive.writestr(name, b"")
    return path


def edited(**changes):
    """MODEL with another Dense layer: `class_name`, `module`, ... of the layer, everything else of its configuration."""
    entry = copy.deepcopy(MODEL["config"]["layers"][0])
    for key, value in changes.items():
        (entry if key in ("class_name", "module", "registered_name", "config") else entry["config"])[key] = value
    return {"class_name": "Sequential", "config": {"name": "m", "layers": [entry]}}


def dense(**config):
    return layer("Dense", name="d", units=4, activation="relu", use_bias=True, **config)


def chain(*sources, first="x", last="b"):
    entries = [layer("InputLayer", name="x", batch_shape=[None, 3]), dense(), dense()]
    entries[1]["config"]["name"], entries[2]["config"]["name"] = "a", "b"
    for entry, source in zip(entries, sources, strict=True):
        entry["inbound_nodes"] = source and [[[source, 0, 0, {}]]]
    config = {"name": "m", "layers": entries, "input_layers": [[first, 0, 0]], "output_layers": [[last, 0, 0]]}
    return {"class_name": "Functional", "config": config}


HOSTILE = {
    "a Lambda layer": (edited(class_name="Lambda", function=["4wEAAAA=", None, None]), "Lambda"),
    "a module": (edited(module="os"), "Dense (os)"),
    "a module that looks like Keras": (edited(module="keras_evil.layers"), "Dense (keras_evil.layers)"),
    "no module": (edited(module=None), "somebody's own"),
    "another registered name": (edited(module="keras.layers", registered_name="x>Dense"), "Dense (x>Dense)"),
    "a class name that is a path": (edited(class_name="../../Dense"), "../../Dense"),
    "a class name that is a list": (edited(class_name=["Dense"]), "class_name"),
    "a function": (edited(activation={"class_name": "function", "module": "builtins", "config": "eval"}), "eval"),
    "a function of Keras": (edited(activation={"class_name": "function", "module": "keras.utils", "config": "get_file"}), "get_file"),
    "a lambda": (edited(activation={"class_name": "__lambda__", "config": {"value": "4wEA"}}), "its activation is a lambda"),
    "a layer with weights as activation": (edited(activation=layer("PReLU", name="p")), "PReLU"),
    "an activation that is a number": (edited(activation=5), "activation 5"),
    "an unknown setting": (edited(kernel_twist=1), "dense (Dense): unknown setting kernel_twist"),
    "two names of a setting": (edited(output_dim=4), "both units and output_dim"),
    "no units": (edited(class_name="Dense", config={"name": "d", "activation": "relu"}), "does not state units"),
    "other units": (edited(units=5), "kernel has shape (3, 4), it must be (3, 5)"),
    "units that are text": (edited(units="4"), "units is 4: it must be a whole number"),
    "units that are null": (edited(units=None), "units is None"),
    "another input": (edited(batch_input_shape=[None, 2]), "kernel has shape (3, 4), it must be (2, 4)"),
    "a negative input": (edited(batch_input_shape=[None, -3]), "the shape [None, -3]"),
    "no feature axis": (edited(batch_input_shape=[None]), "the shape [None]"),
    "use_bias a number": (edited(use_bias=1), "use_bias is 1"),
    "no bias": (edited(use_bias=False), "has 2 variables here, it needs kernel"),
    "no name": (layer("Sequential", name="m", layers=[layer("Dense", units=4)]), "without a name"),
    "a name too long": (edited(name="a" * 1001), "longer than 1000 characters"),
    "two layers of one name": (json.loads(json.dumps(chain([], "x", "a")).replace('"b"', '"a"')), "one name"),
    "no list of layers": (layer("Sequential", name="m"), "does not list its layers"),
    "a layer that is a number": (layer("Sequential", name="m", layers=[5]), "class_name and config"),
    "a single layer": (edited()["config"]["layers"][0], "no model"),
    "a list": ([], "class_name and config"),
    "a slope that is NaN": (edited(activation={**layer("LeakyReLU", name="l", alpha=float("nan"))}), "alpha is nan|negative_slope is nan"),
    "a cycle": (chain([], "b", "a"), "do not lead back"),
    "a source that does not exist": (chain([], "y", "a"), "do not lead back"),
    "a branch": (chain([], "x", "x"), "a stand on a branch"),
    "an output that does not exist": (chain([], "x", "a", last="y"), "do not lead back"),
    "another input layer": (chain([], "x", "a", first="a"), "do not lead back"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_documents(h5py, name, tmp_path):
    document, words = HOSTILE[name]
    path = packed(tmp_path, hdf5_of(h5py), document)
    error = attempt(path)
    assert isinstance(error, ModelFileError)
    assert any(word in str(error) for word in words.split("|")), error


TEXTS = {
    "deep JSON": ("[" * 100_000, "deeper than 32"),
    "deep models": (
        json.dumps(MODEL).replace('"name": "m"', '"name": ' + '{"a": ' * 40 + "1" + "}" * 40),
        "deeper than 32",
    ),
    "a key twice": (json.dumps(MODEL).replace('"name": "m"', '"name": "m", "name": "n"'), "twice"),
    "no JSON": ("{", "not a valid .keras file"),
    "a zero": ("\x00", "not a valid .keras file"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_hostile_text(h5py, name, tmp_path):
    text, words = TEXTS[name]
    path = packed(tmp_path, hdf5_of(h5py), text)
    assert words in str(attempt(path))


def external(h5py):
    data = io.BytesIO()
    with h5py.File(data, "w") as file:
        file.create_dataset("layers/dense/vars/0", (3, 4), "f4", external=[("/etc/passwd", 0, 48)])
        file["layers/dense/vars/1"] = BIAS
    return data.getvalue()


def linked(h5py, link):
    data = io.BytesIO()
    with h5py.File(data, "w") as file:
        file["layers/dense/vars/1"] = BIAS
        file["layers/dense/vars/0"] = link
    return data.getvalue()


WEIGHTS = {
    "external data": (external, "external|other files|another file"),
    "an external link": (lambda h5py: linked(h5py, h5py.ExternalLink("/etc/passwd", "/x")), "link"),
    "a soft link": (lambda h5py: linked(h5py, h5py.SoftLink("/layers/dense/vars/1")), "link"),
    "a missing variable": (lambda h5py: hdf5_of(h5py, KERNEL), "has 1 variables here, it needs kernel, bias"),
    "one too many": (lambda h5py: hdf5_of(h5py, KERNEL, BIAS, BIAS), "has 3 variables"),
    "another layer": (lambda h5py: hdf5_of(h5py, extra={"layers/dense_1/vars/0": BIAS}), "layers/dense_1 belong to no layer"),
    "unknown state": (lambda h5py: hdf5_of(h5py, extra={"layers/dense/more/0": BIAS}), "unknown state: more"),
    "variables of the model": (lambda h5py: hdf5_of(h5py, extra={"vars/0": BIAS}), "variables of its own"),
    "no layers": (lambda h5py: hdf5_of(h5py, root="other"), "no weights of the layers of m"),
    "another name": (lambda h5py: hdf5_of(h5py, name="dense_1"), "layers/dense_1 belong to no layer"),
    "a kernel of rank 3": (lambda h5py: hdf5_of(h5py, KERNEL[None], BIAS), "kernel has shape (1, 3, 4)"),
    "a kernel turned round": (lambda h5py: hdf5_of(h5py, KERNEL.T, BIAS), "kernel has shape (4, 3)"),
    "a bias that is too long": (lambda h5py: hdf5_of(h5py, KERNEL, np.zeros(5, "f4")), "bias has shape (5,)"),
    "integers": (lambda h5py: hdf5_of(h5py, KERNEL.astype("i8"), BIAS), "kernel is int64"),
    "no HDF5": (lambda h5py: b"hello" * 100, "HDF5"),
    "nothing": (lambda h5py: b"", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_hostile_weights(h5py, name, tmp_path):
    make, words = WEIGHTS[name]
    error = attempt(packed(tmp_path, make(h5py)))
    assert isinstance(error, ModelFileError)
    assert any(word in str(error) for word in words.split("|")), error


def test_other_hostile_archives(h5py, tmp_path):
    good = hdf5_of(h5py)
    assert not isinstance(
        attempt(packed(tmp_path, good, extra=["../../evil.py", "/etc/passwd", "a\\b"])), ModelFileError
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "model.keras"]
    with pytest.warns(UserWarning, match="Duplicate"):
        packed(tmp_path, good, extra=["config.json"])
    assert "two members of one name" in str(attempt(tmp_path / "model.keras"))
    bomb = packed(tmp_path, good, json.dumps(MODEL) + " " * 2**25, compression=zipfile.ZIP_DEFLATED)
    assert "expands" in str(attempt(bomb))
    assert "limits.metadata" in str(
        attempt(packed(tmp_path, good), limits=Limits(metadata=50))
    ) or "more than 50" in str(attempt(packed(tmp_path, good), limits=Limits(metadata=50)))
    assert "does not state keras_version" in str(attempt(packed(tmp_path, good, version=None)))
    assert "written by Keras 4.0.0" in str(attempt(packed(tmp_path, good, version="4.0.0")))
    assert "more than 0 layers" in str(attempt(packed(tmp_path, good), limits=Limits(layers=0)))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_behind_other_bytes(h5py, compression, tmp_path):
    path = packed(tmp_path, hdf5_of(h5py), compression=compression)
    net = nnfwd.load(path)
    path.write_bytes(b"before" * 100 + path.read_bytes())
    assert nnfwd.load(path) == net


def test_stored_weights_have_their_checksum_and_size(h5py, tmp_path):
    path = packed(tmp_path, hdf5_of(h5py))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(KERNEL.tobytes(), (2 * KERNEL).tobytes()))
    assert "Bad CRC-32 for file 'model.weights.h5'" in str(attempt(path))
    size = len(hdf5_of(h5py)).to_bytes(4, "little")
    assert whole.count(size * 2) == 2
    path.write_bytes(whole[::-1].replace((size * 2)[::-1], (size + bytes([1, 0, 0, 0]))[::-1], 1)[::-1])
    assert "bytes, not 1" in str(attempt(path))


def test_memory_of_one_large_tensor(h5py, tmp_path):
    """The network's copy, and the bytes it was made of; the file itself is not held."""
    kernel = np.zeros((2**10, 2**10), "f4")
    document = {"class_name": "Sequential", "config": {"name": "m", "layers": [layer("Dense", name="d", units=2**10)]}}
    path = packed(tmp_path, hdf5_of(h5py, kernel, kernel[0]), document)
    tracemalloc.start()
    try:
        nnfwd.load(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * kernel.nbytes + 2**21


def test_a_file_that_does_not_state_the_shape_of_x(h5py, tmp_path):
    entry = edited()["config"]["layers"][0]
    del entry["config"]["batch_input_shape"]
    document = {"class_name": "Sequential", "config": {"name": "m", "layers": [entry]}}
    assert nnfwd.load(packed(tmp_path, hdf5_of(h5py), document)).in_features == 3
    document["config"]["layers"] = [entry, layer("Flatten", name="f")]
    assert "f (Flatten): the file does not state the whole shape" in str(
        attempt(packed(tmp_path, hdf5_of(h5py), document))
    )
    document["config"]["build_input_shape"] = {"class_name": "__tuple__", "items": [None, 3]}
    assert len(nnfwd.load(packed(tmp_path, hdf5_of(h5py), document))) == 1


def test_many_layers_are_read_in_time(h5py, tmp_path):
    many = [{**layer("Dropout", name=f"d{i}"), "inbound_nodes": [[[f"d{i - 1}", 0, 0, {}]]]} for i in range(20_000)]
    config = {"name": "m", "layers": many, "input_layers": [["d0", 0, 0]], "output_layers": [["d19999", 0, 0]]}
    error = attempt(packed(tmp_path, hdf5_of(h5py), {"class_name": "Functional", "config": config}))
    assert "do not lead back to the input d0" in str(error)


def test_weights_only_and_architecture_only(h5py, tmp_path):
    (tmp_path / "w.h5").write_bytes(hdf5_of(h5py))
    (tmp_path / "m.json").write_text(json.dumps(MODEL))
    advice = re.escape('load("model.json", weights="...h5")')
    for name in ("w.h5", "m.json"):
        with pytest.raises(ModelFileError, match=advice):
            nnfwd.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        nnfwd.load(tmp_path / "m.json", weights=tmp_path / "none.h5")
    # What is wrong may be in either file.
    (tmp_path / "m.json").write_text(json.dumps(edited(activation="foo")))
    with pytest.raises(ModelFileError, match=r"m.json: with the weights of .*w.h5: layer dense .*activation foo"):
        nnfwd.load(tmp_path / "m.json", weights=tmp_path / "w.h5")
    (tmp_path / "m.json").write_text(json.dumps(edited(use_bias=False)))
    with pytest.raises(ModelFileError, match=r"m.json: with the weights of .*w.h5: layer dense .*2 variables here"):
        nnfwd.load(tmp_path / "m.json", weights=tmp_path / "w.h5")
    (tmp_path / "w.h5").write_bytes(b"no")
    with pytest.raises(ModelFileError, match=r"m.json: \S*w.h5: the superblock"):
        nnfwd.load(tmp_path / "m.json", weights=tmp_path / "w.h5")


def test_damaged_keras_files(h5py, tmp_path, note):
    weights = hdf5_of(h5py, libver="latest")
    survives(tmp_path, ".keras", packed(tmp_path, weights).read_bytes(), note)


def test_damaged_h5_files(h5py, tmp_path, note):
    weights = {"dense": {"kernel:0": KERNEL, "bias:0": BIAS}}
    # The old format has no checksums, and is mostly zeros: all of it in a long run.
    seed = layout(
        h5py,
        weights,
        libver="earliest" if ALL else "latest",
        model_config=json.dumps(MODEL).encode(),
        keras_version=b"2.9.0",
    )
    survives(tmp_path, ".h5", seed, note)


def mutated(value, rng, others):
    """A copy of a JSON value with one node of it replaced, left out or doubled."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return others[rng.integers(len(others))]
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = keys[rng.integers(len(keys))]
    changed = copy.copy(value)
    kind = rng.random()
    if kind < 0.1:
        del changed[key]
    elif kind < 0.2 and isinstance(value, list):
        changed.insert(key, value[key])
    else:
        changed[key] = mutated(value[key], rng, others)
    return changed


@pytest.mark.parametrize("name", ["sequential", "functional"])
def test_mutated_documents(h5py, name, tmp_path, note):
    document = {"sequential": MODEL, "functional": chain([], "x", "a")}[name]
    arrays = [KERNEL, BIAS] if name == "sequential" else [KERNEL[:, :3], BIAS[:3]]
    extra = (
        {} if name == "sequential" else {"layers/dense_1/vars/0": arrays[0][:3, :3], "layers/dense_1/vars/1": arrays[1]}
    )
    document = json.loads(json.dumps(document).replace('"units": 4', '"units": 3') if extra else json.dumps(document))
    weights = hdf5_of(h5py, *arrays, extra=extra)
    others = [
        None,
        True,
        -1,
        0,
        3,
        2**70,
        1e308,
        float("nan"),
        "",
        "relu",
        "os",
        "../x",
        "a" * 10**5,
        [],
        {},
        [[]],
        [None, 3],
        {"": 0},
    ]
    others += [document, document["config"]["layers"], layer("Lambda", name="f"), layer("Dense", name="x")]
    rng = np.random.default_rng(0)
    assert not isinstance(attempt(packed(tmp_path, weights, document)), ModelFileError)
    count = 20_000 if ALL else 500
    outcomes = [attempt(packed(tmp_path, weights, mutated(document, rng, others))) for _ in range(count)]
    note(
        f"{count} mutated {name} documents: {sum(isinstance(o, ModelFileError) for o in outcomes)} refused, no other error"
    )
    assert sum(isinstance(o, ModelFileError) for o in outcomes) > count / 2


def test_a_json_opens_its_weights_and_nothing_else(h5py, tmp_path):
    path, weights = tmp_path / "m.json", tmp_path / "w.h5"
    weights.write_bytes(hdf5_of(h5py))
    path.write_text(json.dumps(MODEL))
    nnfwd.load(path, weights=weights)
    with watched() as seen:
        nnfwd.load(path, weights=weights)
    assert set(seen) == {("open", str(path)), ("open", str(weights))}


def test_neither_keras_nor_h5py_is_imported():
    code = (
        "import os; os.environ['KERAS_BACKEND'] = 'jax'; import sys, nnfwd, nnfwd.io.keras; "
        "assert not {'keras', 'h5py', 'tensorflow', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Samples


def sample(*path):
    found = SAMPLES.joinpath(*path)
    if not found.exists():
        pytest.skip(f"no samples at {SAMPLES}")
    return found


def test_a_network_of_keras_1(h5py):
    path = sample("acasxu", "sisl_KerasTestNetwork.h5")
    net = nnfwd.load(path)
    assert [layer.activation.name for layer in net] == ["relu"] * 6 + ["identity"]
    assert (net.in_features, net.out_features, net.dtype) == (5, 5, "float32")
    with h5py.File(path) as file:
        for i, step in enumerate(net, 1):
            group = file[f"model_weights/dense_{i}"]
            np.testing.assert_array_equal(step.weight, group[f"dense_{i}_W"][()].T)
            np.testing.assert_array_equal(step.bias, group[f"dense_{i}_b"][()])


def cases():
    path = SAMPLES / "keras_js" / "parameters.json"
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.parametrize("case", cases() or ["none"])
def test_published_outputs_of_keras_2(h5py, case, tmp_path):
    stated = json.loads(sample("keras_js", "parameters.json").read_text())[case]
    data = json.loads(sample("keras_js", stated["file"]).read_text())[case]
    x, y, *weights = (
        np.array(t["data"], "f4").reshape(t["shape"])
        for t in (data["input"], data["expected"], *data.get("weights", []))
    )
    x, y = np.atleast_2d(x), np.atleast_2d(y)
    shape = {"name": "l", "batch_input_shape": [None, *x.shape[1:]]}
    name, alpha = stated["activation"], stated.get("alpha")
    if case.startswith("core"):
        own = "linear" if stated["file"] == "Activation.json" else name
        config = layer("Dense", **shape, units=2, activation=own, use_bias=len(weights) == 2)
    elif name == "thresholded_relu":
        config = layer("ThresholdedReLU", **shape, theta=stated["theta"])
    elif name == "prelu":
        config = layer("PReLU", **shape)
    elif alpha is not None:
        config = layer({"elu": "ELU", "leaky_relu": "LeakyReLU"}[name], **shape, alpha=alpha)
    elif "max_value" in stated:
        config = layer("ReLU", **shape, max_value=stated["max_value"])
    else:
        config = layer("Activation", **shape, activation=name)
    names = ["l/alpha:0"] if name == "prelu" else ["l/kernel:0", "l/bias:0"][: len(weights)]
    layers = (
        [config] if stated["file"] != "Activation.json" else [config, layer("Activation", name="a", activation=name)]
    )
    document = {"class_name": "Sequential", "config": {"name": "m", "layers": layers}}
    net = load_h5(h5py, tmp_path, document, {"l": dict(zip(names, weights, strict=True))}, "2.1.2")
    assert np.abs(net(x) - y).max() <= 1e-6 + 1e-6 * np.abs(y).max()
