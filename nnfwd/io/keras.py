"""Keras models of versions 1, 2 and 3: `.keras`, whole-model `.h5`, JSON with weights, and live models.

The architecture is a JSON document in which every object is `{"class_name": ..., "config": {...}}`; it is read as data.
Weights lie in HDF5: under `layers/<class in snake case>[_n]/vars/<i>` in Keras 3 (`keras/src/saving/saving_lib.py`),
under the names in the attributes `layer_names` and `weight_names` before it, and in its `.h5` still
(`keras/src/legacy/saving/legacy_h5_format.py`). All sources are those of https://github.com/keras-team/keras.

A setting that a file leaves out has the default of that layer's constructor, which is how Keras reads it
(https://keras.io/api/layers/); an epsilon and the size of a layer must be stated.
"""

import io
import json
import math
import os
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from nnfwd import activations
from nnfwd.activations import Function
from nnfwd.errors import ModelFileError, NnfwdError
from nnfwd.io import building, hdf5
from nnfwd.io.building import Builder
from nnfwd.io.keras_document import (
    MODELS,
    KerasLayer,
    class_of,
    flag,
    is_keras,
    naming,
    number,
    parse_document,
    plain_value,
    setting,
    shape_of,
    version_of,
)
from nnfwd.io.keras_weights import place_by_class, place_by_name, place_live, subgroup
from nnfwd.io.reading import Archive, Given, Limits, Tensor, opened, parse_json, read_exactly
from nnfwd.layers import Dense, Parameters, leaves
from nnfwd.network import Network


def read(file: IO[bytes], given: Given) -> Network:
    """The network of a `.keras` file: a zip of metadata.json, config.json and model.weights.h5."""
    archive = Archive(file, given.limits)
    metadata = parse_json(archive.read("metadata.json", metadata=True), given.limits)
    if not isinstance(metadata, dict):
        raise ModelFileError("metadata.json is no object")
    model = parse_document(parse_json(archive.read("config.json", metadata=True), given.limits))
    place_by_class(model, _weights(file, archive, given.limits))
    return _network(model, version_of(setting(metadata, "keras_version")), given.limits)


def _weights(file: IO[bytes], archive: Archive, limits: Limits) -> hdf5.Group:
    """Those of a `.keras` file: read in place where they are not compressed, which Keras does not."""
    name = "model.weights.h5"
    info = archive.find(name)
    if info.compress_type != zipfile.ZIP_STORED:
        return hdf5.read(io.BytesIO(archive.read(name)), limits)
    if info.file_size != info.compress_size:
        raise ModelFileError(f"{name} has {info.compress_size} bytes, not {info.file_size}")
    with archive.open(name) as stream:
        while stream.read(2**20):  # to the end, where its checksum is compared
            pass
    # Before the data: 30 bytes, of which the last 4 say how long the name and an extra field after them are.
    # https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7
    file.seek(info.header_offset + 26)
    name_size, extra_size = struct.unpack("<HH", read_exactly(file, 4, name))
    return hdf5.read(file, limits, start=info.header_offset + 30 + name_size + extra_size, size=info.file_size)


def read_h5(file: IO[bytes], given: Given) -> Network:
    """The network of a whole model in HDF5, of Keras 1 and 2, and of Keras 3 when asked for `.h5`."""
    root = hdf5.read(file, given.limits)
    text = root.attributes.get("model_config")
    if not isinstance(text, str):
        raise ModelFileError(
            'it holds weights only: write load("model.json", weights="...h5"), the JSON from model.to_json(); '
            f"if the model is of a class of one's own, {_OWN_CLASS}"
        )
    model = parse_document(parse_json(text.encode(), given.limits))
    weights = subgroup(root, "model_weights")
    place_by_name(model, weights)
    stated = root.attributes.get("keras_version", weights.attributes.get("keras_version"))
    return _network(model, version_of(stated), given.limits)


