"""The HDF5 reader against h5py, and against damage: files h5py wrote, then changed."""

import contextlib
import io
import struct
import time
import tracemalloc
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hostile import ALL, ROOM, SECONDS, damaged, watched
from hypothesis import given, settings
from hypothesis import strategies as st

from nnfwd.errors import ModelFileError
from nnfwd.io import hdf5
from nnfwd.io.reading import Limits

h5py = pytest.importorskip("h5py")
SAMPLE = Path(__file__).parents[2] / "shared" / "samples" / "acasxu" / "sisl_KerasTestNetwork.h5"
VERSIONS = ("earliest", "v108", "v110", "latest")
NUMBERS = ("<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "i1", "u1", "<i2", ">u2", "<i4", ">i4", "<u4", "<i8", ">u8")


def written(fill, libver="earliest", **options) -> bytes:
    """The bytes of the file that `fill` makes of an empty one."""
    target = io.BytesIO()
    with h5py.File(target, "w", libver=libver, **options) as file:
        fill(file)
    return target.getvalue()


def read(data: bytes, **limits):
    return hdf5.read(io.BytesIO(data), Limits(**limits))


def agree(data: bytes) -> None:
    """Everything that h5py reads of a file, our reader reads too, and nothing else."""
    with h5py.File(io.BytesIO(data), "r") as file:
        same(read(data), file)


def same(ours, theirs) -> None:
    assert ours.attributes.keys() == theirs.attrs.keys()
    for name, value in theirs.attrs.items():
        same_value(ours.attributes[name], value)
    if isinstance(theirs, h5py.Dataset):
        values, expected = ours.tensor.read(), np.asarray(theirs[()])
        assert ours.tensor.shape == values.shape == expected.shape
        assert ours.tensor.dtype == values.dtype.name == expected.dtype.name
        assert values.tobytes() == expected.astype(values.dtype).tobytes()
        return
    assert list(ours) == sorted(theirs)
    for name in theirs:
        assert name in ours
        same(ours[name], theirs[name])


def same_value(ours, theirs) -> None:
    if isinstance(theirs, bytes):
        theirs = theirs.decode()
    if isinstance(theirs, str):
        assert ours == theirs
    elif isinstance(theirs, np.ndarray) and theirs.dtype.kind in "OS":
        assert ours == [text.decode() if isinstance(text, bytes) else text for text in theirs.tolist()]
    elif isinstance(theirs, np.ndarray):
        assert ours.dtype.name == theirs.dtype.name
        assert ours.shape == theirs.shape
        assert ours.tobytes() == theirs.astype(ours.dtype).tobytes()
    else:
        assert type(ours) in (int, float)
        assert type(theirs)(ours).tobytes() == theirs.tobytes()


# What there is

COMPACT = 8
"""How many links or attributes a new object may have before the HDF5 library puts them into dense storage."""


def agree_or_dense(data: bytes, dense: bool) -> None:
    if dense:
        refuse(data, "is in dense storage, which is not read: write the file with libver='earliest', and without track")
    else:
        agree(data)


def spread(group, values):
    """Each value with a group for it, so few in one that they are compact."""
    for i, value in enumerate(values):
        if i % COMPACT == COMPACT - 1:
            group = group.create_group("more")
        yield group, value


@pytest.mark.parametrize("libver", VERSIONS)
@pytest.mark.parametrize("track_order", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1500])
def test_groups_of_any_size(libver, track_order, count):
    def fill(file):
        group = file.create_group("layers", track_order=track_order)
        for i in range(count):
            group.create_group(f"dense_{i}_{'x' * (i % 40)}", track_order=track_order)

    is_new = libver != "earliest" or track_order
    agree_or_dense(written(fill, libver, track_order=track_order), is_new and count > COMPACT)


