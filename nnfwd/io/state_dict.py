"""State dicts: arrays by name, as PyTorch keeps them, and as `.npz`, `.safetensors` and `.pth` files hold them.

They say neither which activations stand between the layers, nor, where the names are not numbered, in which order the
layers come, nor the epsilon of a batch normalisation. Nothing of this is guessed: it is asked for.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nnfwd import activations
from nnfwd.activations import Function
from nnfwd.errors import ModelFileError
from nnfwd.io.building import Builder
from nnfwd.io.reading import Given, Limits, Tensor
from nnfwd.layers import to_numpy
from nnfwd.network import Network
from nnfwd.placement import dtype_name

_RUNNING = {"running_mean", "running_var"}
_NORMALISATION = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_Module = tuple[str, dict[str, Tensor]]


def from_state_dict(
    state_dict: Mapping[str, Any],
    /,
    *,
    activations: Any,
    prefix: str | Sequence[str] | None = None,
    epsilon: float | None = None,
) -> Network:
    """The network of arrays by name, `{"0.weight": ..., "0.bias": ..., "2.weight": ...}`, of any array library.

    Linear layers (weight `(out, in)`, bias `(out,)`), batch normalisations (weight, bias, running_mean, running_var)
    and the slopes of a PReLU. The weights are copied to NumPy; bfloat16 becomes float32, exactly.

    Args:
        state_dict: the arrays. Numbered layers are taken by their numbers, whatever the order of the names.
        activations: one for all layers, or a list with one for each: what follows it, `"identity"` for nothing.
            `"prelu"` takes its slopes from the state dict.
        prefix: which layers, by the start of their names; several, in the order of the pass, where the names say none:
            `prefix=["mlp_extractor.policy_net", "action_net"]`.
        epsilon: what the batch normalisations add to the variance; PyTorch's default is 1e-5.

    Raises:
        ModelFileError: for what cannot be represented, naming it; for an order or an epsilon that must be given.
        ShapeError: where two layers do not fit.
    """
    plans = {name: _plan(value) for name, value in state_dict.items()}
    return network(plans, Given(Limits(), activations, prefix, epsilon))


def _plan(value: Any) -> Any:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return value
    return Tensor(tuple(value.shape), dtype_name(value.dtype), lambda: to_numpy(value))


def network(tensors: Mapping[str, Any], given: Given) -> Network:
    """The network of the plans in `tensors`; what is no `Tensor` must be outside the prefix."""
    count = sum(isinstance(value, Tensor) for value in tensors.values())
    if count > given.limits.tensors:
        raise ModelFileError(f"{count} tensors are more than {given.limits.tensors}")
    prefixes = [given.prefix] if isinstance(given.prefix, str) else list(given.prefix or [""])
    modules = [module for prefix in prefixes for module in _modules(tensors, prefix.rstrip("."))]
    slopes = [i for i, module in enumerate(modules) if _kind(*module) == "slope"]
    layers = [module for i, module in enumerate(modules) if i not in slopes]
    functions = iter(_functions(given.activations, layers))
    builder = Builder(given.limits)
    unclaimed = set(slopes)
    for i, (name, fields) in enumerate(modules):
        if i in slopes:
            continue
        _add(builder, name, fields, given.epsilon)
        function = next(functions)
        if i + 1 in slopes and function is activations.prelu:
            function = function(negative_slope=_slope(modules[i + 1][1]["weight"]))
            unclaimed.remove(i + 1)
        builder.activation(function)
    if unclaimed:
        name, fields = modules[min(unclaimed)]
        raise ModelFileError(
            f"{_called(name)} has only a weight {fields['weight'].shape}: "
            "slopes of a PReLU belong to an activation 'prelu' of the layer before"
        )
    return builder.network()


def _modules(tensors: Mapping[str, Any], prefix: str) -> list[_Module]:
    """The modules under a prefix, each with its tensors, in the order of the pass."""
    start = f"{prefix}." if prefix else ""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith(start):
            continue
        if not isinstance(value, Tensor):
            raise ModelFileError(f"{key} is a {type(value).__name__} and no array: choose layers with prefix=")
        name, _, field = key[len(start) :].rpartition(".")
        found.setdefault(f"{start}{name}".rstrip("."), {})[field] = value
    if not found:
        tops = sorted({key.rpartition(".")[0].rpartition(".")[0] or key.rpartition(".")[0] for key in tensors})
        there = f"there are {', '.join(tops[:8])}" if tops else "it is empty"
        raise ModelFileError(f"no array's name starts with {start!r}: {there}" if start else "it holds no arrays")
    if len({re.sub(r"\d+", "0", name) for name in found}) > 1:
        raise ModelFileError(
            f"the names {', '.join(list(found)[:8])} do not say in which order these layers come: "
            "give them in the order of the pass, prefix=[...]"
        )
    return sorted(found.items(), key=lambda module: [int(n) for n in re.findall(r"\d+", module[0])])


def _kind(name: str, fields: Mapping[str, Tensor]) -> str:
    """What a module with these tensors is: linear, normalisation or slope; `ModelFileError` for anything else."""
    if _RUNNING <= fields.keys() <= set(_NORMALISATION):
        return "normalisation"
    if {"weight"} <= fields.keys() <= {"weight", "bias"} and len(fields["weight"].shape) == 2:
        return "linear"
    if fields.keys() == {"weight"} and len(fields["weight"].shape) == 1:
        return "slope"
    held = ", ".join(f"{field} {tensor.shape}" for field, tensor in list(fields.items())[:6])
    raise ModelFileError(
        f"{_called(name)} holds {held}: only linear layers (weight (out, in), bias) and batch normalisations are read "
        "by name; put others together yourself, nnfwd.Network.from_arrays(weights, biases, activations)"
    )


def _slope(weight: Tensor) -> Any:
    values = weight.weights("a PReLU's weight")
    return float(values[0]) if weight.shape == (1,) else values


def _functions(asked: Any, layers: Sequence[_Module]) -> Iterable[Function]:
    """The activation after each layer, as the caller says; a prelu's slopes may still be missing."""
    listed = ", ".join(f"{_called(name)} {_first(fields)}" for name, fields in layers[:8])
    listed += ", ..." if len(layers) > 8 else ""
    if asked is None:
        raise ModelFileError(
            "the activations are not in it: give activations=, one for all layers or a list with one for each of "
            f"the {len(layers)}: {listed}"
        )
    if not isinstance(asked, list | tuple):
        if len(layers) > 1 and any(fields.keys() >= _RUNNING for _, fields in layers):
            raise ModelFileError(
                f"one activation for batch normalisations too? Give a list with one for each: {listed}"
            )
        asked = [asked] * len(layers)
    if len(asked) != len(layers):
        raise ModelFileError(f"{len(asked)} activations do not fit {len(layers)} layers: {listed}")
    return [activations.prelu if function == "prelu" else activations.get(function) for function in asked]


def _add(builder: Builder, name: str, fields: Mapping[str, Tensor], epsilon: float | None) -> None:
    if _kind(name, fields) == "normalisation":
        if epsilon is None:
            raise ModelFileError(
                f"{_called(name)} is a batch normalisation, whose epsilon is not in it: give epsilon=, "
                "1e-5 if PyTorch's default was kept"
            )
        read = {field: fields[field].weights(f"{name}.{field}") for field in _NORMALISATION[:4] if field in fields}
        builder.batch_normalisation(
            read["running_mean"], read["running_var"], epsilon, gamma=read.get("weight"), beta=read.get("bias")
        )
    else:
        weight, bias = fields["weight"].weights(f"{name}.weight"), fields.get("bias")
        builder.dense(weight, None if bias is None else bias.weights(f"{name}.bias"))


def _called(name: str) -> str:
    return name or "the layer"


def _first(fields: Mapping[str, Tensor]) -> str:
    weight = fields.get("weight") or next(iter(fields.values()))
    if len(weight.shape) != 2:
        return f"({weight.shape[0] if weight.shape else ''} features)"
    return f"({weight.shape[1]} -> {weight.shape[0]})"