def from_document(document: dict[str, Any], given: Given) -> Network:
    """The network of what `model.to_json()` writes, with the weights that `save_weights` wrote to `given.weights`."""
    model = parse_document(document)
    # to_json of Keras 1 and 2 states the version; that of Keras 3 does not, but the module of every class.
    stated = document.get("keras_version", "3.0" if "module" in document else None)
    if given.weights is None:
        raise ModelFileError('it holds the architecture only: write load("model.json", weights="...h5")')
    with opened(given.weights, given.limits) as file:
        root = hdf5.read(file, given.limits)
        if "model_weights" in root:
            root = subgroup(root, "model_weights")
        try:
            if "layer_names" in root.attributes or "layer_names0" in root.attributes:
                place_by_name(model, root)
            else:
                place_by_class(model, root)
            return _network(model, version_of(stated), given.limits)
        except NnfwdError as error:
            wrong = error
    # Either file may be the wrong one: `opened` would name the weights alone.
    raise ModelFileError(f"with the weights of {given.weights}: {wrong}") from wrong


def from_keras(model: Any, /) -> Network:
    """The network of a live Keras model, a `Sequential` or a functional `Model` that is one chain.

    The weights are copied to NumPy. Keras is not imported.

    Raises:
        ModelFileError: for something else than such a model, one that is not built yet, or one that holds what cannot
            be represented, by name.
    """
    kind = type(model)
    if isinstance(model, str | os.PathLike):
        raise ModelFileError(f"from_keras takes a live model: write nnfwd.load({str(model)[:80]!r})")
    if kind.__name__ not in MODELS or not is_keras(kind.__module__):
        raise ModelFileError(
            f"a {kind.__module__}.{kind.__name__} is no Sequential or functional Model of Keras: {_OWN_CLASS}"
        )
    try:
        text = json.dumps({"class_name": kind.__name__, "config": model.get_config()}, default=lambda a: a.tolist())
    except Exception as error:  # whatever the configuration of a layer of one's own raises
        raise ModelFileError(f"Keras cannot describe the model: {' '.join(str(error).split())}") from error
    limits = Limits()
    described = parse_document(parse_json(text.encode(), limits))
    place_live(described, model)
    version = sys.modules[kind.__module__.split(".")[0]].__version__
    return _network(described, version_of(version), limits)


_OWN_CLASS = (
    "put its layers into a keras.Sequential or a functional keras.Model (they keep their weights), or take its arrays: "
    "nnfwd.from_state_dict or Network.from_arrays, which need each kernel transposed"
)


def _network(model: KerasLayer, version: tuple[int, int], limits: Limits) -> Network:
    steps = _Pass(version, limits)
    for layer in model.leaves():
        with naming(layer.kind, layer.name):
            steps.add(layer)
    return steps.builder.network()


# What each name computes; https://keras.io/api/layers/activations/, with the defaults of the functions there.
_ACTIVATIONS: dict[str, Function] = {
    "celu": activations.celu(alpha=1.0),
    "elu": activations.elu(alpha=1.0),
    "exponential": activations.exp,
    "gelu": activations.gelu,
    "hard_sigmoid": activations.hard_sigmoid(alpha=1 / 6, beta=0.5),
    "hard_silu": activations.hard_silu,
    "hard_swish": activations.hard_silu,
    "hard_tanh": activations.hard_tanh,
    "leaky_relu": activations.leaky_relu(negative_slope=0.2),
    "linear": activations.identity,
    "log_sigmoid": activations.log_sigmoid,
    "log_softmax": activations.log_softmax,
    "mish": activations.mish,
    "relu": activations.relu,
    "relu6": activations.relu6,
    "selu": activations.selu,
    "sigmoid": activations.sigmoid,
    "silu": activations.silu,
    "softmax": activations.softmax,
    "softplus": activations.softplus,
    "softsign": activations.softsign,
    "sparse_sigmoid": activations.hard_sigmoid(alpha=0.5, beta=0.5),
    "swish": activations.silu,
    "tanh": activations.tanh,
}
# hard_sigmoid of Keras 1 and 2: https://github.com/keras-team/tf-keras/blob/master/tf_keras/activations.py
_BEFORE_3 = _ACTIVATIONS | {"hard_sigmoid": activations.hard_sigmoid(alpha=0.2, beta=0.5)}


_REPEATED = 2**24
"""Bytes that the arrays of channels may have once they are repeated; a file need not be large to ask for more."""