@pytest.mark.parametrize("libver", VERSIONS)
@pytest.mark.parametrize("track_order", [False, True])
@pytest.mark.parametrize("count", [0, 1, 6, 7, 300])
def test_attributes_of_any_number_and_size(libver, track_order, count):
    def fill(file):
        file.attrs["model_config"] = "{" + "x" * 30_000 + "}"
        file.attrs["fixed"] = np.bytes_(b"y" * 30_000)
        for i in range(count):
            file.attrs[f"{i}_{'n' * (i % 50)}"] = np.arange(i, dtype="f4")

    is_new = libver != "earliest" or track_order
    agree_or_dense(written(fill, libver, track_order=track_order), is_new and count + 2 > COMPACT)


@pytest.mark.parametrize("libver", VERSIONS)
def test_attributes_of_every_kind(libver):
    def fill(file):
        values = {f"scalar {number}": np.array(3, number)[()] for number in NUMBERS}
        values |= {f"array {number}": np.arange(6).reshape(2, 3).astype(number) for number in NUMBERS}
        values |= {"names": [b"kernel:0", b"bias:0", b""], "texts": ["kernel", "", "größe"], "ünï": 1}
        values |= {"text": "zwölf ≥ 11", "empty": "", "bytes": np.bytes_("zwölf".encode())}
        values |= {"no weights": np.asarray([]), "no names": np.zeros(0, "S3")}
        for group, (name, value) in spread(file, values.items()):
            group.attrs[name] = value

    agree(written(fill, libver))


@pytest.mark.parametrize("libver", VERSIONS)
def test_strings_padded_in_every_way(libver):
    def fill(file):
        for name, kind, padded in (
            ("zeros", h5py.h5t.STR_NULLTERM, b"ab\0cd"),
            ("spaces", h5py.h5t.STR_SPACEPAD, b"ab   "),
        ):
            datatype = h5py.h5t.C_S1.copy()
            datatype.set_size(5)
            datatype.set_strpad(kind)
            space = h5py.h5s.create(h5py.h5s.SCALAR)
            attribute = h5py.h5a.create(file.id, name.encode(), datatype, space)
            attribute.write(np.array(padded, "S5"), mtype=datatype)

    assert read(written(fill, libver)).attributes == {"zeros": "ab", "spaces": "ab"}


STORED = [
    {},
    {"chunks": (1, 1)},
    {"chunks": (2, 3)},
    {"chunks": (5, 7)},
    {"chunks": (2, 3), "compression": "gzip"},
    {"chunks": (5, 7), "compression": "gzip"},
    {"chunks": (5, 7), "shuffle": True},
    {"chunks": (3, 7), "shuffle": True, "compression": "gzip", "compression_opts": 9},
    {"chunks": (4, 4), "maxshape": (None, None), "compression": "gzip"},
]


@pytest.mark.parametrize("libver", VERSIONS)
@pytest.mark.parametrize("options", STORED, ids=str)
def test_datasets_stored_in_every_way(libver, options):
    rng = np.random.default_rng(5)
    values = rng.normal(size=(5, 7)) * 50

    def fill(file):
        for group, number in spread(file, NUMBERS):
            group.create_dataset(number, data=np.abs(values).astype(number), **options)

    data = written(fill, libver)
    if libver in ("v110", "latest") and options.get("chunks", (5, 7)) != (5, 7):
        with pytest.raises(
            ModelFileError, match="its chunks in a .* which is not read: write the file with libver='ea"
        ):
            read(data)
    else:
        agree(data)


@pytest.mark.parametrize("libver", VERSIONS)
def test_datasets_of_every_shape(libver):
    def fill(file):
        for shape in [(), (1,), (0,), (3, 0), (2, 3, 4), (1,) * 8, (70_000,)]:
            group = file.create_group(f"{shape}")
            group.create_dataset("ones", data=np.ones(shape))
            group.create_dataset("unwritten", shape, "f4", fillvalue=2.5)
            group.create_dataset("zeros", shape, ">i2")

    agree(written(fill, libver))


