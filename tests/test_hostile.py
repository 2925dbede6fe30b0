"""Model files with edits that Hypothesis draws: whatever they are, `load` gives a network or a ModelFileError."""

import io
import json
import os
import tracemalloc
import warnings

import numpy as np
import pytest
from hostile import attempt
from hypothesis import given
from hypothesis import strategies as st
from places import need

import nnfwd
from nnfwd import Activation, Dense, Network, Scale, activations
from nnfwd.errors import ModelFileError
from nnfwd.io import FORMATS, READ

NET = Network(
    [
        Scale([1.0, 2.0], center=0.5),
        Dense([[1.0, 2.0], [0.5, 0.25], [3.0, -1.0]], [0.5, 0.0, 1.0], activations.leaky_relu(negative_slope=0.25)),
        Dense([[1.0, 2.0, 3.0]], None, "sigmoid"),
    ],
    classes=["no", "yes"],
)
STATE = {"0.weight": np.float32([[1, 2], [3, 4]]), "0.bias": np.float32([0, 1]), "2.weight": np.float32([[1, 2]])}


def saved(extension):
    def make(folder):
        nnfwd.save(NET, folder / f"a{extension}")
        return (folder / f"a{extension}").read_bytes()

    return make


def npy(folder):
    np.save(folder / "a.npy", STATE["0.weight"])
    return (folder / "a.npy").read_bytes()


def onnx(folder):
    need("onnx")
    return saved(".onnx")(folder)


def torch(folder):
    library = need("torch")
    file = io.BytesIO()
    library.save({name: library.from_numpy(a) for name, a in STATE.items()}, file)
    return file.getvalue()


def keras_file(extension):
    def make(folder):
        os.environ.setdefault("KERAS_BACKEND", "jax")
        need("h5py")
        keras = need("keras")
        model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(2, "relu"), keras.layers.Dense(1)])
        with warnings.catch_warnings(action="ignore"):  # of Keras' own
            model.save(folder / f"a{extension}")
        return (folder / f"a{extension}").read_bytes()

    return make


def skops(folder):
    library = need("skops.io")
    from sklearn.neural_network import MLPRegressor

    estimator = MLPRegressor(hidden_layer_sizes=(2,), max_iter=250, tol=1e9, n_iter_no_change=1).fit(np.eye(2), [0, 1])
    return library.dumps(estimator)


def nnet(folder):
    return b"// text\n2,2,1,2,\n2,2,1,\n0,\n-1,-1,\n1,1,\n0,0,0,\n1,1,1,\n1,2,\n3,4,\n0,\n1,\n1,2,\n0,\n"


def lwtnn(folder):
    layer = {"architecture": "dense", "activation": "rectified", "weights": [1, 2, 3, 4], "bias": [0, 1]}
    inputs = [{"name": name, "offset": 0.5, "scale": 2} for name in "ab"]
    return json.dumps({"inputs": inputs, "layers": [layer], "outputs": ["c", "d"], "defaults": {}}).encode()


SEEDS = {
    ".npz": saved(".npz"), ".npy": npy, ".safetensors": saved(".safetensors"), ".onnx": onnx, ".nnet": nnet,
    ".keras": keras_file(".keras"), ".h5": keras_file(".h5"), ".json": lwtnn, ".pt": torch, ".skops": skops,
}  # fmt: skip
GIVEN = {".npy": {"activations": "relu"}, ".pt": {"activations": "relu"}}
SAME = {".hdf5": ".h5", ".pth": ".pt", ".ckpt": ".pt", ".bin": ".pt"}

edit = st.tuples(
    st.sampled_from(["cut", "insert", "overwrite", "double"]),
    st.floats(0, 1),
    st.one_of(st.binary(min_size=1, max_size=16), st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f"])),
)


def edited(data: bytes, edits) -> bytes:
    for kind, where, with_ in edits:
        i = int(where * len(data))
        after = {
            "cut": data[i + len(with_) :],
            "insert": with_ + data[i:],
            "overwrite": with_ + data[i + len(with_) :],
            "double": data[i : i + 8 * len(with_)] + data[i:],
        }
        data = data[:i] + after[kind]
    return data


def test_every_extension_has_a_seed():
    assert set(SEEDS) | set(SAME) == set(READ)
    assert {extension for known in FORMATS for extension in known.extensions} == set(READ)


@pytest.mark.parametrize("extension", SEEDS)
def test_edited_files(extension, tmp_path_factory, note):
    folder = tmp_path_factory.mktemp("hostile")
    seed = SEEDS[extension](folder)
    path = folder / f"b{extension}"
    path.write_bytes(seed)
    whole = nnfwd.load(path, **GIVEN.get(extension, {}))
    assert isinstance(whole, Network)
    counts = {"refused": 0, "read": 0}

    @given(st.lists(edit, min_size=1, max_size=4))
    def check(edits):
        path.write_bytes(edited(seed, edits))
        outcome = attempt(path, **GIVEN.get(extension, {}))
        counts["refused" if isinstance(outcome, ModelFileError) else "read"] += 1

    tracemalloc.start()
    try:
        check()
    finally:
        tracemalloc.stop()
    note(f"{sum(counts.values())} edited {extension} files: {counts['refused']} refused, {counts['read']} read")
    assert counts["refused"] > counts["read"] // 4


def test_a_layer_of_ones_own_is_not_written_anywhere(tmp_path):
    def double(x, /, *, xp):
        return 2 * x

    for extension in (".npz", ".safetensors"):
        with pytest.raises(ModelFileError, match=rf"a{extension}: layer 0: the activation double is a callable"):
            nnfwd.save(Network([Activation(double)]), tmp_path / f"a{extension}")
    assert list(tmp_path.iterdir()) == []