def _tiled(parameters: Parameters, times: int) -> Parameters:
    return {k: _tiled(v, times) if isinstance(v, dict) else np.tile(v, times) for k, v in parameters.items()}


class _Pass:
    """Hands the layers to a Builder in the order of the pass, and follows the shape of x through them."""

    def __init__(self, version: tuple[int, int], limits: Limits) -> None:
        self.builder = Builder(limits)
        self.shape: tuple[int | None, ...] | None = None
        """The feature axes of x; None as long as the file has not stated them."""
        self._version = version

    def add(self, layer: KerasLayer) -> None:
        stated = setting(layer.config, "batch_shape", "batch_input_shape", default=None)
        if stated is not None:
            self._meet(shape_of(stated))
        if layer.kind in self._FUNCTIONS:
            self.builder.activation(self._FUNCTIONS[layer.kind](self, layer.config))
        elif layer.kind in self._LAYERS:
            self._LAYERS[layer.kind](self, layer)

    def _meet(self, stated: tuple[int | None, ...]) -> None:
        shape = self.shape or stated
        if len(shape) != len(stated) or any(a != b for a, b in zip(shape, stated, strict=True) if a and b):
            raise ModelFileError(f"it takes x {('batch', *stated)}, here x is {('batch', *shape)}")
        self.shape = tuple(a or b for a, b in zip(shape, stated, strict=True))

    @property
    def _width(self) -> int | None:
        return self.shape[-1] if self.shape else None

    def _is_last(self, axis: Any) -> bool:
        """Whether an axis, which may stand in a list, is that of the features; the batch axis is counted."""
        if isinstance(axis, list) and len(axis) == 1:
            axis = axis[0]
        return type(axis) is int and (axis == -1 or (self.shape is not None and axis == len(self.shape)))

    def _check_axis(self, config: dict[str, Any]) -> None:
        axis = setting(config, "axis", default=-1)
        if not self._is_last(axis):
            raise ModelFileError(f"axis {str(axis)[:40]} is not the last one: it cannot be represented")

    def _array(self, name: str, tensor: Tensor, *shape: int | None) -> np.ndarray:
        """A variable, its dtype and shape compared before it is read; None in the shape is any length."""
        if len(tensor.shape) != len(shape) or any(n not in (m, None) for m, n in zip(tensor.shape, shape, strict=True)):
            needed = ", ".join("any" if n is None else str(n) for n in shape)
            raise ModelFileError(f"{name} has shape {tensor.shape}, it must be ({needed})")
        return tensor.weights(name)

    def _function(self, value: Any) -> Function:
        """An activation, given by name or as a serialised function or layer."""
        if isinstance(value, dict) and value.get("class_name") == "function":
            name = value.get("config")
            if value.get("module") != "keras.activations" or value.get("registered_name") not in (None, name):
                raise ModelFileError(f"the activation {str(name)[:40]} is a function of somebody's own")
            value = name
        if isinstance(value, dict) and value.get("class_name", "__lambda__") == "__lambda__":  # which 3.15 leaves out
            raise ModelFileError("its activation is a lambda, which cannot be represented: name one of Keras' own")
        if isinstance(value, dict):
            kind, config = class_of(value)
            if kind not in self._FUNCTIONS or not isinstance(config, dict):
                raise ModelFileError(f"the activation {kind} cannot be represented")
            return self._FUNCTIONS[kind](self, config)
        known = _ACTIVATIONS if self._version >= (3, 0) else _BEFORE_3
        if value is not None and (not isinstance(value, str) or value not in known):
            raise ModelFileError(f"the activation {str(value)[:40]} cannot be represented")
        return known["linear" if value is None else value]

    # Layers that are functions

    def _activation(self, config: dict[str, Any]) -> Function:
        return self._function(setting(config, "activation"))

    def _relu(self, config: dict[str, Any]) -> Function:
        slope = number(config, "negative_slope", default=0.0)
        threshold = number(config, "threshold", default=0.0)
        largest = None if config.get("max_value") is None else number(config, "max_value")
        stated = [slope != 0, threshold != 0, largest is not None]
        if sum(stated) > 1:
            raise ModelFileError(
                f"negative_slope {slope}, threshold {threshold} and max_value {largest} together cannot be represented"
            )
        if slope:
            return activations.leaky_relu(negative_slope=slope)
        if threshold:
            return activations.thresholded_relu(alpha=threshold)
        return building.clip(0.0, math.inf if largest is None else largest)

    def _leaky_relu(self, config: dict[str, Any]) -> Function:
        return activations.leaky_relu(negative_slope=number(config, "negative_slope", "alpha", default=0.3))

    def _elu(self, config: dict[str, Any]) -> Function:
        return activations.elu(alpha=number(config, "alpha", default=1.0))

    def _thresholded_relu(self, config: dict[str, Any]) -> Function:
        return activations.thresholded_relu(alpha=number(config, "theta", default=1.0))

    def _softmax(self, config: dict[str, Any]) -> Function:
        self._check_axis(config)
        return activations.softmax

    _FUNCTIONS: Mapping[str, Callable[["_Pass", dict[str, Any]], Function]] = {
        "Activation": _activation,
        "ReLU": _relu,
        "LeakyReLU": _leaky_relu,
        "ELU": _elu,
        "ThresholdedReLU": _thresholded_relu,
        "Softmax": _softmax,
    }

    # Layers with variables, and those that change the shape

    def _dense(self, layer: KerasLayer) -> None:
        config, given = layer.config, layer.given
        units = setting(config, "units", "output_dim")
        if type(units) is not int:
            raise ModelFileError(f"units is {str(units)[:40]}: it must be a whole number")
        function = self._function(setting(config, "activation", default="linear"))
        kernel = self._array("kernel", given["kernel"], self._width, units)
        bias = self._array("bias", given["bias"], units) if "bias" in given else None
        self.builder.add(Dense(kernel.T, bias, function))
        if self.shape is not None:
            self.shape = (*self.shape[:-1], units)

    def _prelu(self, layer: KerasLayer) -> None:
        config, given = layer.config, layer.given
        shared = setting(config, "shared_axes", default=None) or []
        if self.shape is None or not isinstance(shared, list):
            raise ModelFileError("the file does not state the shape of x, which a PReLU needs")
        shape = [1 if i in shared else n for i, n in enumerate(self.shape, 1)]
        slope = self._along_last("alpha", self._array("alpha", given["alpha"], *shape))
        self.builder.activation(building.prelu(np.asarray(slope)))

    def _batch_normalisation(self, layer: KerasLayer) -> None:
        config, given = layer.config, layer.given
        self._check_axis(config)
        if config.get("mode", 0) != 0:
            raise ModelFileError(f"mode {str(config['mode'])[:40]} cannot be represented")
        if self._version == (0, 0):
            raise ModelFileError(
                "the file does not state keras_version, without which the meaning of its variance (before Keras 1.2 "
                "running_std) is not known: load and save the model with the Keras that wrote it"
            )
        if self._version < (1, 2):
            # Its running_std was a standard deviation in 1.0, and a variance in 1.2, as in everything since.
            raise ModelFileError("before Keras 1.2 its running_std has two meanings: load and save it with Keras 2")
        arrays = {name: self._array(name, tensor, self._width) for name, tensor in given.items()}
        self.builder.batch_normalisation(
            arrays["moving_mean"],
            arrays["moving_variance"],
            number(config, "epsilon"),
            arrays.get("gamma"),
            arrays.get("beta"),
        )

    def _normalisation(self, layer: KerasLayer) -> None:
        """`(x - mean) / max(sqrt(variance), 1e-7)` or its inverse: `keras/src/layers/preprocessing/normalization.py`"""
        config, given = layer.config, layer.given
        axis = setting(config, "axis", default=-1)
        whole = axis is None or axis == []
        if not whole:
            self._check_axis(config)
        if given:
            shape = () if whole else (self._width,)
            mean, variance = (self._array(name, given[name], *shape) for name in ("mean", "variance"))
        else:
            mean, variance = (self._values(config, name) for name in ("mean", "variance"))
        with np.errstate(all="ignore"):
            deviation = np.maximum(np.sqrt(variance.astype("float64")), 1e-7)
            factor = (deviation if flag(config, "invert", default=False) else building.reciprocal(deviation)).astype(
                variance.dtype
            )
        scale, offset = self._along_last("variance", factor), self._along_last("mean", mean)
        if config.get("invert"):
            self.builder.scale(scale, shift=offset)
        else:
            self.builder.scale(scale, center=offset)

    def _rescaling(self, layer: KerasLayer) -> None:
        scale, offset = (self._along_last(name, self._values(layer.config, name)) for name in ("scale", "offset"))
        self.builder.scale(scale, shift=offset)

    def _values(self, config: dict[str, Any], name: str) -> np.ndarray:
        """Numbers that stand in the document, in the dtype in which the layer computes."""
        policy = config.get("dtype")
        inner = policy.get("config") if isinstance(policy, dict) else {"name": policy}
        wide = isinstance(inner, dict) and inner.get("name") == "float64"
        values = np.asarray(plain_value(setting(config, name)))
        if values.dtype.kind not in "iuf":
            raise ModelFileError(f"{name} must be numbers")
        return values.astype("float32" if values.ndim and not wide else "float64")

    def _along_last(self, name: str, values: np.ndarray) -> Any:
        """One value a feature, or a number; what varies along another axis is refused."""
        if any(n != 1 for n in values.shape[:-1]):
            raise ModelFileError(f"{name} {values.shape} differs along another axis than the last: flatten x before")
        if values.size == 1:
            return float(values.reshape(()))
        if self._width not in (None, values.size):
            raise ModelFileError(f"{name} {values.shape} does not fit x {('batch', *(self.shape or ()))}")
        return values.reshape(-1)

    def _flatten(self, layer: KerasLayer) -> None:
        if self.shape is None or None in self.shape:
            raise ModelFileError("the file does not state the whole shape of x, which is needed here")
        if len(self.shape) == 1:
            return
        if layer.config.get("data_format") == "channels_first":
            raise ModelFileError("channels_first reorders x: it cannot be represented")
        # What treats every element alike, or every channel, may stand before it.
        if any(isinstance(x, Dense) or x.activation.name.endswith("softmax") for x in self.builder.layers):
            raise ModelFileError(
                f"x {('batch', *self.shape)} can only be flattened before the first Dense or Softmax: put Flatten first"
            )
        shape = tuple(n for n in self.shape if n is not None)
        self._repeat(math.prod(shape[:-1]))
        self.builder.input_shape = shape
        self.shape = (math.prod(shape),)

    def _repeat(self, times: int) -> None:
        """Repeats the arrays of each channel for every place, channels being the last axis."""
        layers = self.builder.layers
        size = times * sum(a.nbytes for x in layers for a in leaves(x.parameters))
        if size > _REPEATED:
            raise ModelFileError(f"what stands before it would have {size} bytes for every element: put Flatten first")
        self.builder.layers = [x if x.in_features is None else x.renew(_tiled(x.parameters, times)) for x in layers]

    def _reshape(self, layer: KerasLayer) -> None:
        target = setting(layer.config, "target_shape")
        if not isinstance(target, list) or not all(type(n) is int for n in target):
            raise ModelFileError(f"target_shape is {str(target)[:40]}")
        if self.shape is None or None in self.shape:
            raise ModelFileError("the file does not state the whole shape of x, which is needed here")
        if target.count(-1) == 1:
            rest = -math.prod(target)
            target = [math.prod(self.shape) // rest if n == -1 and rest else n for n in target]  # type: ignore[arg-type]
        if tuple(target) == self.shape:
            return
        if target != [math.prod(self.shape)]:  # type: ignore[arg-type]
            raise ModelFileError(f"x {('batch', *self.shape)} to {('batch', *target)}: only a flattening is read")
        self._flatten(layer)

    _LAYERS: Mapping[str, Callable[["_Pass", KerasLayer], None]] = {
        "Dense": _dense,
        "PReLU": _prelu,
        "BatchNormalization": _batch_normalisation,
        "Normalization": _normalisation,
        "Rescaling": _rescaling,
        "Flatten": _flatten,
        "Reshape": _reshape,
    }