@pytest.mark.parametrize("libver", VERSIONS)
def test_compact_datasets(libver):
    def fill(file):
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((3, 4))
        made = h5py.h5d.create(file.id, b"compact", h5py.h5t.IEEE_F32BE, space, plan)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.arange(12, dtype="f4").reshape(3, 4))

    agree(written(fill, libver))


@pytest.mark.parametrize("options", [{}, {"compression": "gzip", "shuffle": True}], ids=str)
def test_missing_chunks_hold_the_fill_value(options):
    def fill(file):
        made = file.create_dataset("x", (50, 30), ">f4", chunks=(8, 8), fillvalue=-1.5, **options)
        made[10:14, 27:] = 7

    agree(written(fill))


def test_a_filter_that_was_skipped():
    def fill(file):
        made = file.create_dataset("x", (8,), "<f4", chunks=(4,), compression="gzip")
        made.id.write_direct_chunk((0,), np.arange(4, dtype="<f4").tobytes(), filter_mask=1)
        made.id.write_direct_chunk((4,), zlib.compress(np.ones(4, "<f4").tobytes()))

    agree(written(fill))


def test_a_null_dataspace_has_no_elements():
    def fill(file):
        file.attrs["nothing"] = h5py.Empty("f4")
        file["nothing"] = h5py.Empty("f8")

    for libver in VERSIONS:
        root = read(written(fill, libver))
        assert root.attributes["nothing"].shape == root["nothing"].tensor.read().shape == (0,)


def test_bfloat16_as_keras_writes_it():
    values = np.array([1.0, -2.5, 3e38], "f4")

    def fill(file):
        file.create_dataset("x", data=(values.view("u4") >> 16).astype("u2").view("V2")).attrs["dtype"] = "bfloat16"

    tensor = read(written(fill))["x"].tensor
    assert tensor.dtype == "bfloat16"
    assert tensor.read().tolist() == (values.view("u4") >> 16 << 16).view("f4").tolist()


def test_a_path_leads_to_what_is_inside():
    root = read(written(lambda file: file.create_dataset("a/b/c", data=[1, 2])))
    assert root["a/b/c"] is root["a"]["b"]["c"]
    assert "a/b/c" in root
    assert "a/x" not in root
    assert "a/b/c/d" not in root
    with pytest.raises(ModelFileError, match="has no a/x/c"):
        root["a/x/c"]


def test_keras_1_sample():
    if not SAMPLE.exists():
        pytest.skip(f"no {SAMPLE}")
    agree(SAMPLE.read_bytes())


names = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..")
)
values = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=300),
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=20), min_size=1, max_size=5
    ),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.lists(st.floats(width=32), max_size=5).map(lambda numbers: np.array(numbers, "f4")),
)
arrays = st.tuples(st.lists(st.integers(0, 6), max_size=3), st.sampled_from(NUMBERS), st.integers(0, 2**32 - 1))
nodes = st.recursive(
    st.tuples(st.dictionaries(names, values, max_size=3), arrays),
    lambda below: st.tuples(
        st.dictionaries(names, values, max_size=COMPACT), st.dictionaries(names, below, max_size=COMPACT)
    ),
    max_leaves=12,
)


@given(nodes, st.sampled_from(VERSIONS), st.booleans(), st.booleans())
@settings(max_examples=200)
def test_any_tree(node, libver, track_order, chunked):
    def fill(group, node):
        attributes, contents = node
        if isinstance(contents, tuple):
            shape, number, seed = contents
            data = np.random.default_rng(seed).integers(0, 100, shape).astype(number)
            options = {"chunks": tuple(shape), "compression": "gzip"} if chunked and data.size and shape else {}
            made = group.create_dataset("array", data=data, **options)
        else:
            made = group
            for name, below in contents.items():
                fill(group.create_group(name, track_order=track_order), below)
        for name, value in attributes.items():
            made.attrs[name] = value

    agree(written(lambda file: fill(file, node), libver))


# What is not read, by name


