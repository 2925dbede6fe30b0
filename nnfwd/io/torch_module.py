"""PyTorch's live modules, as networks. They bring PyTorch along; nothing here imports it."""

import contextlib
import functools
import operator
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np

from nnfwd import activations
from nnfwd.activations import Function
from nnfwd.errors import ModelFileError, NnfwdError
from nnfwd.io.building import Builder, clip, prelu, reciprocal
from nnfwd.io.reading import FLOATS
from nnfwd.layers import Dense
from nnfwd.network import Network
from nnfwd.placement import dtype_name


def from_torch(module: Any, /) -> Network:
    """The network of a live PyTorch module: an `nn.Sequential`, or any module whose forward is one chain of layers.

    Meanwhile `module.training` is False: no other thread should run it. The forward is traced by `torch.fx`,
    https://docs.pytorch.org/docs/stable/fx.html, with a symbol for x; nothing is computed. Read as at inference, also
    while it is in training mode. The weights are copied to NumPy, bfloat16 as float32, exactly. A Flatten of all but
    the rows changes nothing: x is `(..., features)`.

    Layers: Linear, BatchNorm1d with running statistics, Identity, Dropout, Flatten, and the activations nnfwd has, as
    modules, functions or methods. A number or a tensor `(features,)` that is added, subtracted, multiplied with or
    divided by becomes a Scale, `(x - mean) / std` one Scale; added right after a Linear without a bias, a tensor is
    its bias. Softmax over the last dimension, -1 or 1. Softplus as PyTorch computes it is x beyond its threshold of
    20; here it is log(1 + exp(x)) everywhere, up to exp(-20) = 2.1e-9 more: below rounding in float32, not in float64.

    Raises:
        ModelFileError: for what cannot be represented, naming it: a branch, another layer or function, a hook, a
            parametrisation, a forward that depends on the numbers.
        ShapeError: where two layers do not fit.
    """
    torch = sys.modules.get("torch")
    if isinstance(module, str | bytes | os.PathLike):
        raise ModelFileError(
            f"from_torch takes a live module, not {module!r:.80}: a file is read by nnfwd.load(path, activations=...)"
        )
    if torch is None or not isinstance(module, torch.nn.Module):
        raise ModelFileError(
            f"from_torch takes a torch.nn.Module, not a {type(module).__name__}: "
            "a dict of arrays is read by nnfwd.from_state_dict"
        )
    if inside := _WRAPPERS.get(type(module).__name__):
        raise ModelFileError(f"a {type(module).__name__} wraps the module: pass {inside}")
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        raise ModelFileError("a hook is registered for all modules, which may compute anything: remove it first")
    for name, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            raise ModelFileError(
                f"{_called(name, part)} has a hook or a forward of its own, which may compute anything"
            )
    root = torch.nn.Sequential(module)  # so that a single layer is a layer too, and constants are not kept in `module`
    with _at_inference(module):
        try:
            graph = torch.fx.Tracer().trace(root)
        except Exception as error:  # a forward of the caller's, given a symbol, may fail in any way
            raise ModelFileError(
                f"the forward of {type(module).__name__} cannot be traced as one chain of layers: "
                f"{str(error).strip().partition(chr(10))[0]}"
            ) from error
    return _Chain(torch, root).network(graph)


_WRAPPERS = {"OptimizedModule": "m._orig_mod"} | dict.fromkeys(
    ("DataParallel", "DistributedDataParallel"), "model.module"
)


@contextlib.contextmanager
def _at_inference(module: Any) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def _called(name: str, module: Any) -> str:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return f"{name}, {kind}," if name else kind


# PyTorch's functions without the tensor they are applied to, with PyTorch's own defaults.


def _plain(ours: str, inplace: bool = False) -> str:
    return ours


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Function:
    return activations.leaky_relu(negative_slope=negative_slope)


def _threshold(threshold: float, value: float, inplace: bool = False) -> Function:
    if value != 0:
        raise ModelFileError(f"threshold with value={value}: only 0 is known")
    return activations.thresholded_relu(alpha=threshold)


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Function:
    return clip(min_val, max_val)


