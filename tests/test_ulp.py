"""The libraries' own functions, measured, stay within the rows that the bound takes for them; and the measuring itself.

`python -m nnfwd.ulp` measures more points, and prints what it finds beside each row.
"""

import functools
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import nnfwd_numpy
import numpy as np
import pytest
from places import DTYPES, need, places

from nnfwd import ulp
from nnfwd.bounds import Arithmetic
from nnfwd.reference import digits

ROOT = Path(__file__).parents[1]
PATH = os.pathsep.join([str(ROOT), str(ROOT / "backends")])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ulp.FUNCTIONS)
def test_errors_stay_within_their_rows(name, dtype):
    for place in places():
        if place.name != "dask" and place.has(dtype):
            with place.context(dtype):
                found = ulp.measure(place.adapter, name, dtype, device=place.device, points=200_000)
            assert found.points > 1000
            assert not found.exceeds, f"{place} {found}"


@pytest.mark.parametrize(("dtype", "end"), [("float32", 9.2), ("float64", 26.54)])
def test_erfc_is_right_to_its_last_normal_result(dtype, end, monkeypatch):
    """No factor of it underflows before it does: where subnormals are flushed, that would give 0."""
    monkeypatch.setattr(ulp, "_domain", lambda *_: (end - 0.05, end + 0.05))
    for place in places():
        if place.name != "dask" and place.has(dtype):
            with place.context(dtype):
                found = ulp.measure(place.adapter, "erfc", dtype, device=place.device, points=50_000)
            assert not found.exceeds, f"{place} {found}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ulp.FUNCTIONS)
def test_the_exact_values_are_exact(name, dtype):
    m, u = digits(), 2.0**-53
    (x,) = ulp._arguments(name, dtype, 100_000 if ulp._needs_digits(name, dtype) else 1000, exhaustive=False)
    head, tail = ulp._exact(name, x, dtype)
    for t, a, b in zip(x.tolist(), head.tolist(), np.broadcast_to(tail, head.shape).tolist(), strict=True):
        exact = getattr(m, name)(m.number(t))
        if abs(exact) > 1e-290:  # beyond, the tail may underflow
            assert abs(m.number(a) + b - exact) <= (0.01 if dtype == "float64" else 5) * u * abs(exact), t


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ulp.FUNCTIONS)
def test_every_16_bit_number_is_measured_once(name, dtype):
    patterns = np.arange(2**16, dtype="uint16")
    numbers = patterns.view("float16") if dtype == "float16" else (patterns.astype("uint32") << 16).view("float32")
    numbers = numbers[np.isfinite(numbers) & (np.abs(numbers) >= Arithmetic(dtype).smallest_normal)].astype("float64")
    low, high = ulp._domain(name, Arithmetic(dtype))
    (x,) = ulp._arguments(name, dtype, points=0, exhaustive=False)
    assert np.unique(x).size == x.size
    assert set(numbers[(numbers >= low) & (numbers <= high)]) <= set(x.tolist()) <= set(numbers)
    assert low - abs(low) / 256 <= x.min() < x.max() <= high + abs(high) / 256


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ulp.FUNCTIONS)
def test_points_are_everywhere_in_the_domain(name, dtype):
    low, high = ulp._domain(name, Arithmetic(dtype))
    needed = 500_000 * (ulp._SLOW if ulp._needs_digits(name, dtype) else 1)
    blocks = list(ulp._arguments(name, dtype, needed, exhaustive=False))
    x = np.concatenate(blocks)
    assert x.size == 500_000
    assert {block.dtype for block in blocks} == {np.dtype(dtype)}
    assert len({block.size for block in blocks}) == 2
    assert np.all((x >= np.dtype(dtype).type(low)) & (x <= np.dtype(dtype).type(high)))
    ends = [min(max(end, Arithmetic(dtype).smallest_normal), high) for end in (low, high)]
    assert set(range(*(math.frexp(end)[1] for end in ends))) <= set(np.frexp(x[x > 0])[1].tolist())
    assert np.histogram(x, 100, (low, high))[0].min() > 1000