def _with_filter(**options):
    return lambda file: file.create_dataset("x", data=np.arange(100), chunks=(10,), **options)


def _virtual(file):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "y", (4,))
    file.create_virtual_dataset("x", layout)


def _typed(file):
    file["x"] = np.dtype("f4")


def _shared_type(file):
    file["z_type"] = np.dtype("f4")
    file.create_dataset("x", (3,), file["z_type"])


REFUSED = {
    "/x has its values in another file": lambda file: file.create_dataset(
        "x", (4,), "f4", external=[("/etc/passwd", 0, 16)]
    ),
    "x in / is an external link": lambda file: file.__setitem__("x", h5py.ExternalLink("other.h5", "/y")),
    "x in .* is a soft link": lambda file: file.__setitem__("x", h5py.SoftLink("/x")),
    "/x is a virtual dataset": _virtual,
    "/x is neither a group nor a dataset: a named": _typed,
    "/x shares its message DATATYPE with other objects": _shared_type,
    "/x is a compound": lambda file: file.create_dataset("x", (3,), [("a", "f4"), ("b", "i4")]),
    "/x is an enumeration": lambda file: file.create_dataset("x", data=[True, False]),
    "/x is a reference": lambda file: file.create_dataset("x", (3,), h5py.ref_dtype),
    "/x is an array": lambda file: file.create_dataset("x", (3,), "(2,)f4"),
    "/x is a float of 80 bits|/x is a float of 128 bits": lambda file: file.create_dataset("x", (3,), np.longdouble),
    "/x is a dataset of type variable string": lambda file: file.create_dataset("x", data=["a", "b"]),
    "/x is a dataset of type string": lambda file: file.create_dataset("x", data=np.array([b"a", b"b"])),
    "/x is a dataset of type opaque": lambda file: file.create_dataset("x", (3,), "V2"),
    "the attribute a of / is a reference": lambda file: file.attrs.__setitem__("a", file.ref),
    "the attribute a of / is opaque": lambda file: file.attrs.__setitem__("a", np.void(b"abc")),
    "the attribute a of / is an array of strings of shape": lambda file: file.attrs.__setitem__("a", [[b"a"], [b"b"]]),
    "/x has the filter lzf": _with_filter(compression="lzf"),
    "/x has the filter fletcher32": _with_filter(fletcher32=True),
    "/x has the filter scaleoffset": _with_filter(scaleoffset=0),
    r"/b is an object that has another name": lambda file: (file.create_group("a"), file.__setitem__("b", file["a"])),
    r"/a/b is an object that has another name": lambda file: (
        file.create_group("a"),
        file.__setitem__("a/b", file["a"]),
    ),
    r"/a/b is an object that has another": lambda file: (file.create_group("a"), file.__setitem__("a/b", file["/"])),
}


def test_dense_storage_is_refused_by_name():
    def links(file):
        for i in range(COMPACT + 1):
            file.create_group(f"layers/{i}")

    def attributes(file):
        group = file.create_group("layers")
        for i in range(COMPACT + 1):
            group.attrs[f"{i}"] = i

    refuse(written(links, "latest"), "^the list of /layers is in dense storage, which is not read: write the file with")
    refuse(written(attributes, "latest"), "^the list of attributes of /layers is in dense storage")
    refuse(
        written(lambda file: file.attrs.__setitem__("a", np.bytes_("x" * 70_000)), "latest"),
        "^the list of attributes of / is",
    )
    for fill in (links, attributes):
        agree(written(fill))


def test_a_part_of_another_file():
    data = written(_some)
    root = hdf5.read(io.BytesIO(b"before" + data + b"after"), Limits(), start=6, size=len(data))
    with h5py.File(io.BytesIO(data), "r") as file:
        same(root, file)
    with pytest.raises(ModelFileError, match=f"the file has {len(data) - 1} bytes"):
        hdf5.read(io.BytesIO(b"before" + data + b"after"), Limits(), start=6, size=len(data) - 1)


