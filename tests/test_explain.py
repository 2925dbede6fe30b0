"""The pass as text has the reference's numbers in it."""

import json
import re

import numpy as np
import pytest
from networks import ensemble, inputs, mixed, tutorial

import nnfwd
from nnfwd.cli import main
from nnfwd.demo import digits
from nnfwd.errors import ShapeError
from nnfwd.explain import describe, explain, table
from nnfwd.reference import looped_steps


@pytest.mark.parametrize(("net", "x"), [tutorial(), (mixed("float64"), inputs(4, dtype="float64").tolist())])
def test_every_number_is_the_references(net, x):
    text = explain(net, x)
    found = {float(number) for number in re.findall(r"-?\d+\.\d{8}", text)}
    for z, h in looped_steps(tuple(net), x):
        for value in (*z[:3], *h[:3]):
            assert float(f"{value:.8f}") in found or f"{value:.8g}" in text
    output = nnfwd.looped_feed_forward(x, net)
    assert all(f"{value:.8g}" in text.splitlines()[-3] for value in output[:3])
    assert "Both agree: inside the rounding-error bound" in text.splitlines()[-1]


def test_the_tutorials_sums_are_written_out():
    lines = explain(*tutorial()).splitlines()
    assert any("z1 = 0.2*1.5 + 0.2*2 + 0.2*3 + 0.8 " in line for line in lines)
    assert any("h1 = sigmoid(2.1) = 0.89090318 " in line for line in lines)
    assert any("z1 = 0.5*0.8909 + 0.5*0.9677 + 0.5*0.991 + 0.2 " in line for line in lines)
    assert any("[0.4 0.4 0.4] [  2] + [0.8] = [3.4]" in line for line in lines)
    assert lines[-3].endswith("(0.83545566)")
    assert lines[-2].endswith("(0.83545566)")


def test_a_difference_would_be_said(monkeypatch):
    import sys

    from nnfwd import explain as _  # noqa: F401

    module = sys.modules["nnfwd.explain"]
    whole = module.looped_steps

    def wrong(layers, x):
        for z, h in whole(layers, x):
            yield z, [value + 1e-9 for value in h]

    monkeypatch.setattr(module, "looped_steps", wrong)
    assert "THEY DIFFER" in explain(*tutorial())


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_it_fits(width):
    net, images, _ = digits()
    text = explain(net, images[0] / 16, width=width)
    assert "and 61 more nodes" in text
    assert "[61 more]" in text
    beside = [line for line in text.splitlines() if "z1 = " in line and "z = W x + b" in line]
    assert bool(beside) == (width == 200)
    if width >= 100:
        assert max(map(len, text.splitlines())) <= width


def test_what_cannot_be_explained():
    with pytest.raises(ShapeError, match="explain one member"):
        explain(ensemble(), inputs(4))
    with pytest.raises(ShapeError, match=r"\(2, 3\) is not one input"):
        explain(tutorial()[0], np.ones((2, 3)))


def test_info_counts():
    found = describe(mixed())
    assert [(row["kind"], row["in"], row["out"], row["parameters"], row["flops"]) for row in found["layers"]] == [
        ("Scale", 4, 4, 8, 12), ("Dense", 4, 5, 20 + 5 + 5, 2 * 20 + 5 + 5), ("Dense", 5, 6, 30, 60 + 6), ("Dense", 6, 2, 14, 24 + 2 + 2),
    ]  # fmt: skip
    assert (found["in"], found["out"], found["parameters"], found["flops"], found["dtype"]) == (
        4,
        2,
        82,
        156,
        "float32",
    )
    assert "prelu(negative_slope=array(5,))" in table(found)
    assert describe(ensemble())["members"] == 3
    assert describe(ensemble())["parameters"] == 3 * (20 + 5 + 10 + 2)


def test_command_line(tmp_path, capsys):
    nnfwd.save(mixed(), tmp_path / "model.npz")
    assert main(["explain"]) == 0
    assert "(0.83545566)" in capsys.readouterr().out
    assert main(["explain", str(tmp_path / "model.npz"), "--x", "1,2,3,4"]) == 0
    assert main(["explain", str(tmp_path / "model.npz")]) == 1
    assert "--x" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "model.npz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 82
    assert main(["info"]) == 0
    assert "16 parameters in float64" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["explain", "--x", "1,a"])
    assert "'1,a' is not a list of numbers" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["activation", "activations", "node", "weight", "bias", "network"])
@pytest.mark.parametrize("extension", ["png", "svg"])
def test_plot(what, extension, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'nnfwd[plot]'")
    path = tmp_path / f"picture.{extension}"
    assert main(["plot", what, "-o", str(path)]) == 0
    start = path.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if extension == "png" else b"<?xml" in start
    assert main(["plot", what, "-o", str(path)]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["plot", what, "-o", str(tmp_path / "picture.gif")]) == 1
    assert ".png, .svg, .pdf" in capsys.readouterr().err