def test_exhaustive_means_every_float32(monkeypatch):
    monkeypatch.setattr(ulp, "_domain", lambda *_: (-1.0, 1.0 + 2.0**-23))
    monkeypatch.setattr(ulp, "_BLOCK", 2**16)
    monkeypatch.setattr(ulp, "Arithmetic", lambda dtype: types.SimpleNamespace(smallest_normal=0.75))
    x = np.concatenate(list(ulp._arguments("exp", "float32", 0, exhaustive=True)))
    assert x.size == np.unique(x).size == 2 * (2**22 + 1) + 1
    assert (x.min(), x.max(), np.abs(x).min()) == (-1, 1 + 2.0**-23, 0.75)


def numpy_with(**functions):
    """NumPy's backend, with other functions, which cannot be recorded."""
    xp = types.SimpleNamespace(**{**vars(nnfwd_numpy.xp), **functions})
    return types.SimpleNamespace(**{**vars(nnfwd_numpy), "xp": xp, "compile": functools.partial})


def worse_exp(x):
    return np.exp(x) + 4 * np.spacing(np.exp(x))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_function_that_is_wrong_is_found(dtype):
    assert ulp.exceeded(nnfwd_numpy, dtype, "cpu") == []
    wrong = ulp.exceeded(numpy_with(exp=worse_exp), dtype, "cpu")
    assert wrong[0].name == "exp"
    assert 3.5 < wrong[0].error < 9.5  # 4 units above 1 are 8 below it
    assert {m.name for m in wrong} <= {"exp", "erfc"}


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_one_result_that_is_no_number_is_found(value):
    adapter = numpy_with(tanh=lambda x: np.where(x == x[777], np.float32(value), np.tanh(x)))
    (found,) = ulp.exceeded(adapter, "float32", "cpu")
    assert found.name == "tanh"
    assert found.error == math.inf if value else found.error > 1e6
    assert found.at == next(ulp._arguments("tanh", "float32", 20_000, exhaustive=False))[777]


def test_what_a_compiler_makes_of_a_function_is_measured_too():
    adapter = numpy_with()
    adapter.compile = lambda forward, layers: lambda x: forward(layers, x) * np.float32(1 + 2.0**-20)
    assert {m.name for m in ulp.exceeded(adapter, "float32", "cpu")} == set(ulp.FUNCTIONS)


def test_subnormal_arguments_and_results_are_left_out():
    assert ulp.exceeded(numpy_with(exp=lambda x: flushed(np.exp(flushed(x)))), "float32", "cpu") == []


def flushed(x):
    return np.where(np.abs(x) < np.finfo(x.dtype).smallest_normal, x.dtype.type(0), x)


def test_the_command_prints_what_it_measures(capsys):
    assert ulp.main(["--backend", "numpy", "--dtype", "float16", "float64", "bfloat16", "--points", "1000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("numpy")] == [
        "numpy cpu float16", "numpy cpu float64", "numpy cpu has no bfloat16 here",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[2:8]] == list(ulp.FUNCTIONS)
    assert "row  0.62" in lines[2]
    assert "EXCEEDED" not in "".join(lines)


def test_the_command_fails_where_a_row_is_exceeded(capsys, monkeypatch):
    monkeypatch.setitem(nnfwd_numpy.ULP, "float16", {**nnfwd_numpy.ULP["float16"], "log": 0.25})
    assert ulp.main(["--backend", "numpy", "--dtype", "float16"]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "EXCEEDED" in line)
    assert line.split()[0] == "log"


def test_the_command_refuses_an_unknown_backend(capsys):
    with pytest.raises(SystemExit) as exit:
        ulp.main(["--backend", "nympy"])
    assert exit.value.code == 2
    assert "nympy" in capsys.readouterr().err


def test_the_command_measures_float64_on_jax():
    need("jax")
    done = subprocess.run(
        [sys.executable, "-m", "nnfwd.ulp", "--backend", "jax", "--dtype", "float64", "--points", "1000"],
        env={**os.environ, "PYTHONPATH": PATH}, capture_output=True, text=True,
    )  # fmt: skip
    assert "float64" in done.stdout
    assert not done.stderr
    assert done.returncode == ("EXCEEDED" in done.stdout)
