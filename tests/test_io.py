"""Model files and data files: round trips, and nothing half-written. Damaged ones are in test_bad_input.py."""

import json
import os
import zipfile

import numpy as np
import pytest
from hostile import survives
from networks import ensemble, mixed, tutorial
from places import need

import nnfwd
from nnfwd import Activation, Dense, Network, activations
from nnfwd.errors import ModelFileError
from nnfwd.io import WRITTEN, Limits


@pytest.mark.parametrize("net", [mixed(), mixed("float64"), mixed("float16"), ensemble(), tutorial()[0]], ids=repr)
def test_round_trip_is_bit_identical(net, tmp_path):
    nnfwd.save(net, tmp_path / "a.npz")
    again = nnfwd.load(tmp_path / "a.npz")
    assert again == net
    nnfwd.save(again, tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert sorted(a.files) == sorted(b.files)
        for key in a.files:
            assert (a[key].dtype, a[key].tobytes()) == (b[key].dtype, b[key].tobytes())


def test_every_activation_is_kept(tmp_path):
    layers = []
    for name in activations.names():
        f = activations.named(name)
        layers.append(Activation(f(**dict.fromkeys(f.parameters, 0.25))))
    layers.append(Activation(activations.prelu(negative_slope=[0.1, 0.2])))
    net = Network(layers)
    nnfwd.save(net, tmp_path / "a.npz")
    assert nnfwd.load(tmp_path / "a.npz") == net


def test_a_network_of_another_library_is_saved(tmp_path):
    need("jax")
    nnfwd.save(mixed().to("jax"), tmp_path / "a.npz")
    assert nnfwd.load(tmp_path / "a.npz") == mixed()
    with pytest.raises(ModelFileError, match="bfloat16.*float32"):
        nnfwd.save(mixed().to("jax", dtype="bfloat16"), tmp_path / "b.npz")


def test_plain_keys(tmp_path):
    nnfwd.save(tutorial()[0], tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        assert set(archive.files) == {
            "nnfwd", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias",
        }  # fmt: skip
        assert json.loads(bytes(archive["nnfwd"]))["layers"][0] == {
            "type": "dense", "activation": {"name": "sigmoid"}, "weight": None, "bias": None,
        }  # fmt: skip


@pytest.mark.parametrize("extension", WRITTEN)
def test_a_failed_save_leaves_the_old_file(extension, tmp_path, monkeypatch):
    if extension == ".onnx":
        need("onnx")
    path = tmp_path / f"a{extension}"
    nnfwd.save(tutorial()[0], path)
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        nnfwd.save(mixed(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_damaged_npz(tmp_path, note):
    path = tmp_path / "a.npz"
    nnfwd.save(Network([Dense([[1.0, 2.0]], [0.5], activations.elu(alpha=2.0))]), path)
    survives(tmp_path, ".npz", path.read_bytes(), note)


def test_damaged_npy(tmp_path, note):
    path = tmp_path / "a.npy"
    np.save(path, np.ones((3, 2)))
    survives(tmp_path, ".npy", path.read_bytes(), note, activations="relu")


def test_limits_come_before_allocation(tmp_path):
    path = tmp_path / "a.npz"
    nnfwd.save(mixed(), path)
    for limits in (Limits(file=10), Limits(metadata=10), Limits(tensors=2), Limits(layers=2), Limits(dimension=3)):
        with pytest.raises(ModelFileError):
            nnfwd.load(path, limits=limits)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("nnfwd.npy", bytes(10**8))
    with pytest.raises(ModelFileError, match="expands"):
        nnfwd.load(path)


def test_what_is_no_model_file(tmp_path):
    for name, content, match in (
        ("a.npz", b"", "a.npz: the file is empty"),
        ("a.pkl", b"x", r"a.pkl: a pickle runs code.*skops.io.dump"),
        ("a.txt", b"x", r"no model format .txt: use .npz, .npy, .safetensors"),
        ("a.json", b"{}", "neither a network of lwtnn .* nor one of Keras"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelFileError, match=match):
            nnfwd.load(tmp_path / name)
    with pytest.raises(ModelFileError, match="is a folder: name the model's file in it"):
        nnfwd.load(tmp_path)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ModelFileError, match="not a regular file"):
        nnfwd.load(tmp_path / "pipe.npz")
