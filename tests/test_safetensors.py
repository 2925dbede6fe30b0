"""The safetensors format: round trips, the safetensors package as a peer, and hostile files."""

import itertools
import json
import os
import tracemalloc

import numpy as np
import pytest
from hostile import attempt, survives
from hypothesis import given
from hypothesis import strategies as st
from networks import ensemble, inputs, mixed, tutorial
from places import need

import nnfwd
from nnfwd import Activation, Dense, Network, Scale, activations
from nnfwd.errors import ModelFileError
from nnfwd.io import Limits


def file_of(header, data=b"", length=None):
    """A file with this header, a dict or JSON text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def header_of(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def every_activation():
    layers = []
    for name in activations.names():
        f = activations.named(name)
        layers.append(Activation(f(**dict.fromkeys(f.parameters, 0.1))))
    layers.append(Activation(activations.clip(lower=[-np.inf, 0.0], upper=np.inf)))
    return Network(layers)


networks = [mixed(), mixed("float64"), mixed("float16"), ensemble(), tutorial()[0], every_activation()]
networks.append(Network([Scale(0.1, center=np.ones(3, "f4")), *Network.from_arrays([np.ones((2, 3), "f8")])]))
networks.append(Network(mixed(), classes=("cat", "7"), input_shape=(2, 2)))


@pytest.mark.parametrize("net", networks, ids=range(len(networks)))
def test_round_trip_is_bit_identical(net, tmp_path):
    nnfwd.save(net, tmp_path / "a.safetensors")
    again = nnfwd.load(tmp_path / "a.safetensors")
    assert again == net
    assert (again.classes, again.input_shape) == (net.classes, net.input_shape)
    nnfwd.save(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_bytes(tmp_path):
    path = tmp_path / "a.safetensors"
    nnfwd.save(Network([Dense([[1.5, -2.0]], [0.25], "relu")]), path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert data[8 + length :] == np.array([0.25, 1.5, -2.0], "<f8").tobytes()
    header = json.loads(data[8 : 8 + length])
    assert json.loads(header.pop("__metadata__")["nnfwd"])["layers"][0]["activation"] == {"name": "relu"}
    assert header == {"layers.0.bias": entry([1], 0, 8, "F64"), "layers.0.weight": entry([1, 2], 8, 24, "F64")}


def test_a_network_of_another_library_is_saved(tmp_path):
    need("jax")
    nnfwd.save(mixed().to("jax"), tmp_path / "a.safetensors")
    assert nnfwd.load(tmp_path / "a.safetensors") == mixed()
    with pytest.raises(ModelFileError, match=r"bfloat16: write network.to\(dtype='float32'\)"):
        nnfwd.save(mixed().to("jax", dtype="bfloat16"), tmp_path / "b.safetensors")
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("net", networks, ids=range(len(networks)))
def test_the_library_writes_the_same_file(net, tmp_path):
    need("safetensors")
    import safetensors.numpy as safetensors_numpy

    path = tmp_path / "a.safetensors"
    nnfwd.save(net, path)
    tensors = safetensors_numpy.load_file(path)
    assert set(tensors) == header_of(path).keys() - {"__metadata__"}
    assert safetensors_numpy.save(tensors, metadata=header_of(path)["__metadata__"]) == path.read_bytes()
    for i, layer in enumerate(net):
        for name, value in layer.parameters.items():
            if name != "activation":
                theirs = tensors[f"layers.{i}.{name}"]
                assert (theirs.dtype, theirs.tobytes()) == (value.dtype, value.tobytes())


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=14),
    st.sampled_from(["float16", "float32", "float64"]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_what_the_library_writes_is_read(tmp_path_factory, widths, dtype, bias, seed):
    """A state dict numbered as `torch.nn.Sequential` numbers it: beyond ten layers the names do not sort as numbers."""
    need("safetensors")
    import safetensors.numpy as safetensors_numpy

    rng = np.random.default_rng(seed)
    weights = [rng.standard_normal((n, m)).astype(dtype) for m, n in itertools.pairwise(widths)]
    biases = [rng.standard_normal(n).astype(dtype) if bias else None for n in widths[1:]]
    tensors = {f"{2 * i}.weight": w for i, w in enumerate(weights)}
    tensors |= {f"{2 * i}.bias": b for i, b in enumerate(biases) if b is not None}
    path = tmp_path_factory.mktemp("library") / "a.safetensors"
    safetensors_numpy.save_file(tensors, path, metadata={"format": "pt"})
    assert nnfwd.load(path, activations="tanh") == Network.from_arrays(weights, biases, "tanh")


def test_a_state_dict_of_torch_is_read(tmp_path):
    torch = need("torch")
    need("safetensors")
    import safetensors.torch as safetensors_torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        module = module.to(getattr(torch, dtype))
        path = tmp_path / f"{dtype}.safetensors"
        safetensors_torch.save_file(module.state_dict(), path)
        net = nnfwd.load(path, activations=["tanh", "identity"])
        assert net.dtype == dtype.replace("bfloat16", "float32")
        for layer, linear in zip(net, (module[0], module[2]), strict=True):  # widening bfloat16 is exact
            assert np.array_equal(layer.weight.astype("float64"), linear.weight.detach().double().numpy())
            assert np.array_equal(layer.bias.astype("float64"), linear.bias.detach().double().numpy())
    x = inputs(3, 4, dtype="float64")
    assert np.array_equal(
        nnfwd.load(path, activations=["tanh", "identity"])(x).shape, module(torch.from_numpy(x)).shape
    )


def test_tied_weights_are_written_once_and_read_twice(tmp_path):
    torch = need("torch")
    need("safetensors")
    import safetensors.torch as safetensors_torch

    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
    module[2].weight = module[0].weight
    path = tmp_path / "a.safetensors"
    safetensors_torch.save_model(module, path, metadata={"format": "pt", "0.bias": "0.weight"})
    assert len(header_of(path)) == 4  # one weight, two biases, the metadata
    assert nnfwd.load(path, activations=["tanh", "identity"]) == nnfwd.from_torch(module)


def test_tied_weights_are_not_copied_without_end(tmp_path):
    path = tmp_path / "a.safetensors"
    metadata = {f"{i}.weight": "0.weight" for i in range(1, 3000)}
    data = file_of({"__metadata__": metadata, "0.weight": entry([500, 500], 0, 10**6)}, bytes(10**6))
    path.write_bytes(data)
    assert "raise limits.expansion" in str(attempt(path, activations="relu"))
    absent = {"__metadata__": {"0.bias": "1.bias", "format": "0"}, "0.weight": entry([1, 2], 0, 8)}
    path.write_bytes(file_of(absent, np.ones(2, "<f4").tobytes()))
    assert nnfwd.load(path, activations="relu") == Network([Dense(np.ones((1, 2), "f4"), None, "relu")])


def test_integers_beside_the_weights(tmp_path):
    """`num_batches_tracked` and masks may be there; they never become weights."""
    path = tmp_path / "a.safetensors"
    weight = np.ones((1, 2), "<f4").tobytes()
    header = {"net.0.weight": entry([1, 2], 0, 8), "steps": entry([], 8, 16, "I64"), "mask": entry([2], 16, 18, "BOOL")}
    path.write_bytes(file_of(header, weight + bytes(10)))
    assert nnfwd.load(path, activations="relu", prefix="net") == Network([Dense(np.ones((1, 2), "f4"), None, "relu")])
    path.write_bytes(file_of({"0.weight": entry([1, 2], 0, 16, "I64")}, bytes(16)))
    with pytest.raises(ModelFileError, match=r"0.weight is int64"):
        nnfwd.load(path, activations="relu")
    text = json.dumps({"format": 1, "layers": [{"type": "dense", "activation": {"name": "relu"}, "weight": None}]})
    ours = {"__metadata__": {"nnfwd": text}, "layers.0.weight": entry([1, 2], 0, 2, "U8")}
    path.write_bytes(file_of(ours, bytes(2)))
    with pytest.raises(ModelFileError, match=r"layers.0.weight is uint8"):
        nnfwd.load(path)


def test_what_our_file_says_is_not_asked_for(tmp_path):
    path = tmp_path / "a.safetensors"
    nnfwd.save(mixed(), path)
    for argument in ({"activations": "relu"}, {"prefix": "layers"}, {"epsilon": 1e-5}):
        with pytest.raises(ModelFileError, match=f"leave {next(iter(argument))}= out"):
            nnfwd.load(path, **argument)


def edited(path, change):
    """A file of ours with its header changed by a function."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = header_of(path)
    change(header)
    path.write_bytes(file_of(header, data[start:]))


