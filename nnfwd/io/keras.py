"""Keras models of versions 1, 2 and 3: `.keras`, whole-model `.h5`, JSON with weights, and live models.

The architecture is a JSON document in which every object is `{"class_name": ..., "config": {...}}`; it is read as data.
Weights lie in HDF5: under `layers/<class in snake case>[_n]/vars/<i>` in Keras 3 (`keras/src/saving/saving_lib.py`),
under the names in the attributes `layer_names` and `weight_names` before it, and in its `.h5` still
(`keras/src/legacy/saving/legacy_h5_format.py`). All sources are those of https://github.com/keras-team/keras.

A setting that a file leaves out has the default of that layer's constructor, which is how Keras reads it
(https://keras.io/api/layers/); an epsilon and the size of a layer must be stated.
"""

import contextlib
import io
import json
import math
import os
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from nnfwd import activations
from nnfwd.activations import Function
from nnfwd.errors import ModelFileError, NnfwdError
from nnfwd.io import building, hdf5
from nnfwd.io.building import Builder
from nnfwd.io.reading import Archive, Given, Limits, Tensor, opened, parse_json, read_exactly
from nnfwd.layers import Dense, Parameters, leaves
from nnfwd.network import Network


def read(file: IO[bytes], given: Given) -> Network:
    """The network of a `.keras` file: a zip of metadata.json, config.json and model.weights.h5."""
    archive = Archive(file, given.limits)
    metadata = parse_json(archive.read("metadata.json", metadata=True), given.limits)
    if not isinstance(metadata, dict):
        raise ModelFileError("metadata.json is no object")
    model = _document(parse_json(archive.read("config.json", metadata=True), given.limits))
    _place_by_class(model, _weights(file, archive, given.limits))
    return _network(model, _version(_stated(metadata, "keras_version")), given.limits)


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
    model = _document(parse_json(text.encode(), given.limits))
    weights = _group(root, "model_weights")
    _place_by_name(model, weights)
    stated = root.attributes.get("keras_version", weights.attributes.get("keras_version"))
    return _network(model, _version(stated), given.limits)


def from_document(document: dict[str, Any], given: Given) -> Network:
    """The network of what `model.to_json()` writes, with the weights that `save_weights` wrote to `given.weights`."""
    model = _document(document)
    # to_json of Keras 1 and 2 states the version; that of Keras 3 does not, but the module of every class.
    stated = document.get("keras_version", "3.0" if "module" in document else None)
    if given.weights is None:
        raise ModelFileError('it holds the architecture only: write load("model.json", weights="...h5")')
    with opened(given.weights, given.limits) as file:
        root = hdf5.read(file, given.limits)
        if "model_weights" in root:
            root = _group(root, "model_weights")
        try:
            if "layer_names" in root.attributes or "layer_names0" in root.attributes:
                _place_by_name(model, root)
            else:
                _place_by_class(model, root)
            return _network(model, _version(stated), given.limits)
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
    if kind.__name__ not in _MODELS or not _is_keras(kind.__module__):
        raise ModelFileError(
            f"a {kind.__module__}.{kind.__name__} is no Sequential or functional Model of Keras: {_OWN_CLASS}"
        )
    try:
        text = json.dumps({"class_name": kind.__name__, "config": model.get_config()}, default=lambda a: a.tolist())
    except Exception as error:  # whatever the configuration of a layer of one's own raises
        raise ModelFileError(f"Keras cannot describe the model: {' '.join(str(error).split())}") from error
    limits = Limits()
    described = _document(parse_json(text.encode(), limits))
    _place_live(described, model)
    version = sys.modules[kind.__module__.split(".")[0]].__version__
    return _network(described, _version(version), limits)


_OWN_CLASS = (
    "put its layers into a keras.Sequential or a functional keras.Model (they keep their weights), or take its arrays: "
    "nnfwd.from_state_dict or Network.from_arrays, which need each kernel transposed"
)
_UNBUILT = "a model that is not built has none: call it once on an input, or model.build(shape), before that"


# The document


