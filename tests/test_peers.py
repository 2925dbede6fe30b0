"""scikit-learn's own tests of its multi-layer perceptrons, their forward pass computed by nnfwd."""

import collections
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install scikit-learn")

HERE = Path(__file__).parent
PATH = os.pathsep.join(map(str, (HERE / "peers", HERE.parent, HERE.parent / "backends")))
TEST_MLP = Path(sklearn.__file__).parent / "neural_network" / "tests" / "test_mlp.py"
PLUGIN = ("-p", "sklearn_through_nnfwd")
WRONG = """
import sklearn_through_nnfwd as plugin

plugin.activations_of = lambda mlp: ["softsign"] * (mlp.n_layers_ - 2) + [mlp.out_activation_]
"""


def run(folder, *arguments):
    """The finished process, and the outcome of each test by its name."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    xml = folder / "outcomes.xml"
    xml.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", "pytest.ini", "-p", "no:cacheprovider", f"--junitxml={xml}",
         *arguments, str(TEST_MLP)],
        cwd=folder, env={**os.environ, "PYTHONPATH": PATH, "SKLEARN_SEED": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert xml.exists(), done.stderr
    cases = ElementTree.parse(xml).iter("testcase")
    return done, {case.get("name"): " ".join(child.tag for child in case) or "passed" for case in cases}


def test_scikit_learns_tests_do_not_tell_the_difference(tmp_path, note):
    _, without = run(tmp_path)
    done, through = run(tmp_path, *PLUGIN)
    assert through == without, done.stdout
    passes = re.search(r"([\d,]+) passes through nnfwd", done.stdout)[1]
    assert int(passes.replace(",", "")) > 1000
    counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(collections.Counter(through.values()).items()))
    note(f"scikit-learn {sklearn.__version__}'s test_mlp.py: {passes} passes through nnfwd, {counts}, as without")


def test_scikit_learns_tests_tell_a_wrong_activation(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    few = ("-k", "test_fit or test_gradient")
    assert run(tmp_path, *PLUGIN, *few)[1] == {"test_fit": "passed", "test_gradient": "passed"}
    assert run(tmp_path, *PLUGIN, "-p", "wrong", *few)[1] == {"test_fit": "failure", "test_gradient": "failure"}


def test_the_plugin_fails_where_nothing_goes_through_it(tmp_path):
    done, _ = run(tmp_path, *PLUGIN, "-k", "no_such_test")
    assert done.returncode == 1
    assert "nothing went through nnfwd" in done.stderr
