"""`nnfwd.check`: what is right is inside, what is wrong is named with its smallest case and the likely cause."""

import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import emulated
import numpy as np
import pytest
from networks import inputs, mixed, tutorial
from places import need

import nnfwd
from nnfwd import Dense, Network, checking, cli, errors, plot


@pytest.fixture(autouse=True)
def few_networks(monkeypatch):
    monkeypatch.setattr(checking, "NETWORKS", 25)
    monkeypatch.setenv("JAX_ENABLE_X64", "0")  # the command sets it for its own process: here it must not stay


def faulty(fault, net=None, x=None, dtypes=("float32",)):
    """The report of the emulated device with a fault, and its row."""
    with emulated.set_to(emulated.fault, fault):
        report = nnfwd.check(net, x, backends=["emulated"], dtypes=dtypes)
    *_, row = (row for row in report.rows if row.device == "broken")
    return report, row


def test_every_place_is_inside():
    report = nnfwd.check()
    assert report.ok
    assert not report.failures
    for row in report.rows:
        assert row.verdict == "inside"
        assert 0 < row.worst <= 1
        assert row.quartiles[0] <= row.quartiles[1] <= row.quartiles[2] <= row.worst
        assert row.networks == 25
        assert row.outputs > row.rows > row.networks
        assert 0 < row.bound < 1
        assert not row.ulp_exceeded
    assert {row.backend for row in report.rows} >= {"numpy", "emulated", "array_api_strict"}
    assert any("numpy cpu bfloat16, numpy has no bfloat16" in text for text in report.notes)
    text = str(report)
    assert "All " in text
    assert "OUTSIDE" not in text
    assert all(str(row) in text for row in report.rows)


def test_given_data_has_a_row_of_its_own_plain_and_compiled():
    net, x = mixed(), inputs(100, 4)
    report = nnfwd.check(net, x, backends="numpy", dtypes="float32")
    alone, data = report.rows
    assert (alone.source, data.source) == ("random", "data")
    assert (data.networks, data.rows, data.outputs) == (1, 100, 2 * 100 * 2)
    assert alone == nnfwd.check(backends=["numpy"], dtypes=["float32"]).rows[0]
    assert nnfwd.check(list(net), backends=["numpy"], dtypes=["float32"]).rows[1].rows == 64


def test_a_bound_that_says_nothing_is_said_to():
    rng = np.random.default_rng(0)
    deep = Network([Dense(rng.standard_normal((32, 32)) / 4, None, "relu") for _ in range(12)])
    report = nnfwd.check(deep, backends="numpy", dtypes=["float16"])
    assert report.rows[1].vacuous == 1
    assert "numpy cpu float16 data: for 100% of the outputs the bound is as large as the outputs" in str(report)
    assert "as large as the outputs" not in str(nnfwd.check(deep, backends="numpy", dtypes=["float64"]))


def test_what_is_lost_of_the_data_is_said():
    report = nnfwd.check(mixed(), [[1e6, 1.0, np.nan, 1.0]], backends="numpy", dtypes=["float64", "float16"])
    assert "1 of 4 numbers of x are beyond the largest float16, and infinite there" in report.notes
    assert "1 of 4 numbers of x are NaN or infinite" in report.notes


def test_a_function_less_exact_than_its_row_is_not_right(monkeypatch):
    import nnfwd_numpy

    monkeypatch.setitem(nnfwd_numpy.ULP["float32"], "erfc", 0.1)
    report = nnfwd.check(backends="numpy", dtypes="float32")
    assert report.rows[0].verdict == "ulp exceeded"
    assert not report.ok
    assert "numpy cpu float32: erfc is" in str(report)


def test_a_library_set_against_the_precision_has_failed():
    torch = need("torch")
    torch.set_float32_matmul_precision("medium")
    try:
        report = nnfwd.check(backends="torch", dtypes="float32")
        assert report.rows[0].verdict.startswith("failed: precision=")
        assert nnfwd.check(backends="torch", dtypes="float32", precision="medium").ok
    finally:
        torch.set_float32_matmul_precision("highest")


def test_precision_is_what_is_checked():
    report = nnfwd.check(backends=["emulated"], dtypes=["float32"], precision="high")
    assert report.ok
    cores = report.rows[0]
    assert (cores.device, cores.precision) == ("tensor_cores", "high")


@pytest.mark.parametrize(
    ("fault", "likely", "dtypes"),
    [
        ("tf32", "products of TF32 numbers", ["float32"]),
        ("bfloat16", "products of bfloat16 numbers", ["float32"]),
        ("float32", "a computation narrowed to float32", ["float64"]),
        ("flushing", "subnormal numbers flushed to 0", ["float32"]),
        ("transposed", "a weight taken as (in, out)", ["float32"]),
        ("narrowed", "a result of float16, where float32 was asked for", ["float32"]),
    ],
)
def test_a_fault_is_named(fault, likely, dtypes, monkeypatch):
    monkeypatch.setattr(checking, "NETWORKS", 120)
    if fault in ("transposed", "flushing"):
        rng = np.random.default_rng(0)
        size = 1e-20 if fault == "flushing" else 1.0
        square = Network([Dense(rng.standard_normal((4, 4)) * size), Dense(rng.standard_normal((2, 4)))])
        report, row = faulty(fault, square, rng.standard_normal((5, 4)) * size, dtypes)
    else:
        report, row = faulty(fault, dtypes=dtypes)
    assert not report.ok
    assert row.verdict == "OUTSIDE"
    failure = report.failures[-1]
    assert failure.device == "broken"
    assert failure.likely.startswith(likely)
    assert likely in str(report)
    assert "NOT all right: emulated broken" in str(report)


