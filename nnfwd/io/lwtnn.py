"""The sequential JSON of lwtnn, the taggers of high energy physics; and Keras' JSON, which shares its extension.

https://github.com/lwtnn/lwtnn, src/parse_json.cxx (what a file may hold) and include/lwtnn/generic/Stack.tcc (what it
computes):

    {"inputs": [{"name", "offset", "scale"}, ...], "layers": [...], "outputs": [name, ...], "defaults": {...}}

An input becomes `(x + offset) * scale`, a dense layer `W x + b` with the weights flat in `(out, in)` order, W or b
left out where it is empty, a normalization `weights * (x + bias)`. All in float64. Defaults replace missing inputs
before the network; they are no part of it.
"""

from typing import IO, Any

import numpy as np

from nnfwd import activations
from nnfwd.activations import Function
from nnfwd.errors import ModelFileError, NnfwdError
from nnfwd.io.building import Builder
from nnfwd.io.reading import Given, parse_json
from nnfwd.network import Network

_ACTIVATIONS: dict[str, str | Function] = {
    "linear": "identity",
    "rectified": "relu",
    "sigmoid": "sigmoid",
    "hard_sigmoid": activations.hard_sigmoid(alpha=0.2, beta=0.5),
    "tanh": "tanh",
    "softmax": "softmax",
    "abs": activations.leaky_relu(negative_slope=-1.0),  # which is |x|, exactly
}


def read(file: IO[bytes], given: Given) -> Network:
    """The network of a `.json` file of lwtnn, or of Keras with `given.weights`.

    The names of the outputs become the network's classes where its last activation is softmax; else they are left out.
    """
    document = parse_json(file.read(given.limits.metadata + 1), given.limits)
    if not isinstance(document, dict):
        raise ModelFileError("it holds no JSON object: it must be a network of lwtnn or Keras")
    if {"class_name", "config"} <= document.keys():
        from nnfwd.io import keras

        return keras.from_document(document, given)
    given.refuse("weights")
    return _network(document, Builder(given.limits))


def _network(document: dict[str, Any], builder: Builder) -> Network:
    if not {"inputs", "layers"} & document.keys():
        raise ModelFileError("neither a network of lwtnn (inputs, layers) nor one of Keras (class_name, config)")
    for key in ("nodes", "input_sequences"):
        if key in document:
            raise ModelFileError(f"it has {key}: a graph of lwtnn, of which only the sequential networks are read")
    _keys(document, "the network", {"inputs", "layers", "outputs"}, {"defaults", "miscellaneous"})
    inputs = _list(document["inputs"], "inputs")
    for i, entry in enumerate(inputs):
        _keys(entry, f"input {i}", {"name", "offset", "scale"}, {"default"})
    if not inputs:
        raise ModelFileError("it has no inputs")
    offsets = _numbers([entry["offset"] for entry in inputs], "offsets")
    scales = _numbers([entry["scale"] for entry in inputs], "scales")
    if any(offsets != 0) or any(scales != 1):
        builder.scale(scales, center=-offsets)
    width = len(inputs)
    for i, layer in enumerate(_list(document["layers"], "layers")):
        try:
            width = _add(layer, width, builder)
        except NnfwdError as error:
            raise ModelFileError(f"layer {i}: {error}") from error
    outputs = _list(document["outputs"], "outputs")
    if len(outputs) != width or not all(isinstance(name, str) for name in outputs):
        raise ModelFileError(f"{len(outputs)} outputs do not name the {width} of the last layer")
    network = builder.network()
    if network[-1].activation.name != "softmax" or width == 1:
        return network
    return Network(network, classes=outputs)


def _add(layer: Any, width: int, builder: Builder) -> int:
    """Adds a layer that takes this width; the width it gives."""
    architecture = layer.get("architecture") if isinstance(layer, dict) else layer
    if architecture not in ("dense", "normalization"):
        raise ModelFileError(
            f"the architecture {architecture!r:.80} cannot be represented: only dense and normalization"
        )
    dense = architecture == "dense"
    _keys(layer, architecture, {"architecture", "weights", "bias"} | ({"activation"} if dense else set()), set())
    weights, bias = _numbers(layer["weights"], "weights"), _numbers(layer["bias"], "bias")
    if not dense:
        builder.scale(weights, center=-bias)
        return width
    if len(weights) % width:
        raise ModelFileError(f"{len(weights)} weights do not fit {width} inputs")
    if len(weights):
        builder.dense(weights.reshape(-1, width), bias if len(bias) else None)
        width = len(weights) // width
    elif len(bias):
        builder.scale(1.0, shift=bias)
    builder.activation(_activation(layer["activation"]))
    return width


def _activation(given: Any) -> str | Function:
    """A name; or `{"function": name, "alpha": number}`, which elu, leakyrelu and swish need."""
    if given == "elu":  # files of old converters, for which lwtnn assumes this alpha
        given = {"function": "elu", "alpha": 1.0}
    if isinstance(given, str) and given in _ACTIVATIONS:
        return _ACTIVATIONS[given]
    if isinstance(given, dict):
        _keys(given, "the activation", {"function", "alpha"}, set())
        alpha = float(_numbers([given["alpha"]], "alpha")[0])
        if given["function"] == "elu":
            return activations.elu(alpha=alpha)
        if given["function"] == "leakyrelu":
            return activations.leaky_relu(negative_slope=alpha)
        if given["function"] == "swish" and alpha == 1:
            return "silu"
    raise ModelFileError(f"the activation {given!r:.80} is unknown, or stated without its alpha")


def _keys(found: Any, what: str, needed: set[str], allowed: set[str]) -> None:
    """Raises `ModelFileError` unless an object has just these keys."""
    if not isinstance(found, dict):
        raise ModelFileError(f"{what} is no JSON object")
    if missing := needed - found.keys():
        raise ModelFileError(f"{what} has no {min(missing)}")
    if unknown := found.keys() - needed - allowed:
        raise ModelFileError(f"{what} has an unknown {min(unknown)}")


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ModelFileError(f"{what} must be a list")
    return value


def _numbers(value: Any, what: str) -> np.ndarray:
    """A list of numbers in float64; NaN and Infinity as Python's json writes them are kept."""
    if not all(type(number) in (int, float) for number in _list(value, what)):
        raise ModelFileError(f"{what} must be a list of numbers")
    return np.array(value, dtype="float64")
