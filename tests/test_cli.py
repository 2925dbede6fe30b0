"""The command line: what it prints, its exit status, and its errors in one line."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from networks import inputs, mixed, tutorial
from places import need, places

import nnfwd
from nnfwd.cli import main
from nnfwd.streaming.sources import read_whole

ROOT = Path(__file__).parent.parent
PATH = os.pathsep.join((str(ROOT), str(ROOT / "backends")))


def nnfwd_command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "nnfwd.cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": PATH}, capture_output=True, text=True, **options,
    )  # fmt: skip


@pytest.fixture
def files(tmp_path):
    nnfwd.save(mixed(), tmp_path / "model.npz")
    np.save(tmp_path / "x.npy", inputs(6, 4))
    np.savetxt(tmp_path / "x.csv", inputs(6, 4), delimiter=",", header="a,b,c,d", comments="")
    np.savez(tmp_path / "x.npz", x=inputs(6, 4), other=np.ones(3))
    return tmp_path


@pytest.mark.parametrize("source", ["x.npy", "x.csv", "x.npz"])
@pytest.mark.parametrize("target", ["y.npy", "y.csv", "y.npz"])
def test_run(files, source, target, capsys):
    assert main(["run", str(files / "model.npz"), str(files / source), "-o", str(files / target)]) == 0
    out = capsys.readouterr().out
    assert "(6, 4) -> " in out
    assert "(6, 2) float32" in out
    y = read_whole(files / target).astype("float32")
    assert nnfwd.error_bound(mixed(), inputs(6, 4)).ratio(y).max() <= 1


def test_run_on_every_backend(files, capsys):
    for place in places():
        target = files / f"{place}.npy"
        status = main(
            ["run", str(files / "model.npz"), str(files / "x.npy"), "-o", str(target),
             "--backend", place.name, "--device", place.device, "--dtype", "float32"]
        )  # fmt: skip
        if hasattr(place.adapter, "apply"):  # it only hands on
            assert status == 1
            assert "name one, such as numpy" in capsys.readouterr().err
            continue
        assert status == 0
        assert np.load(target).dtype == "float32"


def test_run_says_nothing_when_quiet(files, capsys):
    arguments = ["run", str(files / "model.npz"), str(files / "x.npy"), "-o", str(files / "y.npy"), "--quiet"]
    assert main([*arguments, "--workers", "1"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(arguments) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "absent.npz", "x.npy", "-o", "y.npy"], "absent.npz"),
        (["run", "model.npz", "absent.npy", "-o", "y.npy"], "absent.npy"),
        (["run", "model.npz", "x.npy", "-o", "x.npy"], "is read from"),
        (["run", "model.npz", "x.npy", "-o", "x.npz"], "--force"),
        (["run", "model.npz", "x.npy", "-o", "y.txt"], ".npy, .npz, .csv"),
        (["run", "model.npz", "x.npy", "-o", "absent/y.npy"], "does not exist"),
        (["run", "model.npz", "x.npy", "-o", "y.npy", "--backend", "nunpy"], "did you mean 'numpy'"),
        (["run", "model.npz", "x.npy", "-o", "y.npy", "--device", "cuda:7"], "no device 'cuda:7'"),
        (["run", "model.npz", "x.npy", "-o", "y.npy", "--dtype", "int8"], "int8"),
        (["run", "x.npy", "x.npy", "-o", "y.npy"], "activations="),
        (["run", "model.npz", "x.npy", "-o", "y.npy", "--labels"], "holds no classes"),
        (["run", "model.npz", "x.npy", "-o", "y.npy", "--activations", "relu"], "leave activations= out"),
        (
            ["run", "model.npz", "x.npy", "-o", "y.npy", "--weights", "w.h5"],
            "weights is nothing that a file of NumPy npz needs",
        ),
        (["convert", "model.npz", "model.npz", "--force"], "is read from"),
        (["convert", "model.npz", "x.npy"], "no format .npy here: use .npz, .safetensors, .onnx"),
        (["convert", "model.npz", "x.npz"], "--force"),
    ],
)
def test_errors_are_one_line(files, arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(files)
    before = sorted(os.listdir(files))
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("nnfwd: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert not captured.out
    assert sorted(os.listdir(files)) == before
    with pytest.raises((nnfwd.errors.NnfwdError, OSError)):
        main([*arguments, "--debug"])


def test_force_replaces(files):
    arguments = ["run", str(files / "model.npz"), str(files / "x.npy"), "-o", str(files / "y.npy")]
    assert [main(arguments), main(arguments), main([*arguments, "--force"])] == [0, 1, 0]


def test_backends(capsys):
    assert main(["backends", "--devices", "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["numpy"] == {"name": "numpy", "version": np.__version__, "devices": ["cpu"], "status": "usable"}
    assert main(["backends"]) == 0
    assert f"numpy            {np.__version__}" in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["demo"], ["run"], ["backends"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "usage: nnfwd" in out
    assert not command or "example" in out


def test_without_a_command_and_version(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"nnfwd {nnfwd.__version__}\n"


def test_a_closed_pipe_is_quiet():
    done = subprocess.run(
        f"{sys.executable} -m nnfwd.cli demo -o {os.devnull}/x | head -n 2",
        shell=True, env={**os.environ, "PYTHONPATH": PATH}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith("1. The tutorial")
    assert not done.stderr


def test_demo(tmp_path):
    need("jax")
    done = nnfwd_command("demo", "-o", tmp_path / "pictures")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    lines = done.stdout.splitlines()
    looped = next(line for line in lines if line.startswith("       2    1"))
    assert looped.count("0.83545566") == 2
    bounded = nnfwd.error_bound(*tutorial(), dtype="float32")
    for place in places():
        if place.name in ("array_api_strict", "emulated"):  # the tests' own
            continue
        rows = [line for line in lines if line.startswith(f"   {place.name:8}{place.device:10}")]
        assert len(rows) == 2, place
        assert bounded.ratio(np.asarray([rows[0][18:].split()[0]], "float32")).max() <= 1
        rows, accuracy, *_ = rows[1].split()[2:]
        assert int(rows) == 450
        assert float(accuracy.rstrip("%")) >= 96
    assert "OUTSIDE" not in done.stdout
    assert "inside" in done.stdout
    if "matplotlib" in done.stdout:
        return
    names = ("activation", "activations", "bias", "digits", "network", "node", "weight")
    assert sorted(os.listdir(tmp_path / "pictures")) == sorted(f"{n}.{e}" for n in names for e in ("png", "svg"))


def test_labels_images_and_conversion(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    net = nnfwd.Network.from_arrays([rng.standard_normal((3, 6))], None, "softmax")
    net = nnfwd.Network(net, classes=["a", "b,c", "d"], input_shape=(2, 3))
    nnfwd.save(net, "model.npz")
    images = rng.standard_normal((7, 2, 3))
    np.save("x.npy", images)
    assert main(["run", "model.npz", "x.npy", "-o", "y.npy"]) == 0
    expected = net(images.reshape(7, 6))
    assert np.array_equal(np.load("y.npy"), expected)
    names = [net.classes[i] for i in expected.argmax(axis=-1)]
    for output in ("labels.npy", "labels.npz"):
        assert main(["run", "model.npz", "x.npy", "-o", output, "--labels"]) == 0
    assert np.load("labels.npy").tolist() == np.load("labels.npz")["y"].tolist() == names
    assert main(["run", "model.npz", "x.npy", "-o", "labels.csv", "--labels"]) == 0
    with open("labels.csv", newline="") as file:
        assert list(csv.reader(file)) == [[name] for name in names]
    assert main(["convert", "model.npz", "again.safetensors"]) == 0
    assert nnfwd.load("again.safetensors") == net
    assert "model.npz -> again.safetensors: 6 -> 3, float64" in capsys.readouterr().out


def test_info_of_bare_arrays(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", **{"0.weight": np.ones((3, 2)), "2.weight": np.ones((1, 3))})
    nnfwd.save(mixed(), "b.npz")
    assert main(["info", "a.npz", "b.npz"]) == 0
    out = capsys.readouterr().out
    assert out.count("not stated: give --activations") == 2
    assert main(["info", "a.npz", "--activations", "relu,leaky_relu(negative_slope=0.2)"]) == 0
    assert "leaky_relu(negative_slope=0.2)" in capsys.readouterr().out
    for wrong, words in (("relu,,relu", "names with commas between"), ("elu(a=1),relu", "unknown parameter of elu 'a'"),
                         ("elu(alpha=x),relu", "name(parameter=0.2)")):  # fmt: skip
        with pytest.raises(SystemExit):
            main(["info", "a.npz", "--activations", wrong])
        assert words in capsys.readouterr().err
    np.savez("c.npz", **{"0.weight": np.ones((3, 2, 5, 5))})
    assert main(["info", "c.npz"]) == 1
    assert "only linear layers" in capsys.readouterr().err
