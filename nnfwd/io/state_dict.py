"""State dicts: arrays by name, as PyTorch keeps them, and as `.npz`, `.safetensors` and `.pth` files hold them.

They say neither which activations stand between the layers, nor, where the names are not numbered, in which order the
layers come, nor the epsilon of a batch normalisation. Nothing of this is guessed: it is asked for.
"""

import collections
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nnfwd import activations
from nnfwd.activations import Function
from nnfwd.errors import ModelFileError
from nnfwd.io.building import Builder, prelu
from nnfwd.io.pickles import UnknownObject
from nnfwd.io.reading import Given, Limits, Tensor
from nnfwd.layers import to_numpy
from nnfwd.network import Network
from nnfwd.placement import dtype_name

UNSTATED = object()
"""As `activations`: describe what is there, the layers and their shapes, and let activations and epsilon be unknown."""
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

    Arrays in a dict inside go by both names, `"state_dict.0.weight"`; what is no array is no part of a layer.
    Linear layers (weight `(out, in)`, bias `(out,)`), batch normalisations (weight, bias, running_mean, running_var)
    and the slopes of a PReLU. The weights are copied to NumPy; bfloat16 becomes float32, exactly.

    Args:
        state_dict: the arrays. Layers whose names differ in one number are taken in its order: `net.0`, `net.2`; `fc1`,
            `fc2`.
        activations: one for all layers, the last one too, or a list with one for each, batch normalisations counted:
            what follows it, `"identity"` for nothing. `"prelu"` takes its slopes from the state dict.
        prefix: which layers, by the start of their names; several, in the order of the pass, where the names say none:
            `prefix=["mlp_extractor.policy_net", "action_net"]`.
        epsilon: what the batch normalisations add to the variance, where there are any; PyTorch's default is 1e-5.

    Raises:
        ModelFileError: for what cannot be represented, naming it; for an order or an epsilon that must be given.
        ShapeError: where two layers do not fit.
    """
    if not isinstance(state_dict, Mapping):
        raise ModelFileError(
            f"a state dict is a dict of arrays, not a {type(state_dict).__name__}: write from_state_dict("
            "module.state_dict(), ...), or nnfwd.load(path, ...) for a file"
        )
    return network(dict(_plans(state_dict, "")), Given(Limits(), activations, prefix, epsilon))


def _plans(state_dict: Mapping[str, Any], start: str) -> Iterator[tuple[str, Any]]:
    """The arrays by their names, those in a dict inside by both names with a dot between."""
    for name, value in state_dict.items():
        if isinstance(value, Mapping):
            yield from _plans(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", _plan(value)


def _plan(value: Any) -> Any:
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return value
    return Tensor(tuple(value.shape), dtype_name(value.dtype), lambda: to_numpy(value))


def network(tensors: Mapping[str, Any], given: Given) -> Network:
    """The network of the plans in `tensors`. What is no `Tensor` is no part of a layer."""
    count = sum(isinstance(value, Tensor) for value in tensors.values())
    if count > given.limits.tensors:
        raise ModelFileError(f"{count} tensors are more than {given.limits.tensors}")
    prefixes = [given.prefix] if isinstance(given.prefix, str) else list(given.prefix or [""])
    modules = [module for prefix in prefixes for module in _modules(tensors, prefix.strip().rstrip("."))]
    twice = [name for name, count in collections.Counter(name for name, _ in modules).items() if count > 1]
    if twice:
        raise ModelFileError(f"{_called(twice[0])} is chosen by two of the prefixes {', '.join(prefixes)}")
    kinds = [_kind(*module) for module in modules]
    chosen = list(zip(modules, kinds, strict=True))
    functions = iter(_functions(given.activations, [module for module, kind in chosen if kind != "slope"]))
    normalisations = [name for (name, _), kind in chosen if kind == "normalisation"]
    known = given.activations is not UNSTATED
    epsilon = _epsilon(given.epsilon, normalisations) if known else 0.0
    builder = Builder(given.limits)
    slope_is_due = False
    for (name, fields), kind in chosen:
        if kind == "slope":
            if known and not slope_is_due:
                raise ModelFileError(
                    f"{_called(name)} has only a weight {fields['weight'].shape}: "
                    "slopes of a PReLU belong to an activation 'prelu' of the layer before"
                )
            builder.activation(prelu(fields["weight"].weights(f"{name}.weight")))
            slope_is_due = False
            continue
        if slope_is_due:
            break
        _add(builder, name, fields, epsilon)
        function = next(functions)
        slope_is_due = function is activations.prelu
        if not slope_is_due:
            builder.activation(function)
    if slope_is_due:
        raise ModelFileError("a prelu's slopes are not in it: write activations.prelu(negative_slope=...)")
    return builder.network()


def _modules(tensors: Mapping[str, Any], prefix: str) -> list[_Module]:
    """The modules under a prefix, each with its tensors, in the order of the pass."""
    start = f"{prefix}." if prefix else ""
    found: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, value in tensors.items():
        if key.startswith(start):
            name, _, field = key[len(start) :].rpartition(".")
            in_a_layer = name or field in _NORMALISATION  # an epoch, a learning rate of a checkpoint stand beside them
            if isinstance(value, Tensor):
                found.setdefault(f"{start}{name}".rstrip("."), {})[field] = value
            elif in_a_layer:
                others[key] = value
    if not found:
        there = sorted({key.rpartition(".")[0] or key for key, value in tensors.items() if isinstance(value, Tensor)})
        what = f"no array's name starts with {start!r}" if start else "it holds no arrays"
        raise ModelFileError(f"{what}: there are {', '.join(there[:8])}" if there else what)
    if others:
        name, value = next(iter(others.items()))
        kind = value if isinstance(value, UnknownObject) else type(value).__name__
        raise ModelFileError(f"{name} is no array but {kind}: choose layers, prefix={_groups(found)}")
    return _ordered(found)


def _groups(found: Iterable[str]) -> str:
    """What a caller may choose from."""
    tops = sorted({name.rpartition(".")[0] or name for name in found})
    return " or ".join(repr(top) for top in tops[:6])


def _ordered(found: dict[str, dict[str, Tensor]]) -> list[_Module]:
    """The modules by the one number in which their names differ; no other order is taken for that of the pass."""
    names = list(found)
    if len(names) == 1:
        return list(found.items())
    parts = {name: re.split(r"(\d+)", name) for name in names}
    texts = {tuple(part[::2]) for part in parts.values()}
    differ = [i for i, column in enumerate(zip(*parts.values(), strict=False)) if len(set(column)) > 1]
    if len(texts) == 1 and len(differ) == 1:
        (at,) = differ
        numbers = {name: int(part[at]) for name, part in parts.items()}
        counted, n = sorted(numbers.values()), len(names)
        # net.0 and net.2 have activations between; fc1, fc2, fc3 count; fc1, fc21, fc22 or fc256, fc128 do neither.
        before = parts[names[0]][at - 1]
        is_whole_part = (not before or before.endswith(".")) and len(set(counted)) == n
        if is_whole_part or counted in (list(range(n)), list(range(1, n + 1))):
            return sorted(found.items(), key=lambda module: numbers[module[0]])
    raise ModelFileError(
        f"the names {', '.join(names[:8])}{', ...' if len(names) > 8 else ''} do not say in which order these layers "
        "come: give them in the order of the pass, prefix=[...]"
    )


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


def _functions(asked: Any, layers: Sequence[_Module]) -> Iterable[Function]:
    """The activation after each layer, as the caller says; a prelu's slopes may still be missing."""
    if asked is UNSTATED:
        return [activations.identity] * len(layers)
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


def _epsilon(asked: Any, normalisations: Sequence[str]) -> float:
    """What batch normalisations add to the variance; it is asked for where there are any, and only there."""
    if asked is None and not normalisations:
        return 0.0
    if asked is None:
        raise ModelFileError(
            f"{_called(normalisations[0])} is a batch normalisation, whose epsilon is not in it: give epsilon=, "
            "1e-5 if PyTorch's default was kept"
        )
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 <= asked < math.inf:
        raise ModelFileError(f"epsilon is {asked!r}: it must be one number, positive or 0")
    if not normalisations:
        raise ModelFileError("it has no batch normalisation: leave epsilon= out")
    return float(asked)


def _add(builder: Builder, name: str, fields: Mapping[str, Tensor], epsilon: float) -> None:
    if _kind(name, fields) == "normalisation":
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