@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message, libver, tmp_path):
    # External data needs a file with a place.
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", libver=libver) as file:
        REFUSED[message](file)
    data = path.read_bytes()
    with watched() as seen, pytest.raises(ModelFileError, match=message):
        read(data)
    assert seen == []


def test_a_file_that_can_grow_is_refused_by_name():
    data = written(lambda file: file.create_dataset("x", (4,), "f4", chunks=(2,), maxshape=(None,)), "latest")
    with pytest.raises(ModelFileError, match="/x has its chunks in an extensible array, which is not read"):
        read(data)


@pytest.mark.parametrize("size", [512, 1024])
def test_a_user_block_is_refused(size):
    with pytest.raises(ModelFileError, match="a user block"):
        read(written(lambda file: None, userblock_size=size))


@pytest.mark.parametrize("data", [b"", b"\x89HDF", b"PK\3\4" + bytes(100), b"\x89HDF\r\n\x1a\n"])
def test_not_hdf5(data):
    with pytest.raises(ModelFileError, match="the superblock of 9 bytes is at byte 0: the file has|not an HDF5 file"):
        read(data)


# Limits


def _some(file):
    for i in range(3):
        file.create_dataset(f"layers/dense_{i}/vars/0", data=np.ones((3, 5), "f4"))
    file.attrs["model_config"] = "x" * 3000


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"tensors": 4}, "more than 8 groups and datasets"),
        ({"depth": 3}, "nested deeper than 3"),
        ({"metadata": 3000}, "limits.metadata is too low"),
        ({"dimension": 4}, r"/layers/dense_0/vars/0 has shape \(3, 5\), beyond the limits"),
        ({"tensor": 50}, "60 bytes: raise limits.tensor"),
    ],
    ids=str,
)
def test_limits(limits, message):
    for libver in VERSIONS:
        with pytest.raises(ModelFileError, match=message):
            read(written(_some, libver), **limits)


def test_an_array_that_expands_is_refused_before_anything_is_allocated():
    def fill(file):
        file.create_dataset("x", (2**22,), "f8", chunks=(2**20,), compression="gzip", fillvalue=0)[:] = 0

    data = written(fill)
    assert len(data) < 2**17
    with (
        Measured(len(data)),
        pytest.raises(ModelFileError, match="/x expands to 33554432 bytes: raise limits.expansion"),
    ):
        read(data)
    assert not read(data, expansion=1000)["x"].tensor.read().any()


class Measured:
    """Meanwhile no more memory is taken than a hostile file of that size may cost, nor more time."""

    def __init__(self, size):
        self.allowed = 2 * size + ROOM

    def __enter__(self):
        tracemalloc.start()
        self.start = time.perf_counter()

    def __exit__(self, *error):
        seconds, (_, peak) = time.perf_counter() - self.start, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seconds < SECONDS, f"{seconds:.1f} s"
        assert peak <= self.allowed, f"{peak} bytes"


# Hostile files: what h5py wrote, with one thing in it changed


def changed(data: bytes, old: bytes, new: bytes, count: int = 1) -> bytes:
    assert data.count(old) == count, data.count(old)
    return data.replace(old, new)


def refuse(data: bytes, message: str, **limits) -> None:
    with Measured(len(data)), pytest.raises(ModelFileError, match=message):
        for dataset in datasets(read(data, **limits)):
            dataset.tensor.read()


def datasets(group):
    for name in group:
        if isinstance(group[name], hdf5.Group):
            yield from datasets(group[name])
        else:
            yield group[name]


def one(file):
    file.create_dataset("x", data=np.full((37, 41), 1.5))