def test_a_description_and_arrays_that_disagree(tmp_path):
    path = tmp_path / "a.safetensors"
    nnfwd.save(tutorial()[0], path)
    edited(path, lambda header: header.update({"layers.1.scale": header.pop("layers.1.bias")}))
    with pytest.raises(ModelFileError, match=r"layers.1.bias is missing"):
        nnfwd.load(path)
    nnfwd.save(tutorial()[0], path)
    edited(path, lambda header: header.update({"left.over": entry([0], 0, 0)}))
    with pytest.raises(ModelFileError, match=r"left.over belong to no layer"):
        nnfwd.load(path)


DEEP = b'{"a":' * 100 + b"1" + b"}" * 100
ONE = entry([2], 0, 8)
HOSTILE = {
    "empty": (b"", "the file is empty"),
    "header of 60 GB": (file_of({}, length=60 * 10**9), "claims a header of 60000000000 bytes"),
    "header of 2^64 - 1": (file_of({}, length=2**64 - 1), "claims a header"),
    "header longer than the file by one": (file_of({"a": ONE}, length=len(json.dumps({"a": ONE})) + 1), "claims a head"),
    "another format": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", "claims a header"),
    "a list": (file_of([]), "must start with {"),
    "no JSON": (file_of(b"{]"), "not a valid .safetensors file"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not a valid .safetensors file"),
    "deep JSON": (file_of(DEEP), "deeper than 32"),
    "deep JSON that never ends": (file_of(b'{"a":' * 200_000), "deeper than 32"),
    "a key twice": (
        file_of(f'{{"a": {json.dumps(ONE)}, "a": {json.dumps(ONE)}}}'.encode(), bytes(8)),
        "'a' stands twice",
    ),
    "a key of an entry twice": (
        file_of(b'{"a": {"dtype": "F32", "shape": [2], "shape": [1], "data_offsets": [0, 8]}}', bytes(8)),
        "'shape' stands twice",
    ),
    "overlap": (file_of({"a": ONE, "b": entry([2], 4, 12)}, bytes(12)), "'b' starts at 4, where 8 was due"),
    "the same bytes twice": (file_of({"a": ONE, "b": ONE}, bytes(8)), "starts at 0, where 8 was due"),
    "a gap": (file_of({"a": ONE, "b": entry([2], 12, 20)}, bytes(20)), "'b' starts at 12, where 8 was due"),
    "a gap at the start": (file_of({"a": entry([2], 8, 16)}, bytes(16)), "'a' starts at 8, where 0 was due"),
    "beyond the file": (file_of({"a": entry([2], 0, 8)}, bytes(7)), "the arrays end at byte"),
    "far beyond the file": (file_of({"a": entry([2**20, 2**10], 0, 2**32)}, bytes(8)), "the arrays end at byte"),
    "bytes left over": (file_of({"a": ONE}, bytes(9)), "the arrays end at byte"),
    "no arrays": (file_of({}), "no arrays"),
    "no arrays, but bytes": (file_of({}, bytes(8)), "the arrays end at byte"),
    "negative offset": (file_of({"a": entry([2], -8, 0)}, bytes(8)), "starts at -8"),
    "offsets backwards": (file_of({"a": entry([2], 8, 0)}, bytes(8)), "has 8 bytes, not those of"),
    "wrong length": (file_of({"a": entry([3], 0, 8)}, bytes(8)), "has 12 bytes, not those of"),
    "bytes to spare": (file_of({"a": entry([1], 0, 8)}, bytes(8)), "has 4 bytes, not those of"),
    "offsets of 10^400": (file_of({"a": entry([2], 10**400, 10**400 + 8)}, bytes(8)), "starts at 1000"),
    "three offsets": (file_of({"a": ONE | {"data_offsets": [0, 8, 8]}}, bytes(8)), "must be lists of integers"),
    "offsets as floats": (file_of({"a": entry([2], 0.0, 8.0)}, bytes(8)), "must be lists of integers"),
    "offsets as bools": (file_of({"a": entry([], False, 4)}, bytes(4)), "must be lists of integers"),
    "negative shape": (file_of({"a": entry([-1, -2], 0, 8)}, bytes(8)), "beyond the limits"),
    "shape as floats": (file_of({"a": entry([2.0], 0, 8)}, bytes(8)), "beyond the limits"),
    "shape as text": (file_of({"a": ONE | {"shape": "2"}}, bytes(8)), "must be lists of integers"),
    "a shape whose product overflows": (file_of({"a": entry([2**24] * 8, 0, 0)}), "raise limits.tensor"),
    "a dimension of 2^60": (file_of({"a": entry([2**60], 0, 0)}), "beyond the limits"),
    "many dimensions": (file_of({"a": entry([1] * 100_000, 0, 4)}, bytes(4)), "beyond the limits"),
    "float8": (file_of({"a": entry([2], 0, 2, "F8_E4M3")}, bytes(2)), "'a' is 'F8_E4M3'"),
    "complex": (file_of({"a": entry([1], 0, 8, "C64")}, bytes(8)), "'a' is 'C64'"),
    "a dtype that is none": (file_of({"a": ONE | {"dtype": ["F32"]}}, bytes(8)), r"'a' is \['F32'\]"),
    "an entry that is no object": (file_of({"a": 1}), "'a' must have a dtype"),
    "an entry without a dtype": (file_of({"a": {"shape": [0], "data_offsets": [0, 0]}}), "'a' must have a dtype"),
    "an unknown setting": (file_of({"a": ONE | {"stride": 0}}, bytes(8)), "'a' must have a dtype.* nothing else"),
    "metadata no object": (file_of({"__metadata__": [], "a": ONE}, bytes(8)), "object of strings"),
    "metadata of numbers": (file_of({"__metadata__": {"nnfwd": 1}, "a": ONE}, bytes(8)), "object of strings"),
    "a weight of width zero": (file_of({"0.weight": entry([0, 2], 0, 0)}), "width of zero"),
    "path separators": (file_of({"../../etc/passwd": ONE, "0.weight": entry([2], 8, 16)}, bytes(16)), "only|order"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name, tmp_path):
    data, message = HOSTILE[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        assert isinstance(attempt(path, activations="relu"), ModelFileError)
    finally:
        tracemalloc.stop()
    with pytest.raises(ModelFileError, match=message):
        nnfwd.load(path, activations="relu")


def test_a_hostile_description(tmp_path):
    path = tmp_path / "a.safetensors"
    for text, message in (
        (DEEP.decode(), "deeper than 32"),
        ("{", "not a valid"),
        ("\ud800", "not a valid"),
        ("[]", "format"),
    ):
        path.write_bytes(file_of({"__metadata__": {"nnfwd": text}}))
        with pytest.raises(ModelFileError, match=message):
            nnfwd.load(path)


def test_limits_come_before_allocation(tmp_path):
    path = tmp_path / "a.safetensors"
    nnfwd.save(mixed(), path)
    given = (
        Limits(file=10),
        Limits(metadata=10),
        Limits(tensors=2),
        Limits(layers=2),
        Limits(dimension=3),
        Limits(tensor=8),
    )
    for limits in given:
        with pytest.raises(ModelFileError, match="limit|more than"):
            nnfwd.load(path, limits=limits)


def test_damaged_files_of_ours(tmp_path, note):
    path = tmp_path / "a.safetensors"
    nnfwd.save(
        Network([Dense([[1.0, 2.0]], [0.5], activations.elu(alpha=2.0)), Scale(2.0)], classes=("no", "yes")), path
    )
    survives(tmp_path, ".safetensors", path.read_bytes(), note)


def test_damaged_state_dicts(tmp_path, note):
    header = {
        "0.weight": entry([2, 1], 0, 8),
        "0.bias": entry([2], 8, 12, "BF16"),
        "2.weight": entry([1, 2], 12, 28, "F64"),
    }
    survives(tmp_path, ".safetensors", file_of(header, bytes(28)), note, activations="relu")
