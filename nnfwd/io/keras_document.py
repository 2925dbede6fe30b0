"""The architecture of a Keras model, of versions 1, 2 and 3: a JSON document as layers in the order of the pass.

Every object is `{"class_name": ..., "config": {...}}`; it is read as data. A setting that a file leaves out has the
default of that layer's constructor, which is how Keras reads it (https://keras.io/api/layers/); an epsilon and the size
of a layer must be stated.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nnfwd.errors import ModelFileError, NnfwdError
from nnfwd.io.reading import Tensor

UNBUILT = "a model that is not built has none: call it once on an input, or model.build(shape), before that"


@dataclass(eq=False)
class KerasLayer:
    """A layer of the document, or a model of layers."""

    kind: str
    name: str
    config: dict[str, Any]
    variables: tuple[str, ...] = ()
    """Names of its own variables, in the order in which Keras makes them."""
    layers: "list[KerasLayer]" = field(default_factory=list)
    """In the order of the file, which the names of the weights follow."""
    order: "list[KerasLayer]" = field(default_factory=list)
    """In the order of the pass."""
    tensors: list[Tensor] = field(default_factory=list)
    """Its variables, once they are found."""

    def leaves(self) -> "Iterator[KerasLayer]":
        """The layers that are no models, in the order of the pass."""
        if self.kind not in MODELS:
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


MODELS = ("Sequential", "Functional", "Model")


def is_keras(module: Any) -> bool:
    """Whether a module's name is one of Keras' own."""
    return isinstance(module, str) and module.split(".")[0] in ("keras", "tf_keras", "tensorflow")


def class_of(entry: Any) -> tuple[str, Any]:
    """Class and configuration of a serialised object, which must be one of Keras' own."""
    if not isinstance(entry, dict) or not isinstance(entry.get("class_name"), str) or "config" not in entry:
        raise ModelFileError("a layer is described by an object with class_name and config, here is something else")
    kind = entry["class_name"]
    # Files before Keras 2.13, and its legacy .h5, state neither.
    if not is_keras(entry.get("module", "keras")) or entry.get("registered_name") not in (None, kind):
        origin = str(entry.get("registered_name") or entry.get("module"))
        raise ModelFileError(f"{kind[:80]} ({origin[:80]}) is a layer of somebody's own: it cannot be represented")
    return kind, entry["config"]


def parse_document(document: Any) -> KerasLayer:
    """The model that a JSON document describes, its layers without their weights yet."""
    model = _layer(document)
    if model.kind not in MODELS:
        raise ModelFileError(f"a {model.kind} alone is no model")
    return model


def _layer(entry: Any) -> KerasLayer:
    kind, config = class_of(entry)
    if kind in MODELS:
        return _model(kind, config, entry)
    if kind not in _SETTINGS:
        raise ModelFileError(f"the layer {kind[:80]} cannot be represented")
    if not isinstance(config, dict):
        raise ModelFileError(f"the configuration of a {kind} is no object")
    name = _name(config.get("name"), kind)
    with naming(kind, name):
        variables = _variables(kind, config)
        for key in config:
            if key not in _SETTINGS[kind] and not _WITHOUT_EFFECT.fullmatch(key):
                raise ModelFileError(f"unknown setting {key[:80]}")
        return KerasLayer(kind, name, config, variables)