def test_the_smallest_case_is_named():
    rng = np.random.default_rng(0)
    layers = [Dense(rng.standard_normal((4, 4)), None, "tanh") for _ in range(5)]
    report, _ = faulty("transposed", Network(layers), rng.standard_normal((50, 4)))
    failure = report.failures[-1]
    assert len(failure.network) == 1
    assert failure.x.shape[0] == 1
    assert abs(failure.computed - failure.exact) > failure.bound


def test_what_a_library_raises_is_a_finding(monkeypatch):
    def raises(*_):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(emulated, "tanh", raises)
    report = nnfwd.check(backends=["emulated"], dtypes=["float32"])
    assert not report.ok
    assert {row.verdict for row in report.rows} == {"failed: out of memory"}


def test_bad_arguments():
    net, x = tutorial()
    with pytest.raises(errors.UnknownNameError, match="unknown backend 'nunpy': did you mean 'numpy'"):
        nnfwd.check(backends=["nunpy"])
    with pytest.raises(errors.UnknownNameError, match="unknown precision"):
        nnfwd.check(precision="best")
    with pytest.raises(errors.DtypeError, match="dtypes is int8"):
        nnfwd.check(dtypes=["int8"])
    with pytest.raises(errors.ShapeError, match="cannot take x"):
        nnfwd.check(net, [*x, 4.0])
    with pytest.raises(errors.ShapeError, match="no rows"):
        nnfwd.check(net, np.zeros((0, 3)))
    with pytest.raises(errors.ShapeError, match="needs a network"):
        nnfwd.check(None, x)
    with pytest.raises(errors.ShapeError, match="nothing to check"):
        nnfwd.check(backends=[])
    with pytest.raises(errors.ArrayError, match="net is a int: it must be a Network or a list of layers"):
        nnfwd.check(3)


def test_a_callable_has_no_bound():
    def double(x, /, *, xp):
        return 2 * x

    with pytest.raises(errors.ArrayError, match="the rounding of the activation double is unknown"):
        nnfwd.check(Network([Dense(np.eye(2), None, double)]), backends=["numpy"])


def run(capsys, *arguments):
    status = cli.main(["check", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_command(tmp_path, capsys):
    net, x = mixed(), inputs(30, 4)
    nnfwd.save(net, tmp_path / "net.npz")
    np.save(tmp_path / "x.npy", x)
    status, out, err = run(
        capsys, tmp_path / "net.npz", "--data", tmp_path / "x.npy", "--backends", "numpy", "--dtypes", "float32",
        "--plot", tmp_path / "agreement.svg",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "inside their bounds" in out
    assert ElementTree.parse(tmp_path / "agreement.svg").getroot().tag.endswith("svg")
    status, out, _ = run(capsys, "--backends", "numpy,emulated", "--dtypes", "float32,float16", "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert found["ok"] is True
    assert {row["backend"] for row in found["rows"]} == {"numpy", "emulated"}


def test_the_command_fails_where_something_is_outside(capsys):
    with emulated.set_to(emulated.fault, "bfloat16"):
        status, out, _ = run(capsys, "--backends", "emulated", "--dtypes", "float32")
        assert status == 1
        assert "OUTSIDE" in out
        status, out, _ = run(capsys, "--backends", "emulated", "--dtypes", "float32", "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert (status, found["ok"]) == (1, False)
    failure = found["failures"][0]
    assert failure["likely"].startswith("products of bfloat16 numbers")
    assert isinstance(failure["bound"], float)
    assert failure["parameters"]


def test_the_command_refuses_bad_options(tmp_path, capsys):
    for arguments, message in {
        ("--data", "x.npy"): "--data x.npy needs a MODEL",
        ("--backends", "nunpy"): "unknown backend 'nunpy'",
        ("--dtypes", "int8"): "dtypes is int8",
        ("--plot", "x.txt"): "x.txt",
    }.items():
        status, _, err = run(capsys, *arguments)
        assert status == 1
        assert message in err
        assert err.count("\n") == 1


def test_the_picture_shows_every_row_and_what_is_outside():
    report, _ = faulty("bfloat16")
    ax = plot.agreement(report)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == [row.place for row in report.rows]
    marks = {line.get_marker() for line in ax.lines}
    assert {"o", "X"} <= marks
    assert plot.agreement(dataclasses.replace(report, rows=())).get_yticklabels() == []
