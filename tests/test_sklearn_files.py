"""scikit-learn's estimators, live and in .skops files: the same numbers, the same classes, and what is refused."""

import io
import json
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hostile import attempt, survives
from oracles import agree
from places import REQUIRED

import nnfwd
from nnfwd import Activation, Dense, Limits, Scale
from nnfwd.errors import ModelFileError
from nnfwd.io.sklearn import from_sklearn

if "sklearn" not in REQUIRED:
    pytest.importorskip("sklearn")
from sklearn.compose import TransformedTargetRegressor
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

pytestmark = pytest.mark.filterwarnings("ignore:Stochastic Optimizer:sklearn.exceptions.ConvergenceWarning")

DTYPES = ("float32", "float64")
ACTIVATIONS = ("identity", "logistic", "tanh", "relu")
ROWS = 60
NAMES = np.array(["quark", "gluon", "b", "τ"])

# What y is, and the classes a network of it has.
TARGETS = {
    "binary": lambda i: i % 2,
    "binary strings": lambda i: NAMES[i % 2],
    "booleans": lambda i: i % 2 == 0,
    "multiclass": lambda i: i % 4 - 1,
    "strings": lambda i: NAMES[i % 4],
    "objects": lambda i: NAMES[i % 3].astype(object),
    "floats": lambda i: (i % 3) * 10.0,
    "multilabel": lambda i: np.stack([i % 2, i // 2 % 2, i // 3 % 2], axis=1),
}


def data(dtype, seed=0, width=None):
    rng = np.random.default_rng(seed)
    width = width or int(rng.integers(1, 9))
    x = rng.standard_normal((ROWS, width)) * rng.uniform(0.1, 10, width) + rng.uniform(-5, 5, width)
    return rng, x.astype(dtype)


def hidden(rng):
    return tuple(int(n) for n in rng.integers(1, 9, size=rng.integers(1, 4)))


def mlp(rng, kind=MLPClassifier, **settings):
    return kind(hidden_layer_sizes=hidden(rng), max_iter=4, random_state=0, **settings)


def probabilities(estimator, x):
    """As our network gives them: a binary classifier's second column only."""
    p = estimator.predict_proba(x)
    binary = p.shape[1] == 2 and len(estimator.classes_) == 2
    return p[:, 1:] if binary else p


def predictions(estimator, x):
    y = estimator.predict(x)
    return y[:, None] if y.ndim == 1 else y


def dumped(estimator):
    return pytest.importorskip("skops.io").dumps(estimator)


def stored(estimator, tmp_path):
    path = tmp_path / "estimator.skops"
    path.write_bytes(dumped(estimator))
    return nnfwd.load(path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_classifier(target, activation, dtype, tmp_path):
    rng, x = data(dtype, seed=len(target + activation))
    y = TARGETS[target](np.arange(ROWS))
    estimator = mlp(rng, activation=activation).fit(x, y)
    net = from_sklearn(estimator)
    agree(net, x, probabilities(estimator, x), "sklearn", dtype)
    assert net.dtype == dtype
    assert net.classes == (None if target == "multilabel" else tuple(np.unique(y).tolist()))
    if net.classes is not None:
        assert {type(value) for value in net.classes} <= {str, int, float, bool}
    loaded = stored(estimator, tmp_path)
    assert loaded == net
    assert loaded.classes == net.classes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_regressor(outputs, activation, dtype, tmp_path):
    rng, x = data(dtype, seed=outputs)
    y = rng.standard_normal((ROWS, outputs)).astype(dtype).squeeze()
    estimator = mlp(rng, MLPRegressor, activation=activation).fit(x, y)
    net = from_sklearn(estimator)
    agree(net, x, predictions(estimator, x), "sklearn", dtype)
    assert net.classes is None
    assert net[-1].activation.name == "identity"
    assert stored(estimator, tmp_path) == net


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_regressor_of_counts_ends_in_an_exponential(dtype, tmp_path):
    if "loss" not in MLPRegressor().get_params():
        pytest.skip("scikit-learn before 1.7 has no loss='poisson'")
    rng, x = data(dtype, width=2)
    estimator = mlp(rng, MLPRegressor, loss="poisson").fit(x, rng.poisson(2, ROWS).astype(dtype))
    net = from_sklearn(estimator)
    assert net[-1].activation.name == "exp"
    agree(net, x, predictions(estimator, x), "sklearn", dtype)
    assert stored(estimator, tmp_path) == net


def test_weights_are_the_estimators_transposed():
    rng, x = data("float64")
    estimator = mlp(rng).fit(x, np.arange(ROWS) % 3)
    net = from_sklearn(estimator)
    for layer, weight, bias in zip(net, estimator.coefs_, estimator.intercepts_, strict=True):
        assert np.array_equal(layer.weight, weight.T)
        assert np.array_equal(layer.bias, bias)
    estimator.coefs_[0][:] = 0  # copies, not views
    assert net[0].weight.any()


def test_a_classifier_fitted_in_parts():
    rng, x = data("float64")
    estimator = mlp(rng).partial_fit(x, np.arange(ROWS) % 2, classes=[0, 1, 7])
    net = from_sklearn(estimator)
    assert net.classes == (0, 1, 7)
    agree(net, x, estimator.predict_proba(x), "sklearn", "float64")


def test_settings_that_are_scalars_of_numpy(tmp_path):
    """As a search over arrays of candidates leaves them behind."""
    rng, x = data("float64")
    scaler = MinMaxScaler(feature_range=(np.float64(-1), np.float32(2)), clip=np.bool_(True))
    estimator = make_pipeline(scaler, mlp(rng, activation=np.str_("tanh"))).fit(x, np.arange(ROWS) % 3)
    net = from_sklearn(estimator)
    agree(net, 2 * x, estimator.predict_proba(2 * x), "sklearn", "float64")
    assert stored(estimator, tmp_path) == net


def test_labels_that_are_objects(tmp_path):
    """As scikit-learn keeps those of a table's column, and skops then writes node by node."""
    rng, x = data("float64")
    estimator = mlp(rng).fit(x, NAMES[np.arange(ROWS) % 4])
    estimator.classes_ = estimator.classes_.astype(object)
    net = from_sklearn(estimator)
    assert net.classes == tuple(sorted(NAMES.tolist()))
    assert stored(estimator, tmp_path) == net


def test_neither_library_is_imported(tmp_path):
    path = tmp_path / "estimator.skops"
    path.write_bytes(dumped(fitted()))
    code = (
        f"import sys, nnfwd; net = nnfwd.load({str(path)!r}); "
        "print(len(net), sorted({'sklearn', 'skops', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n"


SCALERS = {
    "standard": lambda: [StandardScaler()],
    "no mean": lambda: [StandardScaler(with_mean=False)],
    "no std": lambda: [StandardScaler(with_std=False)],
    "neither": lambda: [StandardScaler(with_mean=False, with_std=False)],
    "minmax": lambda: [MinMaxScaler()],
    "range": lambda: [MinMaxScaler(feature_range=(-3, 2))],
    "clip": lambda: [MinMaxScaler(feature_range=(-1.5, 1), clip=True)],
    "two": lambda: [MinMaxScaler(), StandardScaler()],
    "nested": lambda: [make_pipeline(StandardScaler(), make_pipeline(MinMaxScaler(), "passthrough")), "passthrough"],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scalers", SCALERS)
def test_a_pipeline(scalers, dtype, tmp_path):
    rng, x = data(dtype, seed=len(scalers))
    estimator = make_pipeline(*SCALERS[scalers](), mlp(rng)).fit(x, NAMES[np.arange(ROWS) % 4])
    net = from_sklearn(estimator)
    elsewhere = (3 * x).astype(dtype)  # also outside the range that was fitted
    agree(net, elsewhere, probabilities(estimator, elsewhere), "sklearn", dtype)
    assert net.classes == tuple(sorted(NAMES.tolist()))
    assert stored(estimator, tmp_path) == net


def test_scalers_are_layers_of_their_own():
    _, x = data("float64", width=3)
    scalers = [
        StandardScaler(),
        MinMaxScaler(clip=True),
        StandardScaler(with_mean=False, with_std=False),
        "passthrough",
    ]
    estimator = make_pipeline(*scalers, make_pipeline(MLPClassifier(hidden_layer_sizes=(4,), max_iter=2))).fit(
        x, np.arange(ROWS) % 2
    )
    net = from_sklearn(estimator)
    assert [type(layer) for layer in net] == [Scale, Scale, Activation, Dense, Dense]
    assert np.array_equal(net[0].center, estimator[0].mean_)
    assert np.array_equal(net[0].scale, 1 / estimator[0].scale_)
    assert net[2].activation.parameters == {"lower": 0.0, "upper": 1.0}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaler", [StandardScaler(), StandardScaler(with_mean=False), MinMaxScaler((2, 5))])
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_scaled_target(outputs, scaler, dtype, tmp_path):
    rng, x = data(dtype, seed=3)
    y = (rng.standard_normal((ROWS, outputs)) * 50 + 20).astype(dtype).squeeze()
    regressor = make_pipeline(StandardScaler(), mlp(rng, MLPRegressor, activation="tanh"))
    estimator = TransformedTargetRegressor(regressor, transformer=scaler).fit(x, y)
    net = from_sklearn(estimator)
    assert type(net[-1]) is Scale
    agree(net, x, predictions(estimator, x), "sklearn", dtype)
    assert stored(estimator, tmp_path) == net


# What is refused


class Louder(MLPClassifier):
    """A class that might compute anything."""


def fitted(**settings):
    rng, x = data("float64", width=2)
    return MLPRegressor(hidden_layer_sizes=(1,), max_iter=1, **settings).fit(x, rng.standard_normal(ROWS))


OTHERS = {
    "PCA": lambda: make_pipeline(PCA(2), MLPClassifier(hidden_layer_sizes=(2,), max_iter=1)),
    "Ridge": Ridge,
    "StandardScaler": StandardScaler,
    "GridSearchCV": lambda: GridSearchCV(MLPClassifier(hidden_layer_sizes=(2,), max_iter=1), {"alpha": [0.1]}, cv=2),
    "Louder": lambda: Louder(hidden_layer_sizes=(2,), max_iter=1),
    "FunctionTransformer": lambda: TransformedTargetRegressor(MLPRegressor(hidden_layer_sizes=(2,), max_iter=1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_represented_is_named(name, tmp_path):
    _, x = data("float64", width=3)
    estimator = OTHERS[name]().fit(x, np.arange(ROWS) % 2)
    with pytest.raises(ModelFileError, match=rf"{name} cannot be represented: it must be "):
        from_sklearn(estimator)
    with pytest.raises(ModelFileError, match=rf"estimator\.skops: .*{name} cannot be represented"):
        stored(estimator, tmp_path)


UNFITTED = (
    MLPClassifier(),
    MLPRegressor(),
    make_pipeline(StandardScaler(), MLPClassifier()),
    TransformedTargetRegressor(MLPRegressor()),
)


@pytest.mark.parametrize("estimator", UNFITTED, ids=lambda estimator: type(estimator).__name__)
def test_what_is_not_fitted(estimator, tmp_path):
    with pytest.raises(ModelFileError, match="it is not fitted, call its fit first"):
        from_sklearn(estimator)
    with pytest.raises(ModelFileError, match="it is not fitted, call its fit first"):
        stored(estimator, tmp_path)


@pytest.mark.parametrize("value", [3, "MLPClassifier", None, MLPClassifier, [MLPClassifier()]])
def test_what_is_no_estimator(value):
    with pytest.raises(ModelFileError, match=r"cannot be represented: it must be scikit-learn's MLPClassifier"):
        from_sklearn(value)


def test_a_classifier_of_one_class():
    _, x = data("float64")
    with pytest.raises(ModelFileError, match="1 classes do not fit 1 outputs"):
        from_sklearn(MLPClassifier(hidden_layer_sizes=(2,), max_iter=1).fit(x, np.zeros(ROWS, dtype=int)))


# Hostile files

NEEDED = (
    *("steps", "coefs_", "intercepts_", "activation", "out_activation_", "_label_binarizer", "y_type_", "classes_"),
    *("with_mean", "with_std", "mean_", "scale_", "min_", "clip", "feature_range"),
)


def pruned(node):
    """A schema of only what is needed, which keeps the seeds small."""
    if isinstance(node, list):
        return [pruned(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: pruned(value) for key, value in node.items() if key not in ("__id__", "key_types", "is_json")}
    if node.get("__loader__") == "ObjectNode":
        attributes = kept["content"]["content"]
        kept["content"]["content"] = {key: value for key, value in attributes.items() if key in NEEDED}
    return kept


def files(node):
    """Every array that a schema names."""
    if isinstance(node, dict):
        return {node["file"]} if "file" in node else set().union(*map(files, node.values()))
    return set().union(*map(files, node)) if isinstance(node, list) else set()


def members(estimator):
    with zipfile.ZipFile(io.BytesIO(dumped(estimator))) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    schema = pruned(json.loads(found.pop("schema.json")))
    text = json.dumps(schema)
    names = {name: f"{i}.npy" for i, name in enumerate(sorted(files(schema), key=text.index))}
    for name, short in names.items():
        text = text.replace(name, short)
    return json.loads(text), {short: found[name] for name, short in names.items()}


def packed(schema, arrays):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("schema.json", schema if isinstance(schema, str) else json.dumps(schema))
        for name, content in arrays.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["regressor", "classifier", "pipeline"])
def test_damaged_files(kind, tmp_path, note):
    estimator = fitted()
    if kind != "regressor":
        _, x = data("float64", width=1)
        scaler = [MinMaxScaler(clip=True)] if kind == "pipeline" else []
        estimator = make_pipeline(*scaler, MLPClassifier(hidden_layer_sizes=(1,), max_iter=1)).fit(
            x, NAMES[np.arange(ROWS) % 2]
        )
    seed = packed(*members(estimator))
    path = tmp_path / "pruned.skops"
    path.write_bytes(seed)
    assert nnfwd.load(path) == from_sklearn(estimator)
    survives(tmp_path, ".skops", seed, note)


def attributes(schema):
    return schema["content"]["content"]


def node(name, module="builtins", loader="JsonNode", **content):
    return {"__class__": name, "__module__": module, "__loader__": loader, **content}


SYSTEM = node("system", "os", "FunctionNode", content="rm -rf")
REDUCED = node("system", "os", "ObjectNode", content=node("dict", loader="DictNode", content={}))


def header(descr, shape):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def pickled():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{1: 2}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def hostile(name, schema, arrays):
    """Makes one of the inventory of a small file's schema and arrays; the schema, or its text."""
    own = attributes(schema)
    first = own["coefs_"]["content"][0]
    if name == "os.system":
        return SYSTEM | {"protocol": 2}
    if name == "os.system made an object":
        return REDUCED | {"protocol": 2}
    if name == "os.system a weight":
        own["coefs_"]["content"][0] = SYSTEM
    if name == "os.system a weight by way of an object":
        own["coefs_"]["content"][0] = REDUCED
    if name == "os.system a setting":
        own["activation"] = SYSTEM
    if name == "a reference to itself":
        own["coefs_"]["content"][0] = node("list", loader="CachedNode", __id__=1)
        own["coefs_"]["__id__"] = 1
    if name == "one array used twice":
        own["coefs_"]["content"] = [first] * 2
    if name == "a path":
        first["file"] = "../../../../etc/passwd"
    if name == "an absolute path":
        first["file"] = "/etc/passwd"
    if name == "no name of a file":
        first["file"] = ["0.npy"]
    if name == "60 GB claimed":
        arrays[first["file"]] = header("<f8", (2**20, 2**13))
    if name == "another shape claimed":
        arrays[first["file"]] = header("<f8", (2, 2)) + b"\0" * 16
    if name == "an endless shape of nothing":
        arrays[first["file"]] = header("<U0", (10**18,))
    if name == "strings claimed":
        arrays[first["file"]] = header("<U1000", (2**20,))
    if name == "strings for weights":
        arrays[first["file"]] = header("<U1", (2,)) + "ab".encode("utf-32-le")
    if name == "a pickle":
        arrays[first["file"]] = pickled()
    if name == "a bomb":
        arrays["bomb.npy"] = b"\0" * 2**25
    if name == "a key twice":
        return '{"protocol": 2, ' + json.dumps(schema)[1:]
    if name == "deep JSON":
        own["loss_"] = json.loads("[" * 40 + "]" * 40)
    if name == "deep JSON inside":
        own["activation"]["content"] = "[" * 2000 + "]" * 2000
    if name == "a huge number":
        own["activation"]["content"] = "9" * 5000
    if name == "no protocol":
        del schema["protocol"]
    if name == "a protocol of tomorrow":
        schema["protocol"] = 3
    if name == "another activation":
        own["activation"]["content"] = '"gelu"'
    if name == "another output":
        own["out_activation_"]["content"] = '"relu"'
    if name == "a layer without a bias":
        own["intercepts_"]["content"].pop()
    if name == "no layers":
        own["coefs_"]["content"] = own["intercepts_"]["content"] = []
    if name == "numbers for weights":
        own["coefs_"]["content"][0] = node("str", content="[[1.0], [2.0]]")
    if name == "no content":
        del own["coefs_"]["content"]
    if name == "no node":
        own["coefs_"]["content"][0] = 7
    if name == "no schema":
        return "[]"
    return schema


HOSTILE = {
    "os.system": r"os\.system cannot be represented: its node is a FunctionNode",
    "os.system made an object": r"os\.system cannot be represented: it must be",
    "os.system a weight": r"os\.system cannot be represented",
    "os.system a weight by way of an object": r"coefs_\[0\] is .*os\.system.*: it must be a NumPy array",
    "os.system a setting": r"os\.system cannot be represented",
    "a reference to itself": "its node is a CachedNode",
    "one array used twice": r"the array 0\.npy is used twice",
    "a path": "no member ../../../../etc/passwd in the archive",
    "an absolute path": "no member /etc/passwd in the archive",
    "no name of a file": "no valid file",
    "60 GB claimed": "raise limits.tensor",
    "another shape claimed": "does not fill",
    "an endless shape of nothing": "itemsize",
    "strings claimed": "does not fill",
    "strings for weights": "real|dtype",
    "a pickle": "0.npy has dtype",
    "a bomb": "raise limits.expansion",
    "a key twice": "'protocol' stands twice",
    "deep JSON": "nested deeper than 32",
    "deep JSON inside": "nested deeper than 32",
    "a huge number": "5000 digits",
    "no protocol": "unknown protocol",
    "a protocol of tomorrow": "unknown protocol",
    "another activation": "unknown activation 'gelu': there are identity, logistic, tanh, relu",
    "another output": "unknown activation 'relu': there are identity, logistic, softmax, exp",
    "a layer without a bias": "2 coefs_ do not fit 1 intercepts_",
    "no layers": "0 coefs_ do not fit 0 intercepts_",
    "numbers for weights": r"coefs_\[0\] is .*: it must be a NumPy array",
    "no content": "no valid content",
    "no node": "no valid __loader__: 7",
    "no schema": "unknown protocol",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, tmp_path):

    schema, arrays = members(fitted())
    path = tmp_path / "hostile.skops"
    path.write_bytes(packed(schema, arrays))
    nnfwd.load(path)
    path.write_bytes(packed(hostile(name, schema, arrays), arrays))
    error = attempt(path)
    assert isinstance(error, ModelFileError)
    assert re.search(HOSTILE[name], str(error)), error


def test_a_member_that_is_a_path_is_only_a_name(tmp_path):
    schema, arrays = members(fitted())
    first = attributes(schema)["coefs_"]["content"][0]
    arrays["../outside.npy"] = arrays.pop(first["file"])
    first["file"] = "../outside.npy"
    path = tmp_path / "inside" / "path.skops"
    path.parent.mkdir()
    path.write_bytes(packed(schema, arrays))
    assert isinstance(attempt(path), nnfwd.Network)
    assert [found.name for found in tmp_path.rglob("*.npy")] == []


def test_limits(tmp_path):
    path = tmp_path / "limits.skops"
    path.write_bytes(packed(*members(fitted())))
    for limits, message in (
        (Limits(metadata=100), "more than 100"),
        (Limits(layers=1), "limits.layers"),
        (Limits(tensor=8), "limits.tensor"),
        (Limits(depth=3), "deeper than 3"),
    ):
        with pytest.raises(ModelFileError, match=message):
            nnfwd.load(path, limits=limits)


def test_pipeline_is_recognised_by_its_module():
    class Pipeline_(Pipeline):  # noqa: N801
        pass

    Pipeline_.__qualname__ = Pipeline_.__name__ = "Pipeline"
    with pytest.raises(ModelFileError, match=r"test_sklearn_files\.Pipeline cannot be represented"):
        from_sklearn(Pipeline_([("m", fitted())]))