def test_a_huge_claimed_shape():
    data = written(one)
    huge = changed(data, struct.pack("<QQ", 37, 41), struct.pack("<QQ", 2**23, 2**23), 2)
    refuse(huge, "/x .* bytes: raise limits.tensor")
    huge = changed(data, struct.pack("<QQ", 37, 41), struct.pack("<QQ", 2**60, 2**60), 2)
    refuse(huge, "beyond the limits")
    huge = changed(data, struct.pack("<QQ", 37, 41), struct.pack("<QQ", 2**15, 2**14), 2)
    refuse(huge, "/x needs 4294967296 bytes by its shape and datatype: 12136 are stored")
    huge = changed(huge, struct.pack("<Q", 37 * 41 * 8), struct.pack("<Q", 2**32))
    refuse(huge, "more bytes than the file")


def test_data_outside_the_file():
    data = written(one)
    with h5py.File(io.BytesIO(data), "r") as file:
        at = struct.pack("<QQ", file["x"].id.get_offset(), 37 * 41 * 8)
    outside = changed(data, at, struct.pack("<QQ", len(data) - 12135, 37 * 41 * 8))
    refuse(outside, "/x of 12136 bytes is at byte")
    nowhere = changed(data, at, struct.pack("<QQ", 2**64 - 1, 37 * 41 * 8))
    assert not read(nowhere)["x"].tensor.read().any()  # as never written: the fill value


def test_a_huge_unwritten_dataset():
    def fill(file):
        file.create_dataset("x", (2**20, 2**10), "f8", fillvalue=1)

    refuse(written(fill), "/x expands to 8589934592 bytes")


def test_datasets_that_overlap():
    def fill(file):
        for name in "abcd":
            file.create_dataset(name, data=np.zeros(5000))

    data = written(fill)
    with h5py.File(io.BytesIO(data), "r") as file:
        places = [struct.pack("<QQ", file[name].id.get_offset(), 40_000) for name in "abcd"]
    for place in places[1:]:
        data = changed(data, place, places[0])
    refuse(data[: 2 * 5000], "is at byte")  # the end of the file is after its end
    end = struct.pack("<Q", len(data))
    refuse(changed(data, end, struct.pack("<Q", 60_000))[:60_000], "they overlap")


def chunked(file):
    file.create_dataset("x", (40, 30), "f4", chunks=(7, 9), compression="gzip")[:] = 1


def test_a_huge_claimed_chunk():
    data = written(chunked)
    shape = struct.pack("<III", 7, 9, 4)
    refuse(changed(data, shape, struct.pack("<III", 2**23, 2**23, 4)), "a chunk of /x .* raise limits.tensor")
    refuse(changed(data, shape, struct.pack("<III", 2**31, 9, 4)), "a chunk of /x .* beyond the limits")
    refuse(changed(data, shape, struct.pack("<III", 0, 9, 4)), "has chunks of shape")
    refuse(changed(data, shape, struct.pack("<III", 7, 9, 8)), "has chunks of shape")
    rank = data.index(shape) - 9
    for n in (0, 1, 2, 4, 255):
        refuse(data[:rank] + bytes([n]) + data[rank + 1 :], "which are not read|is damaged")
    # Inside the limits, but not every chunk is where such chunks would be.
    refuse(changed(data, shape, struct.pack("<III", 2**14, 2**14, 4)), "/x is damaged: a chunk at|expands")


def test_a_single_chunk_of_many_zeros():
    def fill(file):
        file.create_dataset("x", (1,), "f4", chunks=(2**24,), maxshape=(None,), compression="gzip")[:] = 1

    refuse(written(fill), "/x expands to 67108864 bytes")


def test_a_gzip_bomb():
    def fill(file):
        made = file.create_dataset("x", (8,), "f4", chunks=(8,), compression="gzip")
        made.id.write_direct_chunk((0,), zlib.compress(bytes(2**28)))

    refuse(written(fill), "a chunk of /x is damaged: it does not decompress to 32 bytes")
    refuse(written(fill, "latest"), "a chunk of /x is damaged: it does not decompress to 32 bytes")


