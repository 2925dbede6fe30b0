"""What the README shows is what happens."""

import re
from pathlib import Path

import numpy as np
import pytest
from networks import tutorial
from places import need

import nnfwd

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S) if kind == language]


def run(block, names):
    for library in ("jax", "torch", "dask", "distributed"):
        if re.search(rf'"{library}"|import {library}|{library}(\.\w+)* import', block):
            need(library)
    exec(block, names)
    return names


def test_the_first_ten_lines():
    names = run(blocks("python")[0], {})
    assert f"{names['net']([1.5, 2, 3])[0]:.8f}" == "0.83545566"
    assert "0.8354556612475645" in blocks("python")[0]
    assert nnfwd.looped_feed_forward([1.5, 2, 3], names["net"]) == [0.8354556612475645]


@pytest.mark.parametrize("i", range(1, len(blocks("python"))))
def test_every_block_runs(i, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them writes a file
    names = {"np": np, "nnfwd": nnfwd, "net": tutorial()[0], "std": np.ones(4), "mean": np.zeros(4)}
    names |= {"W1": np.ones((5, 4)), "b1": np.ones(5), "W2": np.ones((3, 5)), "b2": np.ones(3), "W3": np.ones((2, 3))}
    if "array_api_strict" in blocks("python")[i]:
        need("numpy")
    run(blocks("python")[i], names)


def test_the_backend_is_shown_whole():
    file = (ROOT / "tests" / "nnfwd_array_api_strict.py").read_text()
    shown = next(block for block in blocks("python") if "_by_name" in block)
    assert shown.strip() in file


def test_the_demo_prints_what_it_says():
    from nnfwd.demo import _tutorial

    printed = list(_tutorial())
    shown = re.search(r"```\n(1\. The tutorial.*?)```", README, re.DOTALL).group(1).splitlines()
    assert shown[: shown.index("") + 6] == printed[: printed.index("") + 6]


def test_the_table_of_a_check_is_what_is_printed():
    from nnfwd import checking

    shown = next(block for block in blocks("") if block.startswith(checking.HEADER))
    report = nnfwd.check(backends=["numpy"], dtypes=["float32"])
    columns = [len(str(row)) for row in report.rows]
    assert columns == [len(line) for line in shown.splitlines() if line.startswith("numpy") and "float32" in line]
    assert report.summary.splitlines()[-4:-1] == shown.splitlines()[-4:-1]


def test_the_explanation_is_what_is_printed():
    from nnfwd.explain import explain

    shown = re.search(r"```\n(Layer 1.*?)```", README, re.DOTALL).group(1)
    assert shown.strip() in explain(*tutorial())


def test_pictures_and_files_exist():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert links
    headings = {
        re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-") for line in re.findall("^#+(.*)", README, re.M)
    }
    for link in links:
        assert link[1:] in headings if link.startswith("#") else (ROOT / link).exists(), link


def test_every_activation_is_listed():
    listed = README[README.index("- Activations:") : README.index("any callable")]
    assert all(re.search(rf"\b{name}\b", listed) for name in nnfwd.activations.names())


def test_the_set_up_is_one_line_each():
    commands = [line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")]
    assert len(commands) == 2
    assert commands[0].endswith("nnfwd demo")
    assert "pytest" in commands[1]