@dataclass(eq=False)
class _Layer:
    """A layer of the document, or a model of layers."""

    kind: str
    name: str
    config: dict[str, Any]
    variables: tuple[str, ...] = ()
    """Names of its own variables, in the order in which Keras makes them."""
    layers: "list[_Layer]" = field(default_factory=list)
    """In the order of the file, which the names of the weights follow."""
    order: "list[_Layer]" = field(default_factory=list)
    """In the order of the pass."""
    tensors: list[Tensor] = field(default_factory=list)
    """Its variables, once they are found."""

    def leaves(self) -> "Iterator[_Layer]":
        """The layers that are no models, in the order of the pass."""
        if self.kind not in _MODELS:
            yield self
        for layer in self.order:
            yield from layer.leaves()

    @property
    def given(self) -> dict[str, Tensor]:
        """Its variables by name."""
        return dict(zip(self.variables, self.tensors, strict=True))

    @property
    def has_variables(self) -> bool:
        return any(leaf.variables for leaf in self.leaves())


_MODELS = ("Sequential", "Functional", "Model")


def _is_keras(module: Any) -> bool:
    return isinstance(module, str) and module.split(".")[0] in ("keras", "tf_keras", "tensorflow")


def _class_of(entry: Any) -> tuple[str, Any]:
    """Class and configuration of a serialised object, which must be one of Keras' own."""
    if not isinstance(entry, dict) or not isinstance(entry.get("class_name"), str) or "config" not in entry:
        raise ModelFileError("a layer is described by an object with class_name and config, here is something else")
    kind = entry["class_name"]
    # Files before Keras 2.13, and its legacy .h5, state neither.
    if not _is_keras(entry.get("module", "keras")) or entry.get("registered_name") not in (None, kind):
        origin = str(entry.get("registered_name") or entry.get("module"))
        raise ModelFileError(f"{kind[:80]} ({origin[:80]}) is a layer of somebody's own: it cannot be represented")
    return kind, entry["config"]


def _document(document: Any) -> _Layer:
    model = _layer(document)
    if model.kind not in _MODELS:
        raise ModelFileError(f"a {model.kind} alone is no model")
    return model


def _layer(entry: Any) -> _Layer:
    kind, config = _class_of(entry)
    if kind in _MODELS:
        return _model(kind, config, entry)
    if kind not in _SETTINGS:
        raise ModelFileError(f"the layer {kind[:80]} cannot be represented")
    if not isinstance(config, dict):
        raise ModelFileError(f"the configuration of a {kind} is no object")
    name = _name(config.get("name"), kind)
    with _named(kind, name):
        variables = _variables(kind, config)
        for key in config:
            if key not in _SETTINGS[kind] and not _WITHOUT_EFFECT.fullmatch(key):
                raise ModelFileError(f"unknown setting {key[:80]}")
        return _Layer(kind, name, config, variables)


