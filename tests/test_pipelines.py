"""The network in the pipelines of others: xarray, scikit-learn, Zarr, a PyTorch DataLoader; and the plan for a cluster.

Each test runs an example and looks at what it made; test_examples.py reads what it prints.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from places import need

import nnfwd
from nnfwd.demo import digits

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PATH = os.pathsep.join((str(ROOT), str(ROOT / "backends")))


def run(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def refuse(*arguments, **options):
    raise AssertionError("a Dask graph was computed")


def test_xarray_keeps_its_labels():
    need("dask")
    need("xarray")
    y = run("xarray_labels")["y"]
    net, images, labels = digits()
    assert nnfwd.backend.name_of(nnfwd.backend.of(y.data)) == "dask"
    assert (y.dims, y.shape, y.chunks) == (("image", "digit"), (450, 10), ((150, 150, 150), (10,)))
    assert y.image.values.tolist() == list(range(1000, 1450))
    assert y.digit.values.tolist() == list(range(10))
    assert np.array_equal(y.truth, labels)
    bound = nnfwd.error_bound(net, images, dtype="float32")
    assert bound.ratio(y.transpose("image", "digit").to_numpy()).max() <= 1
    assert bound.ratio(y.to_numpy()[::-1]).max() > 1


def test_xarray_stays_lazy(capsys):
    need("dask")
    need("xarray")
    import dask

    with dask.config.set(scheduler=refuse), pytest.raises(AssertionError, match="computed"):
        run("xarray_labels")
    assert re.search(r"lazy: .*'image', 'digit'.*shape=\(450, 10\)", capsys.readouterr().out)


@pytest.mark.parametrize("library", ["torch", "array_api_strict", "numpy"])
def test_a_scikit_learn_pipeline_keeps_the_library(library):
    """In a process of its own: SciPy reads the variable that the example sets when it is imported, and keeps to it."""
    need("sklearn")
    need(library)
    program = """
import runpy, sys, nnfwd
ran = runpy.run_path(sys.argv[2])
x, y, scaler = ran["x"], ran["y"], ran["pipeline"][0]
assert sys.argv[1] in type(x).__module__, type(x)
assert type(y) is type(scaler.scale_) is type(x), (type(y), type(scaler.scale_))
assert (y.dtype, y.device, tuple(y.shape)) == (x.dtype, x.device, (450, 10)), (y.dtype, y.device, y.shape)
with ran["sklearn"].config_context(array_api_dispatch=True):
    scaled = scaler.transform(x)
assert nnfwd.error_bound(ran["net"][1:], scaled).ratio(y).max() <= 1
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", program, library, EXAMPLES / "sklearn_pipeline.py"],
        env={**os.environ, "PYTHONPATH": PATH}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_zarr_to_zarr(capsys):
    need("dask")
    need("zarr")
    ran = run("zarr_store")
    net, images, _ = digits()
    bound = nnfwd.error_bound(net, np.tile(images, (40, 1)), dtype="float32")
    for y in (ran["streamed"], ran["by_dask"]):
        assert (y.shape, y.dtype) == ((18000, 10), "float32")
        assert bound.ratio(y).max() <= 1
    assert re.search(r"dask +\(18000, 10\) of float32 in chunks of \(3000, 10\)", capsys.readouterr().out)


def test_a_batch_reaches_jax_uncopied():
    need("torch")
    need("jax")
    ran = run("torch_loader")
    batch, x, y, out = (ran[name] for name in ("batch", "x", "y", "out"))
    assert x.unsafe_buffer_pointer() == batch.data_ptr()
    assert y.unsafe_buffer_pointer() == out.data_ptr()
    net, images, _ = digits()
    assert nnfwd.error_bound(net, images[-150:].astype("float32")).ratio(out).max() <= 1
    y.block_until_ready()
    batch[3, 5] = -7  # what one library writes, the other reads
    assert np.from_dlpack(x)[3, 5] == -7


def test_memory_that_jax_would_copy_is_refused():
    torch, jax = need("torch"), need("jax")
    aligned = torch.zeros(65)
    assert aligned.data_ptr() % 64 == 0
    jax.numpy.from_dlpack(aligned, copy=False)
    with pytest.raises(ValueError, match="64 bytes"):
        jax.numpy.from_dlpack(aligned[1:], copy=False)


def test_the_plan_for_a_trillion_rows(capsys):
    """The bottleneck of a line is its largest time; the numbers a row are those of 16-64-32-32-5."""
    ran = run("trillion_rows")
    assert (ran["widths"], ran["flops"], ran["numbers"]) == ([16, 64, 32, 32, 5], 8512, 277)
    header, *lines = capsys.readouterr().out.splitlines()
    names = header.split("bottleneck")[0].split()[-4:]
    table = [line.split() for line in lines[:-2]]
    assert names == ["storage", "PCIe", "HBM", "arithmetic"]
    for *_, storage, pcie, hbm, arithmetic, bottleneck in table:
        times = dict(zip(names, map(float, (storage, pcie, hbm, arithmetic)), strict=True))
        assert bottleneck == max(times, key=times.get)
    assert {row[-1] for row in table} == {"storage", "PCIe", "HBM"}
    shared = next(row for row in table if row[:4] == ["1.0e+12", "100", "32", "shared"])
    assert shared[4] == f"{1e12 * (64 / 500e9 + 20 / 250e9):.2g}"
