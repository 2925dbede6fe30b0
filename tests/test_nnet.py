""".nnet files: what is read is what the text says, and everything else is refused by line."""

import re
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hostile import attempt, survives

import nnfwd
from nnfwd import Activation, Dense, Limits, Network, Scale, activations
from nnfwd.errors import ModelFileError

# In powers of 2, so that every step is exact.
SMALL = """\
// A comment, Zürich
//another one
2,2,1,3,
2,3,1,
0,
-1.0,-2.0,
1.0,2.0,
0.5,0.0,4.0,
2.0,4.0,8.0,
1,2,
-0.5,0.25e0,
0,-1,
0.5,
0,
-.25,
2,-4,1,
1.5,
"""


def lines(text=SMALL, **changes):
    """The text with line `_n` put instead of line n, from 1."""
    found = text.splitlines()
    for name, line in changes.items():
        found[int(name.removeprefix("_")) - 1] = line
    return "\n".join(line for line in found if line is not None) + "\n"


def load(tmp_path, text, **arguments):
    path = tmp_path / "small.nnet"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return nnfwd.load(path, **arguments)


def written(weights, biases, minima, maxima, means, ranges):
    """As the format's own writeNNet, but with every digit."""
    sizes = [weights[0].shape[1], *map(len, biases)]
    head = [[len(weights), sizes[0], sizes[-1], max(sizes)], sizes, [0], minima, maxima, means, ranges]
    body = [row for w, b in zip(weights, biases, strict=True) for row in (*w.tolist(), *([v] for v in b.tolist()))]
    return "// drawn\n" + "".join(",".join(map(repr, map(_plain, row))) + ",\n" for row in (*head, *body))


def _plain(number):
    return number.item() if hasattr(number, "item") else number


def test_a_small_network(tmp_path):
    net = load(tmp_path, SMALL)
    assert net == Network(
        [
            Activation(activations.clip(lower=[-1.0, -2.0], upper=[1.0, 2.0])),
            Scale([0.5, 0.25], center=[0.5, 0.0]),
            Dense([[1.0, 2], [-0.5, 0.25], [0, -1]], [0.5, 0, -0.25], "relu"),
            Dense([[2.0, -4, 1]], [1.5]),
            Scale(8.0, shift=4.0),
        ]
    )
    assert net.dtype == "float64"
    # Normalised (0.25, 0.5), hidden (1.75, 0, 0), 5 * 8 + 4; then (-0.75, 0.5), (0.75, 0.5, 0), 1 * 8 + 4, also clipped.
    assert net([[1.0, 2.0], [-1.0, 2.0], [-100.0, 7.0]]).tolist() == [[44.0], [12.0], [12.0]]


@pytest.mark.parametrize("seed", range(10))
def test_networks_of_random_sizes(seed, tmp_path):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 12, size=rng.integers(2, 6))
    weights = [rng.standard_normal((n, m)) * 10.0 ** rng.integers(-9, 9) for m, n in pairwise(sizes)]
    biases = [rng.standard_normal(n) for n in sizes[1:]]
    n = sizes[0]
    minima, means, ranges = rng.standard_normal(n), rng.standard_normal(n + 1), rng.uniform(0.1, 9, n + 1)
    maxima = minima + 1
    net = load(tmp_path, written(weights, biases, minima, maxima, means, ranges))
    hidden = ["relu"] * (len(weights) - 1) + ["identity"]
    assert net == Network(
        [
            Activation(activations.clip(lower=minima, upper=maxima)),
            Scale(1 / ranges[:n], center=means[:n]),
            *(Dense(*layer) for layer in zip(weights, biases, hidden, strict=True)),
            Scale(ranges[n], shift=means[n]),
        ]
    )


def test_the_smallest_file_that_holds_its_numbers(tmp_path):
    text = "1,40,1,40\n40,1\n0\n" + "".join(f"{line}\n" for line in (*["1" + ",1" * 39] * 2, *["1" + ",1" * 40] * 2))
    net = load(tmp_path, text + "1" + ",1" * 39 + "\n1")
    assert net(np.ones(40)).tolist() == [2.0]  # normalised 0, bias 1, back: 1 + 1


