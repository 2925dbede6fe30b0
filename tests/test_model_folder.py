"""A folder of models from many libraries, described and run where none of these libraries can be imported."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from oracles import agree
from places import need

import nnfwd

ROOT = Path(__file__).parent.parent
FRAMEWORKS = (
    "jax",
    "keras",
    "tensorflow",
    "torch",
    "sklearn",
    "skops",
    "onnxruntime",
    "skl2onnx",
    "h5py",
    "safetensors",
)
RUN = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # importing it now raises ImportError
from nnfwd.cli import main
sys.exit(main(sys.argv[2:]))
"""
RNG = np.random.default_rng(3)
X = RNG.standard_normal((20, 4)).astype("float32")


def nnfwd_without(*arguments):
    return subprocess.run(
        [sys.executable, "-c", RUN, ",".join(FRAMEWORKS), *map(str, arguments)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "backends")))},
    )  # fmt: skip


def keras(folder):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    library = need("keras")
    layers = library.layers
    model = library.Sequential(
        [
            layers.Input((4,)), layers.Rescaling(0.5, 0.1), layers.Dense(8, use_bias=False), layers.BatchNormalization(),
            layers.LeakyReLU(negative_slope=0.3), layers.Dropout(0.5), layers.Dense(3, "softmax"),
        ]
    )  # fmt: skip
    for weight in model.weights:
        weight.assign(np.abs(RNG.standard_normal(weight.shape)).astype("float32"))
    with warnings.catch_warnings(action="ignore"):  # of Keras' own
        model.save(folder / "a.keras")
        model.save(folder / "a.h5")
        model.save_weights(folder / "weights.weights.h5")
    (folder / "a.json").write_text(model.to_json())
    y = np.asarray(model.predict(X, verbose=0))
    yield folder / "a.keras", [], y, "keras"
    yield folder / "a.h5", [], y, "keras"
    yield folder / "a.json", ["--weights", folder / "weights.weights.h5"], y, "keras"


def torch(folder):
    library = need("torch")
    nn = library.nn
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 8), nn.PReLU(8), nn.Linear(8, 2))
    library.save(model.state_dict(), folder / "a.pt")
    y = model(library.from_numpy(X)).detach().numpy()
    yield folder / "a.pt", ["--activations", "gelu_tanh,prelu,identity"], y, "torch"
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    np.savez(folder / "state.npz", **state)
    yield folder / "state.npz", ["--activations", "gelu_tanh,prelu,identity"], y, "torch"
    need("safetensors.numpy").save_file(state, folder / "a.safetensors")
    yield folder / "a.safetensors", ["--activations", "gelu_tanh,prelu,identity"], y, "torch"


def sklearn(folder):
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    skops = need("skops.io")
    names = np.array(["cat", "dog", "eel"])[RNG.integers(3, size=len(X))]
    with warnings.catch_warnings(action="ignore"):  # that it did not converge
        model = make_pipeline(StandardScaler(), MLPClassifier((6, 5), "tanh", max_iter=20)).fit(X, names)
    skops.dump(model, folder / "a.skops")
    yield folder / "a.skops", [], model.predict_proba(X), "sklearn", model.predict(X)


def onnx(folder):
    runtime = need("onnxruntime")
    need("onnx")
    net = nnfwd.Network.from_arrays(
        [RNG.standard_normal(shape).astype("float32") for shape in ((8, 4), (8, 8), (3, 8))],
        [None, np.ones(8, "float32"), None], ["silu", "mish", "softmax"],
    )  # fmt: skip
    nnfwd.save(net, folder / "b.onnx")
    session = runtime.InferenceSession((folder / "b.onnx").read_bytes(), providers=["CPUExecutionProvider"])
    yield folder / "b.onnx", [], session.run(None, {"x": X})[0], "onnxruntime"


@pytest.mark.parametrize("make", [keras, torch, sklearn, onnx])
def test_a_folder_of_models(make, tmp_path, note):
    np.save(tmp_path / "x.npy", X)
    for path, arguments, theirs, peer, *labels in make(tmp_path):
        described = nnfwd_without("info", path, *arguments, "--json")
        assert described.returncode == 0, described.stderr
        facts = json.loads(described.stdout)
        assert (facts["in"], facts["out"]) == (4, theirs.shape[1])
        assert len(facts["sha256"]) == 64
        out = tmp_path / f"{path.name}.npy"
        ran = nnfwd_without("run", path, tmp_path / "x.npy", "-o", out, *arguments)
        assert ran.returncode == 0, ran.stderr
        options = {"activations": ["gelu_tanh", "prelu", "identity"]} if "--activations" in arguments else {}
        options |= {"weights": arguments[1]} if "--weights" in arguments else {}
        net = nnfwd.load(path, **options)
        assert np.array_equal(np.load(out), net(X))
        dtype = str(theirs.dtype)
        note(f"{path.name}: {agree(net, X, theirs, peer, dtype):.2g} of what {peer} and we may differ by, {dtype}")
        if labels:
            out = tmp_path / "labels.npy"
            assert nnfwd_without("run", path, tmp_path / "x.npy", "-o", out, "--labels").returncode == 0
            assert np.array_equal(np.load(out), labels[0])


def test_one_command_for_a_mixed_folder(tmp_path):
    models = [path for make in (keras, torch, sklearn, onnx) for path, *_ in make(tmp_path)]
    done = nnfwd_without("info", *sorted(tmp_path.iterdir()))
    for path in models:
        assert (f"{path}: " in done.stdout) != (path.suffix == ".json"), done.stderr
    # the two halves of a Keras model say that they belong together; nothing else is refused
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == [
        str(tmp_path / "a.json"), str(tmp_path / "weights.weights.h5"),
    ]  # fmt: skip
    assert done.stderr.count("weights=") == 2
    assert done.stdout.count("not stated: give --activations") == 2 * 3
    again = nnfwd_without("info", *models, "--weights", tmp_path / "weights.weights.h5")
    assert again.returncode == 0, again.stderr


def test_info_goes_on_after_a_file_it_cannot_read(tmp_path):
    net = nnfwd.Network([nnfwd.Dense([[1.0, np.inf], [np.nan, 2.0]])], classes=["a", "b"], input_shape=(1, 2))
    nnfwd.save(net, tmp_path / "a.npz")
    (tmp_path / "b.onnx.npz").write_bytes(b"no")
    nnfwd.save(net, tmp_path / "c.safetensors")
    done = nnfwd_without("info", *sorted(tmp_path.iterdir()))
    assert done.returncode == 1
    assert "b.onnx.npz: not a valid .npz file" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout.count("layer 1 has 2 infinite or NaN parameters") == 2
    assert done.stdout.count("classes ('a', 'b')") == 2
    assert done.stdout.count("an input was (1, 2) before it was flattened to 2") == 2
    listed = json.loads(nnfwd_without("info", *sorted(tmp_path.iterdir()), "--json").stdout)
    assert [entry.get("non_finite") for entry in listed] == [2, None, 2]
