"""The weights of a Keras model, found for its layers in HDF5, or in a live model.

They lie under `layers/<class in snake case>[_n]/vars/<i>` in Keras 3 (`keras/src/saving/saving_lib.py`), under the
names in the attributes `layer_names` and `weight_names` before it, and in its `.h5` still
(`keras/src/legacy/saving/legacy_h5_format.py`). All sources are those of https://github.com/keras-team/keras.
"""

import re
from typing import Any

import numpy as np

from nnfwd.errors import ModelFileError
from nnfwd.io import hdf5
from nnfwd.io.keras_document import MODELS, UNBUILT, KerasLayer
from nnfwd.io.reading import Tensor


def subgroup(group: hdf5.Group, path: str) -> hdf5.Group:
    """The group at a path inside another, or `ModelFileError`."""
    found = group[path]
    if not isinstance(found, hdf5.Group):
        raise ModelFileError(f"{path} among the weights is no group")
    return found


def _dataset(group: hdf5.Group, path: str) -> Tensor:
    found = group[path]
    if not isinstance(found, hdf5.Dataset):
        raise ModelFileError(f"{path} among the weights is no array")
    return found.tensor


def place_by_class(model: KerasLayer, group: hdf5.Group) -> None:
    """Finds the variables as Keras 3 saves them: each layer under its class, counted within its model.

    Keras 2.12 and 2.13 wrote another name for `layers`: `H5IOStore.get` of `keras/src/saving/saving_lib.py`.
    """
    if "vars" in group and len(list(subgroup(group, "vars"))):
        raise ModelFileError(f"the model {model.name} has variables of its own, which belong to no layer")
    container = next((name for name in ("layers", "_layer_checkpoint_dependencies") if name in group), None)
    if container is None:
        if model.has_variables:
            raise ModelFileError(f"no weights of the layers of {model.name}: {UNBUILT}")
        return
    inside = subgroup(group, container)
    expected: dict[str, KerasLayer] = {}
    used: dict[str, int] = {}
    for layer in model.layers:
        name = _snake(layer.kind)
        count = used[name] = used.get(name, -1) + 1
        expected[f"{name}_{count}" if count else name] = layer
    for name in inside:
        if name not in expected and not name.startswith("input_layer"):
            raise ModelFileError(f"the weights layers/{name} belong to no layer of {model.name}")
    for name, layer in expected.items():
        if layer.kind in MODELS:
            if layer.has_variables or name in inside:
                place_by_class(layer, subgroup(inside, name))
        elif layer.variables or name in inside:
            _place_variables(layer, subgroup(inside, name))


def _place_variables(layer: KerasLayer, group: hdf5.Group) -> None:
    other = set(group) - {"vars", "seed_generator", "activation"}
    if other:
        raise ModelFileError(f"layer {layer.name} ({layer.kind}) has unknown state: {', '.join(sorted(other)[:5])}")
    inside = subgroup(group, "vars") if "vars" in group or layer.variables else ()
    _check_count(layer, len(list(inside)))
    layer.tensors = [_dataset(group, f"vars/{i}") for i in range(len(layer.variables))]


def _check_count(layer: KerasLayer, count: int) -> None:
    if count != len(layer.variables):
        needed = ", ".join(layer.variables) or "none"
        advice = "" if count else f": {UNBUILT}"
        raise ModelFileError(f"layer {layer.name} ({layer.kind}) has {count} variables here, it needs {needed}{advice}")


def _snake(name: str) -> str:
    """As `to_snake_case` of `keras/src/utils/naming.py`: ReLU is re_lu."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def place_by_name(model: KerasLayer, group: hdf5.Group) -> None:
    """Finds the variables as Keras 1 and 2 save them: the layers that have any, one after the other.

    Keras goes by their order, not by their names, which change when a model is built again.
    """
    stored = [(name, _strings(subgroup(group, name), "weight_names")) for name in _strings(group, "layer_names")]
    stored = [(name, weights) for name, weights in stored if weights]
    layers = [layer for layer in model.layers if layer.has_variables]
    if len(stored) != len(layers):
        advice = "" if stored else f": {UNBUILT}"
        raise ModelFileError(
            f"the file has weights of {len(stored)} layers, the model has {len(layers)} with weights{advice}"
        )
    if "top_level_model_weights" in group and _strings(subgroup(group, "top_level_model_weights"), "weight_names"):
        raise ModelFileError("top_level_model_weights belong to no layer")
    for layer, (name, weights) in zip(layers, stored, strict=True):
        inside = subgroup(group, name)
        if layer.kind in MODELS:
            _place_nested(layer, inside, weights)
            continue
        _check_count(layer, len(weights))
        for variable, weight in zip(layer.variables, weights, strict=True):
            if not _is_called(weight, variable):
                raise ModelFileError(f"layer {layer.name} has {weight} where its {variable} is expected")
        layer.tensors = [_dataset(inside, weight) for weight in weights]


def _place_nested(model: KerasLayer, group: hdf5.Group, weights: list[str]) -> None:
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


def place_live(model: KerasLayer, live: Any) -> None:
    """The variables of the layers of a live model, by the layers' names, which are unique in it."""
    named = {layer.name: layer for layer in live.layers}
    for layer in model.layers:
        if layer.kind in MODELS:
            place_live(layer, named[layer.name])
        elif layer.kind != "InputLayer":
            variables = named[layer.name].weights
            _check_count(layer, len(variables))
            layer.tensors = [_live(np.asarray(variable)) for variable in variables]


def _live(array: np.ndarray) -> Tensor:
    name = array.dtype.name
    return Tensor(array.shape, name, lambda: array.astype("float32") if name == "bfloat16" else array)