def test_a_chunk_that_is_damaged_or_too_short():
    def fill(contents):
        def inner(file):
            made = file.create_dataset("x", (8,), "f4", chunks=(8,), compression="gzip", shuffle=True)
            made.id.write_direct_chunk((0,), contents)

        return inner

    refuse(written(fill(b"no gzip")), "a chunk of /x is damaged: Error -3")
    refuse(written(fill(zlib.compress(bytes(31)))), "a chunk of /x has 31 bytes, not 32")
    refuse(written(fill(zlib.compress(bytes(32))[:-3])), "does not decompress")


def test_chunks_that_are_all_one():
    """Many entries for one stored chunk, each of which expands."""
    rows = 400

    def fill(file):
        file.create_dataset("x", (rows, 2**14), "f4", chunks=(1, 2**14), compression="gzip")[:] = 0

    data = written(fill)
    refuse(data, "/x expands to 26214400 bytes")


def _tree_of(data: bytes) -> int:
    """Where the B-tree node of the largest group is."""
    return max((data[i + 6], i) for i in range(len(data) - 8) if data[i : i + 4] == b"TREE")[1]


def test_a_b_tree_that_points_at_itself():
    data = bytearray(written(_some))
    at = _tree_of(data)
    data[at + 5] = 1
    data[at + 32 : at + 40] = struct.pack("<Q", at)
    refuse(bytes(data), "is damaged: a B-tree node of type 0 and level 1")
    data[at + 5] = 200
    refuse(bytes(data), "is damaged: a B-tree node of type 0 and level 200")


def _nodes(depth: int, width: int, start: int) -> bytes:
    """B-tree nodes of which each level's single node has the next level's as its child, many times."""
    size = 24 + width * 16 + 8
    nodes = b""
    for level in range(depth, 0, -1):
        head = b"TREE" + bytes([0, level]) + struct.pack("<HQQ", width, 2**64 - 1, 2**64 - 1)
        nodes += head + struct.pack("<QQ", 0, start + len(nodes) + size) * width + bytes(8)
    return nodes + b"TREE" + bytes(2) + struct.pack("<HQQ", 0, 2**64 - 1, 2**64 - 1) + bytes(8)


def test_a_b_tree_whose_branches_meet_again():
    """2^30 paths through 30 nodes: it costs no more than the budget of metadata."""
    data = written(lambda file: None)
    tree = data.index(b"TREE")
    long = data + _nodes(30, 2, len(data))
    long = long.replace(struct.pack("<Q", tree), struct.pack("<Q", len(data)))
    refuse(long.replace(struct.pack("<Q", len(data)), struct.pack("<Q", len(long)), 1), "blocks overlap")


def test_a_continuation_that_points_at_itself():
    def fill(file):
        for i in range(20):
            file.attrs[f"{i}"] = i

    data = written(fill)
    found = data.index(struct.pack("<HHI", 16, 16, 0))
    block = struct.unpack("<Q", data[found + 8 : found + 16])[0]
    # A continuation at the start of the block it leads to leads there again.
    again = data[:block] + struct.pack("<HHI", 16, 16, 0) + data[found + 8 : found + 24] + data[block + 24 :]
    refuse(again, "blocks overlap")
    refuse(changed(data, data[found + 8 : found + 24], struct.pack("<QQ", block, 2**63)), "the file has")


@pytest.mark.parametrize("what", [b"TREE", b"HEAP", b"SNOD"])
def test_a_structure_that_is_not_there(what):
    refuse(written(_some).replace(what, b"XXXX"), f"its signature is not {what.decode()}")


@pytest.mark.parametrize("what", [b"OHDR", b"OCHK"])
def test_a_checksum_that_differs(what):
    def fill(file):
        for i in range(8):
            file.create_group(f"{i}").attrs["text"] = "x" * 1000
            file.attrs[f"{i}"] = "x" * 1000

    data = written(fill, "latest")
    at = data.index(what) + 20
    refuse(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "its checksum differs|is damaged")


