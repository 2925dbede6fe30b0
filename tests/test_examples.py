"""Every example runs, stays short, and prints what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from places import need

import nnfwd
from nnfwd.demo import digits

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PATH = os.pathsep.join((str(ROOT), str(ROOT / "backends")))
EXPECTED = {
    "tutorial": r"(?s)loops +0\.83545566.*feed_forward +0\.83545566.*matrices +0\.83545566",
    "every_library": r"numpy +cpu +numpy\.ndarray +float32 +\(3, 2\)",
    "gradients_jax": r"loss 0\.[0-4]\d+, accuracy 0\.9",
    "gradients_torch": r"loss 0\.[0-4]\d+, accuracy 0\.9",
    "switch": r"numpy\.ndarray of float32: the first ten digits are \[\d",
    "dask_pipeline": r"(?s)lazy: +dask\.array.*computed: \[0\.1",
    "train_digits": r"accuracy 0\.9[6-9]",
    "xarray_labels": r"(?s)lazy: +\('image', 'digit'\) dask\.array.*is a 9, read as 9.*accuracy: 0\.9[6-9]",
    "sklearn_pipeline": r"torch\.Tensor of torch\.float32: 4[3-5]\d of 450 are right",
    "zarr_store": r"(?s)streamed +\(18000, 10\) of float32.*accuracy 0\.9[6-9]",
    "torch_loader": r"450 images, 133200 bytes at one address in both libraries, accuracy 0\.9[6-9]",
    "trillion_rows": r"1\.0e\+12 +100 +32 +shared .* storage\n",
    "cluster": r"(?s)workers.*rows/s",
}
NEEDS = {
    "gradients_jax": ["jax"],
    "gradients_torch": ["torch"],
    "dask_pipeline": ["dask"],
    "train_digits": ["sklearn"],
    "xarray_labels": ["dask", "xarray"],
    "sklearn_pipeline": ["sklearn", "torch"],
    "zarr_store": ["dask", "zarr"],
    "torch_loader": ["jax", "torch"],
    "cluster": ["distributed"],
}


def run(path, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", str(path), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": PATH}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path, note):
    assert len(path.read_text().splitlines()) < 40
    for library in NEEDS.get(path.stem, ()):
        need(library)
    done = run(path, *([tmp_path] if path.stem == "train_digits" else []))
    assert done.returncode == 0, done.stderr
    assert re.search(EXPECTED[path.stem], done.stdout), done.stdout
    if path.stem == "train_digits":
        again, shipped = nnfwd.load(tmp_path / "digits.npz"), digits()[0]
        with np.load(tmp_path / "digits_heldout.npz") as held_out:
            assert np.array_equal(held_out["images"], digits()[1])
        same = "bit for bit" if again == shipped else "but for rounding"
        note(f"examples/train_digits.py trains the shipped network, {same}")
        assert [layer.structure for layer in again] == [layer.structure for layer in shipped]


@pytest.mark.parametrize("name", ["jax", "torch"])
def test_the_switch(name):
    need(name)
    done = run(ROOT / "examples" / "switch.py", name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(": ")[1] == run(ROOT / "examples" / "switch.py", "numpy").stdout.split(": ")[1]


def test_what_ships_is_small_and_good():
    data = ROOT / "nnfwd" / "data"
    assert sum(path.stat().st_size for path in data.iterdir()) < 100_000
    net, images, labels = digits()
    assert (net.in_features, net.out_features, images.shape, labels.shape) == (64, 10, (450, 64), (450,))
    assert np.mean(net(images).argmax(axis=-1) == labels) >= 0.96
