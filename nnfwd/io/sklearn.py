"""Networks of scikit-learn: fitted estimators, and the `.skops` files they are stored in.

Nothing of scikit-learn or skops is imported, no method of an estimator is called: an estimator is the name of its
class and its attributes, which a live one has in its `__dict__` and a file in its `schema.json`. Such a file is a zip
archive of that schema, a tree of nodes `{"__class__", "__module__", "__loader__", "content", ...}`, and of arrays in
NumPy's format; see https://github.com/skops-dev/skops, skops/io/_general.py and _numpy.py. Only the nodes that make
the network are looked at; the state of the optimiser, say, is not.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from nnfwd.errors import ModelFileError
from nnfwd.io.building import Builder, clip, reciprocal
from nnfwd.io.reading import Archive, Given, npy, npy_header, parse_json
from nnfwd.network import Network

_HIDDEN = ("identity", "logistic", "tanh", "relu")
_OUT = ("identity", "logistic", "softmax", "exp")


@dataclass(frozen=True)
class _Estimator:
    """What is known of an estimator; nothing of it can be called."""

    name: str
    """Of its class, with its module."""
    attributes: Mapping[str, Any]
    value: Callable[[Any], Any]
    """The value of one of the attributes."""

    @property
    def kind(self) -> str:
        """The name of its class where that is scikit-learn's, else the whole name."""
        return self.name.rpartition(".")[2] if self.name.startswith("sklearn.") else self.name

    def __getitem__(self, attribute: str) -> Any:
        if attribute not in self.attributes:
            raise ModelFileError(f"the {self.kind} has no {attribute}: it is not fitted, call its fit first")
        return self.value(self.attributes[attribute])


def from_sklearn(estimator: Any, /) -> Network:
    """The network of a fitted estimator of scikit-learn, its arrays copied in the dtype they were fitted in.

    An MLPClassifier or MLPRegressor; a Pipeline that ends in one, all steps before it being StandardScaler,
    MinMaxScaler, "passthrough" or Pipelines of these; a TransformedTargetRegressor around one, with such a scaler. A
    scaler becomes a Scale, and a clipping one an Activation after it.

    It takes x `(..., n_features_in_)` to what `predict_proba` of a classifier or `predict` of a regressor returns, but
    for two shapes: a binary classifier gives `(..., 1)`, the probability of its second class, and a regressor of one
    output gives `(..., 1)` too. `Network.classes` are `classes_`; a multilabel classifier has none, its `classes_`
    being column numbers.

    Raises:
        ModelFileError: for an estimator that is not fitted, a step or an estimator that cannot be represented, and a
            class derived from one of those above, which may compute anything.
    """
    builder = Builder()
    _model(_live(estimator), builder)
    return builder.network()


def read(file: IO[bytes], given: Given) -> Network:
    """The network of a `.skops` file; of whatever `from_sklearn` takes."""
    archive = Archive(file, given.limits)
    schema = parse_json(archive.read("schema.json", metadata=True), given.limits)
    if not isinstance(schema, dict) or schema.get("protocol") not in (0, 1, 2):
        raise ModelFileError("schema.json is of an unknown protocol: it must be 0, 1 or 2")
    builder = Builder(given.limits)
    _model(_Nodes(archive).value(schema), builder)
    return builder.network()


def _live(value: Any) -> Any:
    """An object of scikit-learn as an `_Estimator`, those in a list too; anything else as it is."""
    if isinstance(value, list | tuple):
        return [_live(item) for item in value]
    if type(value).__module__.startswith("sklearn."):
        return _Estimator(_name(value), getattr(value, "__dict__", {}), _live)
    return value


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


class _Nodes:
    """The nodes of a schema as values, each when it is asked for."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._used: set[str] = set()

    def value(self, node: Any) -> Any:
        """A number, a string, None, a list (of a tuple as well), an array or an `_Estimator`; nothing else."""
        loader = _field(node, "__loader__", str)
        name = f"{_field(node, '__module__', str)}.{_field(node, '__class__', str)}"
        if loader == "JsonNode":
            return parse_json(_field(node, "content", str).encode(), self._archive.limits)
        if loader in ("ListNode", "TupleNode") or (loader == "NdArrayNode" and "file" not in node):  # of dtype object
            return [self.value(item) for item in _field(node, "content", list)]
        if loader == "NdArrayNode":
            return self._array(_field(node, "file", str))
        if loader == "ObjectNode":
            attributes = _field(_field(node, "content", dict), "content", dict)
            return _Estimator(name, attributes, self.value)
        raise ModelFileError(f"{name:.80} cannot be represented: its node is a {loader:.80}")

    def _array(self, name: str) -> Any:
        """An array of its own, a scalar where it has no axis. Its name is looked up in the archive only."""
        if name in self._used:  # or a small file could ask for any number of large copies
            raise ModelFileError(f"the array {name:.80} is used twice")
        self._used.add(name)
        info = self._archive.find(name)
        with self._archive.open(name) as stream:
            shape, dtype, _, start = npy_header(stream, name)
        if dtype[1:2] == "U":  # the labels of classes, say
            data, kind = self._archive.read(name, metadata=True), np.dtype(dtype)
            if start + math.prod(shape) * kind.itemsize != len(data):
                raise ModelFileError(f"{name} of shape {shape} and dtype {dtype} does not fill its {len(data)} bytes")
            return np.frombuffer(data, kind, offset=start).reshape(shape)[()]
        return npy(lambda: self._archive.open(name), info.file_size, name, self._archive.limits).read()[()]


def _field(node: Any, key: str, kind: type) -> Any:
    if not isinstance(node, dict) or not isinstance(node.get(key), kind):
        raise ModelFileError(f"a node of schema.json has no valid {key}: {node!r:.80}")
    return node[key]


def _kind(value: Any) -> str:
    """What an error calls it: scikit-learn's own classes by their name, others by module and name."""
    if isinstance(value, _Estimator):
        return value.kind
    return repr(value) if value is None or isinstance(value, str) else _name(value)