def _clamp(min: Any = None, max: Any = None) -> str | Function:
    if (min, max) == (0, None):
        return "relu"
    if min is None or max is None:
        raise ModelFileError(f"clamp with min={min}, max={max}: only min=0, or both, are known")
    return clip(min, max)


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> str:
    if beta != 1 or threshold < 20:
        raise ModelFileError(f"softplus with beta={beta}, threshold={threshold}: only 1 and 20 are known")
    return "softplus"


def _elu(alpha: float = 1.0, inplace: bool = False) -> Function:
    return activations.elu(alpha=alpha)


def _celu(alpha: float = 1.0, inplace: bool = False) -> Function:
    return activations.celu(alpha=alpha)


def _gelu(approximate: str = "none") -> str:
    if approximate not in ("none", "tanh"):
        raise ModelFileError(f"gelu with approximate={approximate!r}")
    return "gelu" if approximate == "none" else "gelu_tanh"


def _softmax(ours: str, dim: int | None = None, *, _stacklevel: int = 3, dtype: Any = None) -> str:
    if dim not in (-1, 1) or dtype is not None:
        raise ModelFileError(f"{ours} with dim={dim}, dtype={dtype}: dim must be -1, or 1, without a dtype")
    return ours


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> str:
    if training:
        raise ModelFileError("a dropout that drops at inference too: write training=self.training")
    return "identity"


_PLAIN = {
    "relu": "relu", "relu6": "relu6", "sigmoid": "sigmoid", "tanh": "tanh", "softsign": "softsign", "selu": "selu",
    "silu": "silu", "mish": "mish", "exp": "exp", "logsigmoid": "log_sigmoid", "hardsigmoid": "hard_sigmoid",
    "hardswish": "hard_silu",
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., str | Function]] = {
    "leaky_relu": _leaky_relu, "prelu": prelu, "threshold": _threshold, "hardtanh": _hardtanh, "clamp": _clamp,
    "clip": _clamp, "softplus": _softplus, "elu": _elu, "celu": _celu, "gelu": _gelu, "dropout": _dropout,
}  # fmt: skip
_FUNCTIONS |= {theirs: functools.partial(_plain, ours) for theirs, ours in _PLAIN.items()}
_FUNCTIONS |= {name: functools.partial(_softmax, name) for name in ("softmax", "log_softmax")}
# The modules of these functions, and which of their attributes are the settings.
_MODULES = {
    "ReLU": ("relu",), "ReLU6": ("relu6",), "Sigmoid": ("sigmoid",), "Tanh": ("tanh",), "Softsign": ("softsign",),
    "SELU": ("selu",), "SiLU": ("silu",), "Mish": ("mish",), "LogSigmoid": ("logsigmoid",),
    "Hardsigmoid": ("hardsigmoid",), "Hardswish": ("hardswish",), "LeakyReLU": ("leaky_relu", "negative_slope"),
    "Threshold": ("threshold", "threshold", "value"), "Hardtanh": ("hardtanh", "min_val", "max_val"),
    "Softplus": ("softplus", "beta", "threshold"), "ELU": ("elu", "alpha"), "CELU": ("celu", "alpha"),
    "GELU": ("gelu", "approximate"), "Softmax": ("softmax", "dim"), "LogSoftmax": ("log_softmax", "dim"),
}  # fmt: skip
_BRANCH = "a branch, and only one chain of layers can be represented"
_AFFINE = ("add", "sub", "mul", "div", "neg")
_NOTHING = {"Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"}


