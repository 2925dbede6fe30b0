"""The two laws: nnfwd/ names no array library for the pass, backends/ restate no network."""

import ast
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import REQUIRED

ROOT = Path(__file__).parent.parent
LIBRARIES = {"cupy", "jax", "jaxlib", "torch", "dask", "array_api_strict", "tensorflow", "mlx"}
PRODUCTS = ("matmul", "dot", "einsum", "tensordot", "linear", "addmm")
PASS = ("forward.py", "activations.py", "erfc.py")
# How others run a network, as their own users write it, for `nnfwd bench` to measure ours against: a comparison needs
# what it compares with. Nothing else of nnfwd may import it, see below.
PEERS = ROOT / "nnfwd" / "benchmark" / "peers.py"
SOURCES = sorted(set((ROOT / "nnfwd").rglob("*.py")) - {PEERS})
BACKENDS = sorted((ROOT / "backends").rglob("*.py"))
PATH = os.pathsep.join((str(ROOT), str(ROOT / "backends")))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_library_names_no_array_library(path):
    tree = ast.parse(path.read_text())
    names = set(imported(tree))
    assert not {name for name in names if name.split(".")[0] in LIBRARIES}
    assert not {name for name in names if name.startswith(("array_api_compat.", "nnfwd_"))}
    asked = {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in ast.walk(tree)}
    assert not {name for name in asked if name.startswith("is_") and name.split("_")[1] in LIBRARIES | {"numpy"}}
    if path.name in PASS:
        assert not {name for name in names if name.split(".")[0] == "numpy"}, (
            "the pass names no library, not even NumPy"
        )


def test_only_the_benchmark_knows_the_peers():
    importing = {
        path.parent.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and "peers" in f"{node.module}.{'.'.join(a.name for a in node.names)}")
        or (isinstance(node, ast.Import) and any("peers" in alias.name for alias in node.names))
    }
    assert importing == {"benchmark"}
    loaded = run("import sys, nnfwd.benchmark, nnfwd.plot; print(*sys.modules)").split()
    assert not set(loaded) & (LIBRARIES | {"onnxruntime", "sklearn", "matplotlib"})


def test_the_layer_loop_stands_once():
    """Only forward.py multiplies matrices for the pass, and bounds/arrays.py for the bound; the reference loops."""
    found = {
        path.name
        for path in (*SOURCES, *BACKENDS)
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Call) and getattr(node.func, "attr", "") in PRODUCTS)
        or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult))
    }
    assert found - {"nnfwd_cupy.py"} == {"forward.py", "arrays.py"}  # CuPy's product is widened for 16 bits


@pytest.mark.parametrize("path", BACKENDS, ids=lambda path: path.name)
def test_backends_restate_no_network(path):
    tree = ast.parse(path.read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {
        "weight",
        "bias",
        "activation",
        "scale",
        "center",
        "shift",
        "layers",
        "exp",
        "tanh",
        "where_",
    }
    assert path.relative_to(ROOT / "backends").parts[0].startswith("nnfwd_")
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
    assert not [loop for loop in loops if "layers" in ast.unparse(loop.iter)], "no loop over layers"


def run(program, **environment):
    environment = {**os.environ, "PYTHONPATH": PATH, **environment}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_and_running_on_numpy_imports_no_other_library():
    loaded = run(
        "import sys, nnfwd, numpy\n"
        "net = nnfwd.Network.from_arrays([[[1.0, 2.0]]], [[0.5]], 'gelu')\n"
        "net(numpy.ones(2)), net([1, 2]), nnfwd.backends(), nnfwd.looped_feed_forward([1, 2], net)\n"
        "print(' '.join(sys.modules))"
    ).split()
    assert not set(loaded) & (
        LIBRARIES | {"matplotlib", "scipy", "sklearn", "mpmath", "threadpoolctl", "nnfwd_numpy.tiles"}
    )


def test_import_time(note, tmp_path):
    """`import nnfwd` against `import numpy`, in turn: the ratio is printed, what it loads besides is asserted."""
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}  # as it is once it is installed

    def seconds(module):
        start = time.perf_counter()
        run(f"import {module}", **compiled)
        return time.perf_counter() - start

    run("import nnfwd", **compiled)
    ratios = [seconds("nnfwd") / seconds("numpy") for _ in range(7)]
    note(f"import nnfwd / import numpy: {statistics.median(ratios):.2f} (bar 1.3)")
    loaded = run(
        "import numpy, sys; before = set(sys.modules); import nnfwd; print(*sorted(set(sys.modules) - before))"
    )
    heavy = {"importlib.metadata", "difflib", "pathlib", "zipfile", "json", "argparse", "nnfwd.io", "nnfwd.plot"}
    assert not heavy & set(loaded.split())


def test_required_backends_are_named_rightly():
    assert set(REQUIRED) <= {path.stem.removeprefix("nnfwd_") for path in (ROOT / "backends").iterdir()}