def _model(model: Any, builder: Builder) -> None:
    """Adds what predicts."""
    kind = _kind(model)
    if kind == "Pipeline":
        *earlier, last = (step for _, step in model["steps"])
        for step in earlier:
            _transformer(step, builder)
        _model(last, builder)
    elif kind == "TransformedTargetRegressor":
        _model(model["regressor_"], builder)
        _inverse(model["transformer_"], builder)
    elif kind in ("MLPClassifier", "MLPRegressor"):
        _perceptron(model, builder)
    else:
        raise ModelFileError(
            f"{kind:.80} cannot be represented: it must be scikit-learn's MLPClassifier, MLPRegressor, a Pipeline that "
            "ends in one, or a TransformedTargetRegressor of one"
        )


def _perceptron(model: _Estimator, builder: Builder) -> None:
    """`f(x @ coefs_[i] + intercepts_[i])`; https://scikit-learn.org/stable/modules/neural_networks_supervised.html"""
    weights, biases = model["coefs_"], model["intercepts_"]
    if len(weights) != len(biases) or not weights:
        raise ModelFileError(f"{len(weights)} coefs_ do not fit {len(biases)} intercepts_")
    names = [_known(model["activation"], _HIDDEN)] * (len(weights) - 1) + [_known(model["out_activation_"], _OUT)]
    for i, (weight, bias, name) in enumerate(zip(weights, biases, names, strict=True)):
        builder.dense(_array(weight, f"coefs_[{i}]").T, _array(bias, f"intercepts_[{i}]"))
        builder.activation(name)
    if model.kind == "MLPClassifier" and not str(model["_label_binarizer"]["y_type_"]).startswith("multilabel"):
        classes, outputs = model["classes_"], len(biases[-1])
        if len(classes) != max(outputs, 2):
            raise ModelFileError(f"{len(classes)} classes do not fit {outputs} outputs")
        builder.classes = classes


def _known(activation: Any, known: tuple[str, ...]) -> str:
    if not isinstance(activation, str) or activation not in known:
        raise ModelFileError(f"unknown activation {activation!r:.80}: there are {', '.join(known)}")
    return activation


def _transformer(step: Any, builder: Builder) -> None:
    """Adds what is done to x before."""
    kind = _kind(step)
    if kind == "Pipeline":
        for _, inner in step["steps"]:
            _transformer(inner, builder)
    elif kind == "StandardScaler":
        if scaling := _standard(step):
            mean, scale = scaling
            builder.scale(reciprocal(scale), center=mean)
    elif kind == "MinMaxScaler":
        scale, shift = _array(step["scale_"], "scale_"), _array(step["min_"], "min_")
        builder.scale(scale, shift=shift)
        if step["clip"]:
            lower, upper = step["feature_range"]
            builder.activation(clip(lower, upper))
    elif step not in (None, "passthrough"):
        raise ModelFileError(
            f"the step {kind:.80} cannot be represented: it must be StandardScaler, MinMaxScaler or 'passthrough'"
        )


def _inverse(scaler: Any, builder: Builder) -> None:
    """Adds what takes a scaled target back."""
    kind = _kind(scaler)
    if kind == "StandardScaler":
        if scaling := _standard(scaler):
            mean, scale = scaling
            builder.scale(scale, shift=mean)
    elif kind == "MinMaxScaler":
        builder.scale(reciprocal(_array(scaler["scale_"], "scale_")), center=_array(scaler["min_"], "min_"))
    else:
        raise ModelFileError(
            f"the target's transformer {kind:.80} cannot be represented: it must be StandardScaler or MinMaxScaler"
        )


def _standard(scaler: _Estimator) -> tuple[Any, Any] | None:
    """The mean and scale of a StandardScaler, 0 and 1 where it leaves one out, None where it leaves out both."""
    centred, scaled = scaler["with_mean"], scaler["with_std"]
    if not (centred or scaled):
        return None
    mean = _array(scaler["mean_"], "mean_") if centred else 0.0
    return mean, _array(scaler["scale_"], "scale_") if scaled else 1.0


def _array(value: Any, name: str) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise ModelFileError(f"{name} is {value!r:.80}: it must be a NumPy array")
    return value