class _Chain:
    """Walks a traced forward, which must be one chain: each step takes what the one before gave."""

    def __init__(self, torch: Any, root: Any) -> None:
        self._torch = torch
        self._root = root
        self._builder = Builder()
        self._shapes: set[Any] = set()
        """The nodes that are the shape of x."""
        self._rows: set[Any] = set()
        """The nodes that are the number of rows of x."""
        self._known: dict[Any, str] = {torch.reshape: "reshape", torch.flatten: "flatten"}
        self._known[torch.nn.functional.linear] = "linear"
        self._known |= {getattr(operator, {"div": "truediv"}.get(name, name)): name for name in _AFFINE}
        for name in (*_FUNCTIONS, *_AFFINE, "squeeze"):
            for library in (torch, torch.nn.functional):
                for spelling in (name, f"{name}_"):
                    if hasattr(library, spelling):
                        self._known[getattr(library, spelling)] = name

    def network(self, graph: Any) -> Network:
        """The network of the graph of a forward."""
        last: Any = None
        for node in graph.nodes:
            if node.op == "get_attr" or self._is_size(node):
                continue
            name = self._name(node)
            if name in _AFFINE:
                self._affine(node, name, last)
            else:
                self._builder.flush()
                self._check_given(node, last)
                if node.op == "call_module":
                    self._module(node)
                elif node.op in ("call_function", "call_method"):
                    self._function(node, name)
            last = node
        return self._builder.network()

    def _name(self, node: Any) -> str | None:
        """What a function or a method is called here; None for one that is not known."""
        if node.op != "call_method":
            return self._known.get(node.target)
        name: str = node.target.rstrip("_")
        return name if name in {*_FUNCTIONS, *_AFFINE, "view", "reshape", "flatten", "squeeze"} else None

    def _check_given(self, node: Any, last: Any) -> None:
        """Each step takes what the one before gave."""
        given = node.args[0] if node.args else node.kwargs.get("input")
        if node.op == "placeholder" or given is last:
            return
        if self._is_constant(given):
            self._refuse(node, f"is given {given} where x belongs: this cannot be represented")
        self._refuse(node, f"does not take what comes before it: {_BRANCH}")

    def _is_constant(self, value: Any) -> bool:
        return isinstance(value, int | float) or (isinstance(value, self._torch.fx.Node) and value.op == "get_attr")

    def _refuse(self, node: Any, why: str = "is not known and cannot be represented") -> NoReturn:
        if node.op == "call_module":
            what = _called(node.target.partition(".")[2], self._root.get_submodule(node.target))
        elif node.op == "output":
            what = "the output"
        else:
            what = f"the function {getattr(node.target, '__name__', node.target)}"
        raise ModelFileError(f"{what} {why}")

    def _is_size(self, node: Any) -> bool:
        """Whether a step asks for the shape of x or its number of rows, as in `x.view(x.size(0), -1)`."""
        first, *others = node.args or (None,)
        if node.target == "size" and node.op == "call_method" and not node.kwargs and others in ([], [0]):
            (self._rows if others else self._shapes).add(node)
        elif node.target is getattr and others == ["shape"]:
            self._shapes.add(node)
        elif node.target is operator.getitem and first in self._shapes and others == [0]:
            self._rows.add(node)
        return node in self._rows or node in self._shapes

    def _module(self, node: Any) -> None:
        module = self._root.get_submodule(node.target)
        kind = type(module).__name__
        if getattr(self._torch.nn, kind, None) is not type(module):
            self._refuse(node)
        if kind == "Linear":
            self._linear(module.weight, module.bias)
        elif kind == "BatchNorm1d":
            if module.running_mean is None:
                self._refuse(node, "has no running statistics and normalises by the rows it is given")
            mean, variance = self._array(module.running_mean), self._array(module.running_var)
            affine = {"gamma": module.weight, "beta": module.bias}
            given = {name: None if tensor is None else self._array(tensor) for name, tensor in affine.items()}
            self._builder.batch_normalisation(mean, variance, module.eps, **given)
        elif kind == "Flatten":
            self._flatten(node, module.start_dim, module.end_dim)
        elif kind == "PReLU":
            self._builder.activation(prelu(self._array(module.weight)))
        elif kind in _MODULES:
            function, *settings = _MODULES[kind]
            self._builder.activation(_FUNCTIONS[function](**{name: getattr(module, name) for name in settings}))
        elif kind not in _NOTHING:
            self._refuse(node)

    # Element by element with constants: at most one Scale, as the ONNX reader's

    def _affine(self, node: Any, name: str, last: Any) -> None:
        """x + c, x - c, c - x, x * c, x / c and -x."""
        settings = dict(node.kwargs)
        operands = [*node.args, *(settings.pop(key) for key in ("input", "other") if key in settings)]
        known = all(isinstance(value, int | float | self._torch.fx.Node) for value in operands)
        if settings or not known or len(operands) != (1 if name == "neg" else 2):
            self._refuse(node, f"with {[*operands[1:], *settings]} is not known")
        others = [value for value in operands if value is not last]
        if len(others) != len(operands) - 1 or not all(map(self._is_constant, others)):
            self._refuse(node, f"takes {' and '.join(map(str, operands))}: {_BRANCH}")
        if name == "neg":
            self._builder.affine(1, -1.0)
            return
        constant = self._constant(node, others[0])
        reverse = operands[0] is not last
        if name == "add":
            self._add(constant)
        elif name == "mul":
            self._builder.affine(1, constant)
        elif name == "sub":
            self._builder.affine(0, constant)
            if reverse:
                self._builder.affine(1, -1.0)
        elif reverse:
            self._refuse(node, "divides by x, which no layer does")
        else:
            self._builder.affine(1, reciprocal(np.asarray(constant)))

    def _constant(self, node: Any, value: Any) -> float | np.ndarray:
        """One number, or one for each feature."""
        if not isinstance(value, self._torch.fx.Node):
            return float(value)
        found = self._array(operator.attrgetter(value.target)(self._root))
        if found.ndim > 2 or (found.ndim == 2 and len(found) != 1):
            self._refuse(node, f"takes {value.target} of shape {found.shape}: it must be () or (features,)")
        return float(found.item()) if found.size == 1 else found.reshape(-1)

    def _add(self, value: float | np.ndarray) -> None:
        match self._builder.last:
            case Dense(bias=None, activation=Function(name="identity")) as last:
                if isinstance(value, np.ndarray) and last.out_features == len(value):
                    self._builder.layers[-1] = Dense(last.weight, value)
                    return
        self._builder.affine(2, value)

    # Functions and methods

    def _function(self, node: Any, name: str | None) -> None:
        if name is None:
            self._refuse(node)
        if name == "squeeze":
            self._refuse(node, "drops an axis: leave it out, nnfwd gives (..., 1) where there is one output")
        if name in ("view", "reshape"):
            return self._reshape(node)
        weights = name in ("linear", "prelu")
        values = [self._value(node, value, weights) for value in node.args[1:]]
        settings = {key: self._value(node, value, weights) for key, value in node.kwargs.items() if key != "input"}
        try:
            if name == "linear":
                self._linear(*values, **settings)
            elif name == "flatten":
                self._flatten(node, *values, **settings)
            else:
                self._builder.activation(_FUNCTIONS[name](*values, **settings))
        except NnfwdError:
            raise
        except TypeError:  # settings beyond those of our functions above
            self._refuse(node, f"with {[*values, *settings]} is not known")

    def _value(self, node: Any, value: Any, weights: bool) -> Any:
        """An argument of a function, which is a number, or where it may be `weights`, an array."""
        if not isinstance(value, self._torch.fx.Node):
            return value
        if not weights and value.op == "get_attr":
            self._refuse(node, f"takes the tensor {value.target}, where only numbers are known")
        if value.op != "get_attr":
            self._refuse(node, f"takes {value} too: {_BRANCH}")
        return self._array(operator.attrgetter(value.target)(self._root))

    def _linear(self, weight: Any, bias: Any = None) -> None:
        self._builder.dense(self._array(weight), None if bias is None else self._array(bias))

    def _flatten(self, node: Any, start_dim: int = 0, end_dim: int = -1) -> None:
        if (start_dim, end_dim) != (1, -1):
            self._refuse(node, f"from dimension {start_dim} to {end_dim} does not keep the rows, as from 1 to -1 does")

    def _reshape(self, node: Any) -> None:
        """`(rows, -1)`, `(rows, features)` or `(-1, features)`, which change nothing."""
        sizes = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
            sizes = sizes[0]
        widths = [layer.out_features for layer in self._builder.layers if layer.out_features]
        features = {-1, *(widths or sizes)[-1:]}
        if len(sizes) != 2 or not (sizes[0] == -1 or sizes[0] in self._rows) or sizes[1] not in features:
            self._refuse(node, f"to {sizes} may move numbers between rows")

    def _array(self, tensor: Any) -> np.ndarray:
        """A tensor's numbers; bfloat16, which NumPy has not, as float32."""
        if isinstance(tensor, np.ndarray):
            return tensor
        dtype = dtype_name(tensor.dtype)
        if tensor.is_meta or tensor.layout is not self._torch.strided or dtype not in FLOATS:
            raise ModelFileError(
                f"a weight is {dtype}, {tensor.layout}, on device {tensor.device}: "
                f"it must be {', '.join(FLOATS)}, dense, on a device that holds numbers"
            )
        tensor = tensor.detach().cpu()
        found: np.ndarray = (tensor.float() if dtype == "bfloat16" else tensor).numpy()
        return found