def _name(value: Any, kind: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 1000:
        raise ModelFileError(f"a {kind} without a name, or with one longer than 1000 characters")
    return value


@contextlib.contextmanager
def naming(kind: str, name: str) -> Iterator[None]:
    """What goes wrong inside is said of this layer."""
    try:
        yield
    except NnfwdError as error:
        raise ModelFileError(f"layer {name} ({kind}): {error}") from error


def _model(kind: str, config: Any, entry: dict[str, Any]) -> KerasLayer:
    settings = {"layers": config} if isinstance(config, list) else config  # a Sequential of Keras 1 is a list
    entries = settings.get("layers") if isinstance(settings, dict) else None
    if not isinstance(entries, list):
        raise ModelFileError(f"a {kind} that does not list its layers cannot be represented")
    layers = [_layer(e) for e in entries]
    name = _name(settings.get("name", entry.get("name", kind)), kind)
    if kind == "Sequential":
        order = list(layers)
        if settings.get("build_input_shape") is not None:
            order.insert(0, KerasLayer("InputLayer", name, {"batch_shape": settings["build_input_shape"]}))
    else:
        order = _chain(settings, entries, layers)
    return KerasLayer(kind, name, settings, layers=layers, order=order)


def _chain(config: dict[str, Any], entries: list[dict[str, Any]], layers: list[KerasLayer]) -> list[KerasLayer]:
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
        return ("kernel", "bias") if flag(config, "use_bias", "bias", default=True) else ("kernel",)
    if kind == "BatchNormalization":
        gamma = ("gamma",) if flag(config, "scale", default=True) else ()
        beta = ("beta",) if flag(config, "center", default=True) else ()
        return (*gamma, *beta, "moving_mean", "moving_variance")
    if kind == "Normalization":
        return ("mean", "variance", "count") if config.get("mean") is None else ()
    return ("alpha",) if kind == "PReLU" else ()


_REQUIRED: Any = object()


def setting(config: Mapping[str, Any], *names: str, default: Any = _REQUIRED) -> Any:
    """A setting under the one of its names that the file has."""
    found = [name for name in names if name in config]
    if len(found) > 1:
        raise ModelFileError(f"it states both {' and '.join(found)}")
    if found:
        return config[found[0]]
    if default is _REQUIRED:
        raise ModelFileError(f"it does not state {names[0]}")
    return default


def flag(config: Mapping[str, Any], *names: str, default: bool) -> bool:
    """A setting that is true or false, under the first of these names that is there."""
    value = setting(config, *names, default=default)
    if not isinstance(value, bool):
        raise ModelFileError(f"{names[0]} is {str(value)[:40]}: it must be true or false")
    return value


def plain_value(value: Any) -> Any:
    """A value that Keras may have wrapped: `{"type": "ndarray", "value": ...}`, `{"class_name": "__numpy__", ...}`."""
    if isinstance(value, dict):
        wrapped = value.get("config") if value.get("class_name") in ("__numpy__", "__tensor__") else value
        return wrapped.get("value") if isinstance(wrapped, dict) else None
    return value


def number(config: Mapping[str, Any], *names: str, default: Any = _REQUIRED) -> float:
    """A setting that is a finite number, under the first of these names that is there."""
    value = plain_value(setting(config, *names, default=default))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelFileError(f"{names[0]} is {str(value)[:40]}: it must be a number")
    return float(value)


def shape_of(value: Any) -> tuple[int | None, ...]:
    """The feature axes of a shape with a batch axis; None where any length goes."""
    if isinstance(value, dict):  # {"class_name": "__tuple__" or "TensorShape", "items": [...]} of Keras 2
        value = value.get("items")
    if not isinstance(value, list) or len(value) < 2 or not all(n is None or (type(n) is int and n > 0) for n in value):
        raise ModelFileError(f"the shape {str(value)[:40]} must have a batch axis and one of features at least")
    return tuple(value[1:])


def version_of(stated: Any) -> tuple[int, int]:
    """Major and minor version of the Keras that wrote a file; (0, 0) where none is stated: it is read as Keras 1."""
    found = re.match(r"(\d{1,3})\.(\d{1,3})", stated) if isinstance(stated, str) else None
    if stated is not None and (found is None or not 1 <= int(found[1]) <= 3):
        raise ModelFileError(f"written by Keras {str(stated)[:40]}: versions 1 to 3 are read")
    return (int(found[1]), int(found[2])) if found else (0, 0)
