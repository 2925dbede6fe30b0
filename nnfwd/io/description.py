"""The layers of a network as JSON, beside their arrays: what `.npz`, `.safetensors` and `.onnx` files of ours carry.

    {"format": 1, "layers": [{"type": "dense", "activation": {"name": "leaky_relu", "negative_slope": 0.2},
     "weight": null, "bias": null}, ...], "classes": ["cat", "dog"], "input_shape": [28, 28]}

Numbers stand there; an array has null there, and its key is `layers.{i}.weight`, `.bias`, `.scale`, `.center`, `.shift`
or `.activation.{parameter}`.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nnfwd import activations
from nnfwd.errors import ModelFileError
from nnfwd.io.building import Builder
from nnfwd.io.reading import Limits, Tensor, parse_json
from nnfwd.layers import Activation, Dense, Layer, Scale, to_numpy
from nnfwd.network import Network
from nnfwd.placement import dtype_name

_FORMAT = 1
_TYPES: dict[str, Any] = {"dense": Dense, "scale": Scale, "activation": Activation}


def describe(network: Network, /) -> tuple[str, dict[str, np.ndarray]]:
    """The JSON text of a network, and its arrays by their keys.

    Raises `ModelFileError` for a callable of the caller's, and for bfloat16, which NumPy does not have.
    """
    arrays: dict[str, np.ndarray] = {}
    document: dict[str, Any] = {
        "format": _FORMAT,
        "layers": [_described(layer, i, arrays) for i, layer in enumerate(network)],
    }
    if network.classes is not None:
        document["classes"] = list(network.classes)
    if network.input_shape is not None:
        document["input_shape"] = list(network.input_shape)
    return json.dumps(document), arrays


def _described(layer: Layer, i: int, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    key = f"layers.{i}"
    function = layer.activation
    if not function.is_named:
        raise ModelFileError(f"layer {i}: the activation {function.name} is a callable, which no file can hold")

    def put(values: dict[str, Any], key: str) -> dict[str, Any]:
        for name, value in values.items():
            if dtype_name(value.dtype) == "bfloat16":
                raise ModelFileError(f"{key}.{name} is bfloat16: write network.to(dtype='float32') first")
            arrays[f"{key}.{name}"] = to_numpy(value)
        return dict.fromkeys(values)

    numbers, own = layer.scalars, layer.parameters
    inside = numbers.pop("activation", {}), own.pop("activation", {})
    settings = {"name": function.name} | inside[0] | put(inside[1], f"{key}.activation")
    return {"type": type(layer).__name__.lower(), "activation": settings} | numbers | put(own, key)


def network(text: bytes, tensors: Mapping[str, Tensor], limits: Limits) -> Network:
    """The network of a description and the plans of its arrays, each of which must belong to one layer."""
    left = dict(tensors)

    def fetch(key: str) -> np.ndarray:
        if key not in left:
            raise ModelFileError(f"{key} is missing")
        return left.pop(key).weights(key)

    found = parse(text, fetch, limits)
    if left:
        raise ModelFileError(f"{', '.join(sorted(left)[:5])} belong to no layer")
    return found


def parse(text: bytes, fetch: Callable[[str], np.ndarray], limits: Limits) -> Network:
    """The network of a description; `fetch` gives the array of a key, or raises.

    Raises `ModelFileError` for whatever is wrong with it.
    """
    document = parse_json(text, limits)
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ModelFileError(f"written in another format than {_FORMAT}: update nnfwd")
    unknown = document.keys() - {"format", "layers", "classes", "input_shape"}
    if unknown:
        raise ModelFileError(f"unknown entry {min(unknown)}: update nnfwd")
    described = document.get("layers")
    if not isinstance(described, list) or not described:
        raise ModelFileError("no layers are described")
    builder = Builder(limits)
    for i, entry in enumerate(described):
        builder.add(_layer(entry, i, fetch))
    for name in ("classes", "input_shape"):
        value = document.get(name)
        if value is not None and not isinstance(value, list):
            raise ModelFileError(f"{name} is {value!r}: it must be a list")
        setattr(builder, name, value)
    return builder.network()


def _layer(entry: Any, i: int, fetch: Callable[[str], np.ndarray]) -> Layer:
    key = f"layers.{i}"
    if not isinstance(entry, dict) or not isinstance(entry.get("activation"), dict):
        raise ModelFileError(f"layer {i}: it must have a type and an activation")
    kind, settings = entry.pop("type", None), entry.pop("activation")
    if kind not in _TYPES:
        raise ModelFileError(f"layer {i}: unknown type {kind!r}: there are {', '.join(_TYPES)}")
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise ModelFileError(f"layer {i}: the activation's name is {name!r}")

    def values(given: dict[str, Any], key: str) -> dict[str, Any]:
        return {name: _value(value, f"{key}.{name}", fetch) for name, value in given.items()}

    function = activations.named(name)
    if missing := function.parameters.keys() - settings.keys():
        raise ModelFileError(f"layer {i}: {name} without its {min(missing)}")
    function = function(**values(settings, f"{key}.activation"))
    if unknown := entry.keys() - set(_TYPES[kind].fields):
        raise ModelFileError(f"layer {i}: unknown field {min(unknown)}")
    if missing := set(_TYPES[kind].fields) - {"bias"} - entry.keys():
        raise ModelFileError(f"layer {i}: a {kind} without its {min(missing)}")
    if kind != "scale":
        return _TYPES[kind](**values(entry, key), activation=function)
    if function.name != "identity":
        raise ModelFileError(f"layer {i}: a scale has no activation {name}: give it a layer of its own")
    return Scale(**values(entry, key))


def _value(value: Any, key: str, fetch: Callable[[str], np.ndarray]) -> Any:
    if value is None:
        return fetch(key)
    if type(value) not in (int, float):
        raise ModelFileError(f"{key} is {value!r}: it must be a number, or null for an array")
    return float(value)