def _name(value: Any, kind: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 1000:
        raise ModelFileError(f"a {kind} without a name, or with one longer than 1000 characters")
    return value


@contextlib.contextmanager
def _named(kind: str, name: str) -> Iterator[None]:
    """What goes wrong inside is said of this layer."""
    try:
        yield
    except NnfwdError as error:
        raise ModelFileError(f"layer {name} ({kind}): {error}") from error


def _model(kind: str, config: Any, entry: dict[str, Any]) -> _Layer:
    settings = {"layers": config} if isinstance(config, list) else config  # a Sequential of Keras 1 is a list
    entries = settings.get("layers") if isinstance(settings, dict) else None
    if not isinstance(entries, list):
        raise ModelFileError(f"a {kind} that does not list its layers cannot be represented")
    layers = [_layer(e) for e in entries]
    name = _name(settings.get("name", entry.get("name", kind)), kind)
    if kind == "Sequential":
        order = list(layers)
        if settings.get("build_input_shape") is not None:
            order.insert(0, _Layer("InputLayer", name, {"batch_shape": settings["build_input_shape"]}))
    else:
        order = _chain(settings, entries, layers)
    return _Layer(kind, name, settings, layers=layers, order=order)


def _chain(config: dict[str, Any], entries: list[dict[str, Any]], layers: list[_Layer]) -> list[_Layer]:
    """The layers of a functional model in the order of the pass; anything but one chain is refused by name."""
    known = {layer.name: layer for layer in layers}
    if len(known) != len(layers):
        raise ModelFileError("two layers of a model have one name")
    sources = {
        layer.name: _source(layer.name, entry.get("inbound_nodes", []))
        for layer, entry in zip(layers, entries, strict=True)
    }
    first, last = (_only(config.get(key), key.replace("_", " ")) for key in ("input_layers", "output_layers"))
    order = [last]
    while order[-1] in known and (source := sources[order[-1]]) is not None and len(order) <= len(known):
        order.append(source)
    order.reverse()
    if order[0] != first or len(order) > len(known):
        raise ModelFileError(f"the layers before {last} do not lead back to the input {first}")
    beside = known.keys() - set(order)
    if beside:
        raise ModelFileError(
            f"{', '.join(sorted(beside)[:5])} stand on a branch: only a single chain can be represented"
        )
    return [known[name] for name in order]


def _only(value: Any, what: str) -> str:
    """The one layer of `["name", 0, 0]` or `[["name", 0, 0]]`."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, list) or len(value) < 3 or not isinstance(value[0], str):
        raise ModelFileError(f"{what} must be one layer: several inputs or outputs cannot be represented")
    return value[0]


def _source(name: str, nodes: Any) -> str | None:
    """Which layer a layer takes its input from; None for an input."""
    if not isinstance(nodes, list):
        raise ModelFileError(f"layer {name}: damaged inbound_nodes")
    if not nodes:
        return None
    if len(nodes) > 1:
        raise ModelFileError(f"layer {name} is used {len(nodes)} times: a shared layer cannot be represented")
    node = nodes[0]
    if isinstance(node, dict):  # Keras 3
        calls, settings = node.get("args"), node.get("kwargs", {})
        if not isinstance(calls, list) or not isinstance(settings, dict):
            raise ModelFileError(f"layer {name}: damaged inbound_nodes")
        while len(calls) == 1 and isinstance(calls[0], list):
            calls = calls[0]
        tensors = [c.get("config", {}).get("keras_history") for c in calls if isinstance(c, dict)]
    else:
        tensors = [node] if isinstance(node[0], str) else node
        settings = tensors[0][3] if len(tensors[0]) > 3 else {}
    if len(tensors) != 1:
        raise ModelFileError(f"layer {name} takes {len(tensors)} inputs: a branch cannot be represented")
    for key, value in settings.items():
        if value is not None and value is not False:
            raise ModelFileError(f"layer {name} is called with {key}={str(value)[:40]}: it cannot be represented")
    return _only(tensors, f"the input of {name}")


_REPEATED = 2**24
"""Bytes that the arrays of channels may have once they are repeated; a file need not be large to ask for more."""


def _tiled(parameters: Parameters, times: int) -> Parameters:
    return {k: _tiled(v, times) if isinstance(v, dict) else np.tile(v, times) for k, v in parameters.items()}


# What each layer states and how it is used. Settings of training have no effect here.
_WITHOUT_EFFECT = re.compile(
    "name|trainable|dtype|batch_input_shape|batch_shape|input_(shape|dtype|dim|length)"
    "|(.*_)?(init|initializer|regularizer|constraint)"
)
_RANDOM = ("rate", "p", "stddev", "sigma", "seed", "noise_shape", "data_format", "dim_ordering")
_SETTINGS: dict[str, tuple[str, ...]] = {
    "InputLayer": ("sparse", "ragged", "optional"),
    "Identity": (),
    "Dense": ("units", "output_dim", "activation", "use_bias", "bias", "quantization_config", "lora_rank"),
    "Activation": ("activation",),
    "ReLU": ("max_value", "negative_slope", "threshold"),
    "LeakyReLU": ("negative_slope", "alpha"),
    "ELU": ("alpha",),
    "PReLU": ("shared_axes",),
    "ThresholdedReLU": ("theta",),
    "Softmax": ("axis",),
    "BatchNormalization": (
        *("axis", "epsilon", "center", "scale", "mode", "momentum", "synchronized", "fused", "virtual_batch_size"),
        *("renorm", "renorm_clipping", "renorm_momentum", "adjustment"),
    ),
    "Normalization": ("axis", "mean", "variance", "invert"),
    "Rescaling": ("scale", "offset"),
    "Flatten": ("data_format",),
    "Reshape": ("target_shape",),
    "Dropout": _RANDOM,
    "GaussianDropout": _RANDOM,
    "GaussianNoise": _RANDOM,
    "AlphaDropout": _RANDOM,
    "SpatialDropout1D": _RANDOM,
    "SpatialDropout2D": _RANDOM,
    "SpatialDropout3D": _RANDOM,
    "ActivityRegularization": ("l1", "l2"),
}


def _variables(kind: str, config: dict[str, Any]) -> tuple[str, ...]:
    """A layer's variables in the order in which Keras makes them; what adds others is refused."""
    for name in ("quantization_config", "lora_rank", "renorm"):
        if config.get(name):
            raise ModelFileError(f"{name} cannot be represented")
    if kind == "Dense":
        return ("kernel", "bias") if _flag(config, "use_bias", "bias", default=True) else ("kernel",)
    if kind == "BatchNormalization":
        gamma = ("gamma",) if _flag(config, "scale", default=True) else ()
        beta = ("beta",) if _flag(config, "center", default=True) else ()
        return (*gamma, *beta, "moving_mean", "moving_variance")
    if kind == "Normalization":
        return ("mean", "variance", "count") if config.get("mean") is None else ()
    return ("alpha",) if kind == "PReLU" else ()


_REQUIRED: Any = object()


def _stated(config: Mapping[str, Any], *names: str, default: Any = _REQUIRED) -> Any:
    """A setting under the one of its names that the file has."""
    found = [name for name in names if name in config]
    if len(found) > 1:
        raise ModelFileError(f"it states both {' and '.join(found)}")
    if found:
        return config[found[0]]
    if default is _REQUIRED:
        raise ModelFileError(f"it does not state {names[0]}")
    return default


def _flag(config: Mapping[str, Any], *names: str, default: bool) -> bool:
    value = _stated(config, *names, default=default)
    if not isinstance(value, bool):
        raise ModelFileError(f"{names[0]} is {str(value)[:40]}: it must be true or false")
    return value


def _plain(value: Any) -> Any:
    """A value that Keras may have wrapped: `{"type": "ndarray", "value": ...}`, `{"class_name": "__numpy__", ...}`."""
    if isinstance(value, dict):
        wrapped = value.get("config") if value.get("class_name") in ("__numpy__", "__tensor__") else value
        return wrapped.get("value") if isinstance(wrapped, dict) else None
    return value


def _number(config: Mapping[str, Any], *names: str, default: Any = _REQUIRED) -> float:
    value = _plain(_stated(config, *names, default=default))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelFileError(f"{names[0]} is {str(value)[:40]}: it must be a number")
    return float(value)


def _shape(value: Any) -> tuple[int | None, ...]:
    """The feature axes of a shape with a batch axis; None where any length goes."""
    if isinstance(value, dict):  # {"class_name": "__tuple__" or "TensorShape", "items": [...]} of Keras 2
        value = value.get("items")
    if not isinstance(value, list) or len(value) < 2 or not all(n is None or (type(n) is int and n > 0) for n in value):
        raise ModelFileError(f"the shape {str(value)[:40]} must have a batch axis and one of features at least")
    return tuple(value[1:])


def _version(stated: Any) -> tuple[int, int]:
    """Major and minor version of the Keras that wrote a file; (0, 0) where none is stated: it is read as Keras 1."""
    found = re.match(r"(\d{1,3})\.(\d{1,3})", stated) if isinstance(stated, str) else None
    if stated is not None and (found is None or not 1 <= int(found[1]) <= 3):
        raise ModelFileError(f"written by Keras {str(stated)[:40]}: versions 1 to 3 are read")
    return (int(found[1]), int(found[2])) if found else (0, 0)


# The weights


def _group(group: hdf5.Group, path: str) -> hdf5.Group:
    found = group[path]
    if not isinstance(found, hdf5.Group):
        raise ModelFileError(f"{path} among the weights is no group")
    return found


def _dataset(group: hdf5.Group, path: str) -> Tensor:
    found = group[path]
    if not isinstance(found, hdf5.Dataset):
        raise ModelFileError(f"{path} among the weights is no array")
    return found.tensor


def _place_by_class(model: _Layer, group: hdf5.Group) -> None:
    """Finds the variables as Keras 3 saves them: each layer under its class, counted within its model.

    Keras 2.12 and 2.13 wrote another name for `layers`: `H5IOStore.get` of `keras/src/saving/saving_lib.py`.
    """
    if "vars" in group and len(list(_group(group, "vars"))):
        raise ModelFileError(f"the model {model.name} has variables of its own, which belong to no layer")
    container = next((name for name in ("layers", "_layer_checkpoint_dependencies") if name in group), None)
    if container is None:
        if model.has_variables:
            raise ModelFileError(f"no weights of the layers of {model.name}: {_UNBUILT}")
        return
    inside = _group(group, container)
    expected: dict[str, _Layer] = {}
    used: dict[str, int] = {}
    for layer in model.layers:
        name = _snake(layer.kind)
        count = used[name] = used.get(name, -1) + 1
        expected[f"{name}_{count}" if count else name] = layer
    for name in inside:
        if name not in expected and not name.startswith("input_layer"):
            raise ModelFileError(f"the weights layers/{name} belong to no layer of {model.name}")
    for name, layer in expected.items():
        if layer.kind in _MODELS:
            if layer.has_variables or name in inside:
                _place_by_class(layer, _group(inside, name))
        elif layer.variables or name in inside:
            _place_variables(layer, _group(inside, name))


def _place_variables(layer: _Layer, group: hdf5.Group) -> None:
    other = set(group) - {"vars", "seed_generator", "activation"}
    if other:
        raise ModelFileError(f"layer {layer.name} ({layer.kind}) has unknown state: {', '.join(sorted(other)[:5])}")
    inside = _group(group, "vars") if "vars" in group or layer.variables else ()
    _check_count(layer, len(list(inside)))
    layer.tensors = [_dataset(group, f"vars/{i}") for i in range(len(layer.variables))]


def _check_count(layer: _Layer, count: int) -> None:
    if count != len(layer.variables):
        needed = ", ".join(layer.variables) or "none"
        advice = "" if count else f": {_UNBUILT}"
        raise ModelFileError(f"layer {layer.name} ({layer.kind}) has {count} variables here, it needs {needed}{advice}")


def _snake(name: str) -> str:
    """As `to_snake_case` of `keras/src/utils/naming.py`: ReLU is re_lu."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _place_by_name(model: _Layer, group: hdf5.Group) -> None:
    """Finds the variables as Keras 1 and 2 save them: the layers that have any, one after the other.

    Keras goes by their order, not by their names, which change when a model is built again.
    """
    stored = [(name, _strings(_group(group, name), "weight_names")) for name in _strings(group, "layer_names")]
    stored = [(name, weights) for name, weights in stored if weights]
    layers = [layer for layer in model.layers if layer.has_variables]
    if len(stored) != len(layers):
        advice = "" if stored else f": {_UNBUILT}"
        raise ModelFileError(
            f"the file has weights of {len(stored)} layers, the model has {len(layers)} with weights{advice}"
        )
    if "top_level_model_weights" in group and _strings(_group(group, "top_level_model_weights"), "weight_names"):
        raise ModelFileError("top_level_model_weights belong to no layer")
    for layer, (name, weights) in zip(layers, stored, strict=True):
        inside = _group(group, name)
        if layer.kind in _MODELS:
            _place_nested(layer, inside, weights)
            continue
        _check_count(layer, len(weights))
        for variable, weight in zip(layer.variables, weights, strict=True):
            if not _is_called(weight, variable):
                raise ModelFileError(f"layer {layer.name} has {weight} where its {variable} is expected")
        layer.tensors = [_dataset(inside, weight) for weight in weights]


def _place_nested(model: _Layer, group: hdf5.Group, weights: list[str]) -> None:
    """The variables of a model that is a layer, by name: their order depends on what was trainable."""
    leaves = list(model.leaves())
    wanted = sum(len(leaf.variables) for leaf in leaves)
    if len(weights) != wanted:
        raise ModelFileError(f"the model {model.name} has {len(weights)} variables here, it needs {wanted}")
    named: dict[str, list[str]] = {}
    for weight in weights:
        parts = weight.removesuffix(":0").split("/")
        for key in {parts[-1], "/".join(parts[-2:])}:
            named.setdefault(key, []).append(weight)
    for leaf in leaves:
        for variable in leaf.variables:
            keys = (f"{leaf.name}/{variable}", f"{leaf.name}_{_KERAS_1.get(variable, variable)}")
            found = [weight for key in keys for weight in named.get(key, [])]
            if len(found) != 1:
                raise ModelFileError(f"{len(found)} weights of {model.name} are called {keys[0]}: one is needed")
            leaf.tensors.append(_dataset(group, found[0]))


_KERAS_1 = {
    "kernel": "W",
    "bias": "b",
    "alpha": "alphas",
    "moving_mean": "running_mean",
    "moving_variance": "running_std",
}


def _is_called(weight: str, variable: str) -> bool:
    """Whether a weight is called as a variable: `dense/kernel:0`, in Keras 3 without `:0`, in Keras 1 `dense_W`."""
    path = f"/{weight.removesuffix(':0')}"
    return path.endswith((f"/{variable}", f"_{_KERAS_1.get(variable, variable)}"))


def _strings(group: hdf5.Group, name: str) -> list[str]:
    """A list of strings in an attribute, which Keras splits into `name0`, `name1`, ... where it is long."""
    keys = [name]
    if name not in group.attributes:
        keys = []
        while f"{name}{len(keys)}" in group.attributes:
            keys.append(f"{name}{len(keys)}")
    found: list[str] = []
    for key in keys:
        value = group.attributes[key]
        if isinstance(value, np.ndarray) and value.size == 0:  # what h5py makes of an empty list
            continue
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ModelFileError(f"the attribute {key} must be a list of names")
        found += value
    return found


def _place_live(model: _Layer, live: Any) -> None:
    """The variables of the layers of a live model, by the layers' names, which are unique in it."""
    named = {layer.name: layer for layer in live.layers}
    for layer in model.layers:
        if layer.kind in _MODELS:
            _place_live(layer, named[layer.name])
        elif layer.kind != "InputLayer":
            variables = named[layer.name].weights
            _check_count(layer, len(variables))
            layer.tensors = [_live(np.asarray(variable)) for variable in variables]


def _live(array: np.ndarray) -> Tensor:
    name = array.dtype.name
    return Tensor(array.shape, name, lambda: array.astype("float32") if name == "bfloat16" else array)


# The pass


def _network(model: _Layer, version: tuple[int, int], limits: Limits) -> Network:
    steps = _Pass(version, limits)
    for layer in model.leaves():
        with _named(layer.kind, layer.name):
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


class _Pass:
    """Hands the layers to a Builder in the order of the pass, and follows the shape of x through them."""

    def __init__(self, version: tuple[int, int], limits: Limits) -> None:
        self.builder = Builder(limits)
        self.shape: tuple[int | None, ...] | None = None
        """The feature axes of x; None as long as the file has not stated them."""
        self._version = version

    def add(self, layer: _Layer) -> None:
        stated = _stated(layer.config, "batch_shape", "batch_input_shape", default=None)
        if stated is not None:
            self._meet(_shape(stated))
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
        axis = _stated(config, "axis", default=-1)
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
            kind, config = _class_of(value)
            if kind not in self._FUNCTIONS or not isinstance(config, dict):
                raise ModelFileError(f"the activation {kind} cannot be represented")
            return self._FUNCTIONS[kind](self, config)
        known = _ACTIVATIONS if self._version >= (3, 0) else _BEFORE_3
        if value is not None and (not isinstance(value, str) or value not in known):
            raise ModelFileError(f"the activation {str(value)[:40]} cannot be represented")
        return known["linear" if value is None else value]

    # Layers that are functions

    def _activation(self, config: dict[str, Any]) -> Function:
        return self._function(_stated(config, "activation"))

    def _relu(self, config: dict[str, Any]) -> Function:
        slope = _number(config, "negative_slope", default=0.0)
        threshold = _number(config, "threshold", default=0.0)
        largest = None if config.get("max_value") is None else _number(config, "max_value")
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
        return activations.leaky_relu(negative_slope=_number(config, "negative_slope", "alpha", default=0.3))

    def _elu(self, config: dict[str, Any]) -> Function:
        return activations.elu(alpha=_number(config, "alpha", default=1.0))

    def _thresholded_relu(self, config: dict[str, Any]) -> Function:
        return activations.thresholded_relu(alpha=_number(config, "theta", default=1.0))

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

    def _dense(self, layer: _Layer) -> None:
        config, given = layer.config, layer.given
        units = _stated(config, "units", "output_dim")
        if type(units) is not int:
            raise ModelFileError(f"units is {str(units)[:40]}: it must be a whole number")
        function = self._function(_stated(config, "activation", default="linear"))
        kernel = self._array("kernel", given["kernel"], self._width, units)
        bias = self._array("bias", given["bias"], units) if "bias" in given else None
        self.builder.add(Dense(kernel.T, bias, function))
        if self.shape is not None:
            self.shape = (*self.shape[:-1], units)

    def _prelu(self, layer: _Layer) -> None:
        config, given = layer.config, layer.given
        shared = _stated(config, "shared_axes", default=None) or []
        if self.shape is None or not isinstance(shared, list):
            raise ModelFileError("the file does not state the shape of x, which a PReLU needs")
        shape = [1 if i in shared else n for i, n in enumerate(self.shape, 1)]
        slope = self._along_last("alpha", self._array("alpha", given["alpha"], *shape))
        self.builder.activation(building.prelu(np.asarray(slope)))

    def _batch_normalisation(self, layer: _Layer) -> None:
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
            _number(config, "epsilon"),
            arrays.get("gamma"),
            arrays.get("beta"),
        )

    def _normalisation(self, layer: _Layer) -> None:
        """`(x - mean) / max(sqrt(variance), 1e-7)` or its inverse: `keras/src/layers/preprocessing/normalization.py`"""
        config, given = layer.config, layer.given
        axis = _stated(config, "axis", default=-1)
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
            factor = (deviation if _flag(config, "invert", default=False) else building.reciprocal(deviation)).astype(
                variance.dtype
            )
        scale, offset = self._along_last("variance", factor), self._along_last("mean", mean)
        if config.get("invert"):
            self.builder.scale(scale, shift=offset)
        else:
            self.builder.scale(scale, center=offset)

    def _rescaling(self, layer: _Layer) -> None:
        scale, offset = (self._along_last(name, self._values(layer.config, name)) for name in ("scale", "offset"))
        self.builder.scale(scale, shift=offset)

    def _values(self, config: dict[str, Any], name: str) -> np.ndarray:
        """Numbers that stand in the document, in the dtype in which the layer computes."""
        policy = config.get("dtype")
        inner = policy.get("config") if isinstance(policy, dict) else {"name": policy}
        wide = isinstance(inner, dict) and inner.get("name") == "float64"
        values = np.asarray(_plain(_stated(config, name)))
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

    def _flatten(self, layer: _Layer) -> None:
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

    def _reshape(self, layer: _Layer) -> None:
        target = _stated(layer.config, "target_shape")
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

    _LAYERS: Mapping[str, Callable[["_Pass", _Layer], None]] = {
        "Dense": _dense,
        "PReLU": _prelu,
        "BatchNormalization": _batch_normalisation,
        "Normalization": _normalisation,
        "Rescaling": _rescaling,
        "Flatten": _flatten,
        "Reshape": _reshape,
    }