def test_memory(tmp_path):
    """Of a network, as it is read: itself, and one layer before it is copied."""
    rng = np.random.default_rng(0)
    sizes = [300, 300, 300, 300, 1]
    weights = [rng.standard_normal((n, m)) for m, n in pairwise(sizes)]
    biases = [np.zeros(n) for n in sizes[1:]]
    text = written(weights, biases, np.zeros(300), np.ones(300), np.zeros(301), np.ones(301))
    path = tmp_path / "large.nnet"
    path.write_text(text)
    nnfwd.load(path)
    tracemalloc.start()
    try:
        nnfwd.load(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (3 + 1) * weights[0].nbytes + 2**18


@pytest.mark.parametrize(
    "text",
    [
        SMALL.replace("\n", "\r\n"),
        SMALL.replace(",\n", "\n"),
        SMALL.replace(",", " , "),
        SMALL.rstrip("\n"),
        SMALL + "\n  \n",
        SMALL.split("another one\n")[1],
    ],
    ids=["Windows", "no last comma", "spaces", "no last line end", "blank lines after", "no comments"],
)
def test_other_spellings(text, tmp_path):
    assert load(tmp_path, text) == load(tmp_path, SMALL)


def test_numbers_that_are_not_finite_are_kept(tmp_path):
    net = load(tmp_path, lines(_6="-inf,-2", _7="Infinity,2", _10="nan,2"))
    assert net[0].activation.parameters["lower"].tolist() == [-np.inf, -2]
    assert np.isnan(net[2].weight[0, 0])


REFUSED = {
    "an empty file": ("", "the file is empty"),
    "comments only": ("// a\n// b\n", "line 3 is blank or missing"),
    "three counts": (lines(_3="2,2,1,"), "line 3: 3 counts"),
    "no layers": (lines(_3="0,2,1,3"), "positive whole numbers"),
    "negative sizes": (lines(_3="2,-2,1,3"), "positive whole numbers"),
    "half a layer": (lines(_3="2.5,2,1,3"), "positive whole numbers"),
    "layers without end": (lines(_3="inf,2,1,3"), "positive whole numbers"),
    "no number of layers": (lines(_3="nan,2,1,3"), "positive whole numbers"),
    "a million layers": (lines(_3="1000000,2,1,3"), "1000000 layers are more than 1024"),
    "a layer without neurons": (lines(_4="2,0,1"), "positive whole numbers"),
    "one size too few": (lines(_4="2,1"), "line 4: 2 layer sizes: it must be 3"),
    "one size too many": (lines(_4="2,3,3,1"), "line 4: 4 layer sizes: it must be 3"),
    "another number of inputs": (lines(_3="2,3,1,3"), "the line before says 3 to 1"),
    "another number of outputs": (lines(_3="2,2,2,3"), "the line before says 2 to 2"),
    "another largest layer": (lines(_3="2,2,1,50"), "at most 3: the line before says 2 to 1, at most 50"),
    "a huge layer": (lines(_3="2,2,1,99999999", _4="2,99999999,1"), "the weight of layer 0 has shape .*limits"),
    "a layer the text does not hold": (
        lines(_3="2,2,1,9999999", _4="2,9999999,1"),
        "line 4: such layers have 39999997 weights and biases: 162 bytes cannot hold them",
    ),
    "a flag": (lines(_5="1,"), "line 5: the flag for symmetric inputs"),
    "two flags": (lines(_5="0,0,"), "line 5: 2 flag: it must be 1"),
    "a minimum too few": (lines(_6="0"), "line 6: 1 input minima: it must be 2"),
    "no mean of the outputs": (lines(_8="0,0"), "line 8: 2 means: it must be 3"),
    "a range of zero": (lines(_9="2,0,8"), "line 9: a range is 0 or not finite"),
    "a range of nan": (lines(_9="2,1,nan"), "line 9: a range is 0 or not finite"),
    "a ragged row": (lines(_11="1"), "line 11: 1 weights of layer 0: it must be 2"),
    "a row too long": (lines(_11="1,2,3"), "line 11: 3 weights of layer 0: it must be 2"),
    "a row missing": (lines(_11=None), "line 12: 1 weights of layer 0: it must be 2"),
    "a bias missing": (lines(_17=None), "line 17 is blank or missing: it must hold bias of layer 1"),
    "a line more": (SMALL + "1,\n", "line 17 should be the last one"),
    "a blank line within": (lines(_10=""), "line 10 is blank or missing"),
    "a comment within": (lines(_10="// weights"), "line 10 must hold weights of layer 0: numbers with commas"),
    "a word": (lines(_10="1,two"), "line 10 must hold"),
    "no number": (lines(_10="1,,"), "line 10 must hold"),
    "two points": (lines(_10="1.2.3,4"), "line 10 must hold"),
    "an underscore": (lines(_10="1_0,2"), "line 10 must hold"),
    "digits of another script": (lines(_10="١,٢"), "line 10 must hold"),
    "a hexadecimal number": (lines(_10="0x10,2"), "line 10 must hold"),
    "no text": (b"\x00\xff\xfe" * 100, "line 1 must hold"),
    "a row of digits without end": (lines(_10="1" * 10000 + ",2"), "line 10 is longer than"),
    "an array of NumPy": (b"\x93NUMPY\x01\x00", "line 1 must hold"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    text, message = REFUSED[name]
    path = tmp_path / "refused.nnet"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    error = attempt(path)
    assert isinstance(error, ModelFileError)
    assert re.search(message, str(error)), error


def test_a_comment_without_end(tmp_path):
    with pytest.raises(ModelFileError, match="line 1 is longer than 1000 bytes"):
        load(tmp_path, "//" + "a" * 5000, limits=Limits(metadata=1000))


def test_limits(tmp_path):
    for limits, message in (
        (Limits(file=10), "limits.file"),
        (Limits(layers=1), "2 layers are more than 1"),
        (Limits(layers=4), "limits.layers"),
        (Limits(dimension=2), "limits"),
        (Limits(tensor=8), "limits.tensor"),
    ):
        with pytest.raises(ModelFileError, match=message):
            load(tmp_path, SMALL, limits=limits)


@pytest.mark.parametrize("argument", ["activations", "prefix", "epsilon", "weights"])
def test_arguments_it_does_not_need(argument, tmp_path):
    with pytest.raises(ModelFileError, match=f"{argument} is nothing that a file of NNet needs"):
        load(tmp_path, SMALL, **{argument: "relu"})


def test_damaged_files(tmp_path, note):
    survives(tmp_path, ".nnet", SMALL.encode(), note)