def test_one_long_string_many_times():
    """A thousand elements that all say the same 100 kB string of the global heap."""

    def fill(file):
        file.attrs["a"] = ["x" * 100_000] + ["y"] * 999

    data = written(fill)
    at = data.index(struct.pack("<I", 100_000))
    refuse(data[:at] + data[at : at + 16] * 1000 + data[at + 16_000 :], "blocks overlap")


def test_a_string_outside_its_heap():
    data = written(lambda file: file.attrs.__setitem__("a", "hello"))
    element = data.index(struct.pack("<I", 5), data.index(b"a\0")) if data.count(struct.pack("<I", 5)) else 0
    longer = data[:element] + struct.pack("<I", 600) + data[element + 4 :]
    refuse(longer, "a string of 600 bytes where 5 are")


def test_a_name_twice_or_with_a_path_in_it():
    data = written(lambda file: (file.create_group("aaa"), file.create_group("bbb")))
    refuse(changed(data, b"bbb\0", b"aaa\0"), "the name 'aaa' twice")
    refuse(changed(data, b"bbb\0", b"b/b\0"), "or it is not a name")
    refuse(changed(data, b"bbb\0", b"..\0\0"), "or it is not a name")
    refuse(changed(data, b"bbb\0", b"\xff\xff\xff\0"), "is not UTF-8 text")


# Damage everywhere


def old(file):
    file.attrs["model_config"] = '{"class_name": "Sequential"}'
    group = file.create_group("dense")
    group.attrs["weight_names"] = [b"kernel", b"bias"]
    group.create_dataset("kernel", data=np.arange(6, dtype="f4").reshape(2, 3))
    group.create_dataset("bias", data=np.arange(3, dtype=">f8"), chunks=(3,), compression="gzip", shuffle=True)


def new(file):
    old(file)
    file["dense"].attrs["texts"] = ["kernel", "bias"]


SEEDS = {"old": written(old, "earliest"), "new": written(new, "latest")}


@pytest.mark.parametrize("seed", SEEDS)
def test_damage(seed, monkeypatch, note):
    """Only ModelFileError comes out of a damaged file, and soon; in a long run, memory is measured too."""
    # Somebody who means harm writes the right checksums: every one is.
    monkeypatch.setattr(hdf5, "_lookup3", lambda data: mock.ANY)
    count = refused = 0
    if ALL:
        tracemalloc.start()
    try:
        for data in damaged(SEEDS[seed], np.random.default_rng(7)):
            count += 1
            refused += is_refused(data)
    finally:
        tracemalloc.stop()
    note(f"{count} damaged HDF5 files ({seed}) of {len(SEEDS[seed])} bytes: {refused} refused, no other error")
    assert refused > len(SEEDS[seed]) // 2


def is_refused(data: bytes) -> bool:
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    start = time.perf_counter()
    with watched() as seen:
        try:
            for dataset in datasets(read(data)):
                dataset.tensor.read()
            refused = False
        except ModelFileError:
            refused = True
    assert seen == []
    assert time.perf_counter() - start < SECONDS
    assert tracemalloc.get_traced_memory()[1] - before <= 2 * len(data) + ROOM
    return refused


def shapes(group):
    return {
        name: shapes(group[name]) if isinstance(group[name], hdf5.Group) else group[name].tensor.shape for name in group
    }


def test_checksums_find_damage():
    """A changed byte of new metadata is found, or it stood where nothing is said."""
    data = SEEDS["new"]
    whole = shapes(read(data))
    rng = np.random.default_rng(8)
    for i in rng.choice(len(data), 500, replace=False):
        with contextlib.suppress(ModelFileError):
            root = read(data[:i] + bytes([data[i] ^ int(rng.integers(1, 256))]) + data[i + 1 :])
            assert shapes(root) == whole


def test_the_checksum():
    """The values of https://burtleburtle.net/bob/c/lookup3.c, `driver5`."""
    assert hdf5._lookup3(b"Four score and seven years ago") == 0x17770551
