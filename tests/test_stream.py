"""Arrays larger than memory, file to file: the same bytes from every source, to every sink, in however many tries."""

import concurrent.futures
import errno
import importlib.util
import itertools
import json
import math
import multiprocessing
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ensemble, inputs, mixed
from places import need, places

import nnfwd
from nnfwd import Activation, Dense, Network, streaming
from nnfwd.errors import ArrayError, BackendError, DataFileError, DtypeError, ShapeError
from nnfwd.placement import dtype_name
from nnfwd.progress import Bar, Progress
from nnfwd.streaming import blocks, sinks, sources

ROWS = 1000
HEIGHT = 64  # of a block, so that there are some


@pytest.fixture(autouse=True)
def needs_zarr(request):
    if hasattr(request.node, "callspec") and ".zarr" in request.node.callspec.params.values():
        need("zarr")


@pytest.fixture(autouse=True)
def low_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_HIGHEST", HEIGHT)
    monkeypatch.setattr(streaming, "_PAUSE", 0)  # the journal is written after each block
    monkeypatch.setattr(streaming, "_SHARE", 0)


@pytest.fixture(scope="module")
def x():
    return inputs(ROWS, 4)


def streamed(net, x, **options):
    """The outputs, array to array."""
    y = net(x[..., :1, :] if x.ndim > 1 else x)  # for its dtype and shape
    lead = x.shape[:-1]
    result = np.empty((*y.shape[: y.ndim - len(lead) - 1], *lead, y.shape[-1]), y.dtype)
    nnfwd.stream(net, x, result, **options)
    return result


def put(path, x):
    """x in a file of that kind."""
    if path.suffix == ".npz":
        np.savez(path, x=x)
    elif path.suffix == ".csv":
        np.savetxt(path, x, delimiter=",", fmt="%.17g")
    elif path.suffix == ".zarr":
        need("zarr").create_array(path, data=np.ascontiguousarray(x), chunks=(130, *x.shape[1:]))
    elif path.suffix == ".npy":
        np.save(path, x)
    else:
        path.mkdir()
        for i, part in enumerate(np.array_split(x, [3, 3, 70, 71, 600])):
            np.save(path / f"part{i + 8}.npy", part)  # part10 comes after part9
    return path


def got(path):
    """What a sink holds."""
    if path.suffix == ".csv":
        return np.loadtxt(path, delimiter=",", ndmin=2)
    if path.suffix == ".zarr":
        return need("zarr").open_array(path, mode="r")[...]
    if path.suffix == ".npz":
        return np.load(path)["y"]
    if path.suffix == ".npy":
        return np.load(path)
    return np.concatenate([np.load(file) for file in sorted(path.glob("*.npy"), key=sources._natural)])


def tree(path):
    """Every file below a path, with its bytes."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


KINDS = [".npy", ".npz", ".csv", ".zarr", ""]
HERE = [".npy", ".csv", "", *([".zarr"] if importlib.util.find_spec("zarr") else [])]  # what can be gone on from


@pytest.mark.parametrize("source", [*KINDS, "array", "columns", "big-endian", "zarr array"])
@pytest.mark.parametrize("target", [*KINDS, "array"])
def test_every_source_to_every_sink(source, target, x, tmp_path):
    net = mixed()
    expected = streamed(net, x)
    assert nnfwd.error_bound(net, x).ratio(expected).max() <= 1
    if source == "array":
        given = x
    elif source == "zarr array":
        given = need("zarr").open_array(put(tmp_path / "x.zarr", x), mode="r")
    elif source in KINDS:
        given = put(tmp_path / f"x{source}", x)
    else:
        given = put(tmp_path / "x.npy", np.asfortranarray(x) if source == "columns" else x.astype(">f4"))
    sink = np.empty_like(expected) if target == "array" else tmp_path / f"y{target}"
    done = nnfwd.stream(net, given, sink, dtype="float32" if source == ".csv" else None)
    assert (done.source_shape, done.shape, done.dtype, done.kept) == (x.shape, expected.shape, expected.dtype, 0)
    found = sink if target == "array" else got(sink)
    assert np.array_equal(found.astype("float32"), expected)
    assert target == ".csv" or found.dtype == expected.dtype
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".partial", ".journal")]


def test_a_folder_keeps_its_names(x, tmp_path):
    put(tmp_path / "x", x)
    nnfwd.stream(mixed(), tmp_path / "x", tmp_path / "y")
    assert [path.name for path in sorted((tmp_path / "y").iterdir())] == sorted(
        p.name for p in (tmp_path / "x").iterdir()
    )
    for path in (tmp_path / "y").iterdir():
        assert len(np.load(path)) == len(np.load(tmp_path / "x" / path.name))


def test_a_folder_of_parts(x, tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "_PART", 8 * 150)  # 150 rows of two float32
    nnfwd.stream(mixed(), x, tmp_path / "y")
    assert [len(np.load(path)) for path in sorted((tmp_path / "y").iterdir())] == [150] * 6 + [100]
    assert np.array_equal(got(tmp_path / "y"), streamed(mixed(), x))


@pytest.mark.parametrize("shape", [(4,), (0, 4), (1, 4), (HEIGHT, 4), (7, 30, 4), (3, 5, 40, 4), (40, 0, 4)])
@pytest.mark.parametrize("net", [mixed(), ensemble()], ids=["network", "ensemble"])
@pytest.mark.parametrize("target", [".npy", ".npz", ".zarr", ""])
def test_shapes(net, shape, target, tmp_path):
    x = inputs(*shape)
    np.save(tmp_path / "x.npy", x)
    sink = tmp_path / f"y{target}"
    if target == "" and len(shape) == 1:
        with pytest.raises(DataFileError, match=r"one row.*y\.npy"):
            nnfwd.stream(net, tmp_path / "x.npy", sink)
        return
    done = nnfwd.stream(net, tmp_path / "x.npy", sink)
    y = got(sink)
    assert y.shape == done.shape == net(x).shape
    assert nnfwd.error_bound(net, x).ratio(y).max(initial=0) <= 1
    flat = streamed(net, x.reshape(-1, 4))
    assert np.array_equal(flat.reshape(y.shape), y)


def test_one_shape_of_input_more(tmp_path):
    net = Network(mixed(), input_shape=(2, 2))
    x = inputs(300, 2, 2)
    y = np.empty((300, 2), "float32")
    nnfwd.stream(net, x, y)
    assert np.array_equal(y, streamed(net, x.reshape(300, 4)))


@pytest.mark.parametrize("classes", [("cat", "dog"), (3, 7)])
@pytest.mark.parametrize("target", [".npy", ".csv", ""])
def test_labels(classes, target, x, tmp_path):
    net = Network(mixed(), classes=classes)
    sink = tmp_path / f"y{target}"
    nnfwd.stream(net, x, sink, labels=True)
    found = np.array(sink.read_text().split()) if target == ".csv" else got(sink)
    assert found.astype(str).tolist() == nnfwd.labels(net, streamed(net, x)).astype(str).tolist()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "bool"])
def test_dtypes(dtype):
    net, x = mixed("float64"), inputs(200, 4).astype(dtype)
    y = streamed(net, x)
    assert y.dtype == net(x).dtype
    assert nnfwd.error_bound(net, x).ratio(y).max() <= 1


@pytest.mark.parametrize("place", places(), ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_backends(place, dtype, x, tmp_path):
    net = mixed()
    if hasattr(place.adapter, "apply"):
        with pytest.raises(BackendError, match="name one, such as numpy"):
            nnfwd.stream(net, x, tmp_path / "y.npy", backend=place.name)
        return
    with place.context(dtype):
        if not place.has(dtype):
            with pytest.raises(DtypeError, match=dtype):
                nnfwd.stream(net, x, tmp_path / "y.npy", backend=place.name, device=place.device, dtype=dtype)
            return
        options = {"backend": place.name, "device": place.device, "dtype": dtype}
        done = nnfwd.stream(net, x, tmp_path / "y.npy", **options)
        placed = place.put(x, dtype)
        assert dtype_name(done.dtype) == ("float32" if dtype == "bfloat16" else dtype)
        bound = nnfwd.error_bound(net, placed)
        assert bound.ratio(place.put(np.load(tmp_path / "y.npy"), dtype)).max() <= 1
        nnfwd.stream(net, x, tmp_path / "again.npy", workers=5, **options)
    assert (tmp_path / "again.npy").read_bytes() == (tmp_path / "y.npy").read_bytes()


def test_the_same_bytes_for_any_number_of_workers(x):
    expected = streamed(mixed(), x)
    for workers in (1, 2, 7):
        assert np.array_equal(streamed(mixed(), x, workers=workers), expected)
    with pytest.raises(ShapeError, match="workers is 0"):
        streamed(mixed(), x, workers=0)


@pytest.mark.parametrize("source", [".npy", ".csv", ".zarr", ""])
def test_elsewhere(source, x, tmp_path):
    """Blocks that other threads or processes read and compute: the same bytes."""
    given = put(tmp_path / f"x{source}", x.astype("float64"))
    expected = streamed(mixed(), x.astype("float64"), dtype="float64")
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        nnfwd.stream(mixed(), given, tmp_path / "y.npy", dtype="float64", executor=executor)
    assert np.array_equal(np.load(tmp_path / "y.npy"), expected)


@pytest.mark.parametrize("source", [".npy", ".csv"])
def test_in_other_processes(source, x, tmp_path):
    given = put(tmp_path / f"x{source}", x)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as executor:
        nnfwd.stream(mixed(), given, tmp_path / "y.npy", dtype="float32", executor=executor)
    assert np.array_equal(np.load(tmp_path / "y.npy"), streamed(mixed(), x))


def test_rows_have_their_place_in_a_block(x):
    """A row's output depends on where it stands in its block alone, not on the rows around it, nor on how many there are."""
    whole = streamed(mixed(), x)
    for rows in (1, HEIGHT, HEIGHT + 1, 3 * HEIGHT - 1):
        assert np.array_equal(streamed(mixed(), x[:rows]), whole[:rows])
    assert np.array_equal(streamed(mixed(), x[2 * HEIGHT :]), whole[2 * HEIGHT :])
    spoilt = x.copy()
    spoilt[5] = np.nan
    rest = np.arange(ROWS) != 5
    assert np.array_equal(streamed(mixed(), spoilt)[rest], whole[rest])


def test_the_outputs_may_be_the_inputs(x):
    """A network that hands its x on: the blocks it is read into are used again."""
    assert np.array_equal(streamed(Network([Activation("identity")]), x, backend="numpy"), x)


# What is left of a run, and going on from it.


class Stop(Exception):  # noqa: N818
    pass


def interrupted(error, at):
    """A `progress` that raises when so many rows are done."""

    def progress(done, total):
        if done >= at:
            raise error

    return progress


@settings(max_examples=60)
@given(data=st.data(), target=st.sampled_from(HERE), many=st.booleans())
def test_interrupted_anywhere_the_bytes_are_the_same(data, target, many, tmp_path_factory):
    folder = tmp_path_factory.mktemp("s")
    net = ensemble() if many and target != ".csv" else mixed()
    shape = data.draw(st.sampled_from([(300,), (40, 9), (5, 70), (129,)] if target != ".csv" else [(300,), (129,)]))
    x = put(folder / "x.npy", inputs(*shape, 4))
    nnfwd.stream(net, x, folder / f"whole{target}")
    tries = data.draw(st.lists(st.integers(0, math.prod(shape)), max_size=4))
    kept = 0
    for at in tries:
        options = {"workers": data.draw(st.integers(1, 3)), "resume": True}
        try:
            done = nnfwd.stream(net, x, folder / f"y{target}", progress=interrupted(Stop, max(at, kept)), **options)
        except Stop as stop:
            assert [note for note in stop.__notes__ if "kept" in note or "nothing was written" in note]
            assert not (folder / f"y{target}").exists()
            journal = folder / f"y{target}.journal"
            last = json.loads(journal.read_text().splitlines()[-1]) if journal.exists() else {"rows": 0}
            assert last["rows"] >= kept
            kept = last["rows"]
        else:
            raise AssertionError(f"{done}: progress is called at the end")
    done = nnfwd.stream(net, x, folder / f"y{target}", resume=True)
    assert done.kept == kept
    assert tree(folder / f"y{target}") == tree(folder / f"whole{target}")
    assert sorted(path.name for path in folder.iterdir()) == sorted(["x.npy", f"whole{target}", f"y{target}"])
    shutil.rmtree(folder)


def stop(*arguments):
    raise Stop


def left(net, x, sink, at=500, error=Stop, **options):
    """Leaves an interrupted run behind."""
    with pytest.raises(error):
        nnfwd.stream(net, x, sink, progress=interrupted(error, at), **options)
    return sink.with_name(sink.name + ".partial"), sink.with_name(sink.name + ".journal")


def test_what_is_left_is_never_lost(x, tmp_path):
    path, sink = put(tmp_path / "x.npy", x), tmp_path / "y.npy"
    before = [part.read_bytes() for part in left(mixed(), path, sink)]
    with pytest.raises(DataFileError, match=r"y\.npy\.partial keeps 512 rows.*--resume.*--force"):
        nnfwd.stream(mixed(), path, sink)
    for options, word in (
        ({"dtype": "float64"}, "output"),
        ({"precision": "high"}, "precision highest and this run has high"),
    ):
        with pytest.raises(DataFileError, match=rf"was begun with {word}"):
            nnfwd.stream(mixed(), path, sink, resume=True, **options)
    with pytest.raises(DataFileError, match="was begun with network"):
        nnfwd.stream(mixed(seed=1), path, sink, resume=True)
    with pytest.raises(DataFileError, match="was begun with input"):
        nnfwd.stream(mixed(), put(tmp_path / "other.npy", x), sink, resume=True)
    assert [path.with_name(f"y.npy.{kind}").read_bytes() for kind in ("partial", "journal")] == before
    assert nnfwd.stream(mixed(), path, sink, resume=True).kept == 512
    assert np.array_equal(np.load(sink), streamed(mixed(), x))
    with pytest.raises(DataFileError, match=r"y\.npy exists.*--force"):
        nnfwd.stream(mixed(), path, sink, resume=True)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_resumed_run_has_the_same_backend(backend, x, tmp_path):
    need(backend)
    path = put(tmp_path / "x.npy", x)
    left(mixed(), path, tmp_path / "y.npy")
    with pytest.raises(DataFileError, match=f"was begun with backend numpy .* and this run has {backend}"):
        nnfwd.stream(mixed(), path, tmp_path / "y.npy", resume=True, backend=backend)


def test_force_begins_anew(x, tmp_path):
    left(mixed(), put(tmp_path / "x.npy", x), tmp_path / "y.npy")
    assert nnfwd.stream(mixed(), x, tmp_path / "y.npy", force=True).kept == 0
    for _ in range(2):  # an output that is there, too
        nnfwd.stream(mixed(seed=3), x, tmp_path / "y.npy", force=True)
    assert np.array_equal(np.load(tmp_path / "y.npy"), streamed(mixed(seed=3), x))
    for _ in range(2):
        nnfwd.stream(mixed(), x, tmp_path / "y", force=True)
    assert np.array_equal(got(tmp_path / "y"), streamed(mixed(), x))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy", "y", "y.npy"]


def test_the_last_block_is_compared(x, tmp_path):
    path = put(tmp_path / "x.npy", x)
    for target in (".npy", ".csv", ""):
        partial, _ = left(mixed(), path, tmp_path / f"y{target}")
        file = partial if partial.is_file() else next(partial.iterdir())
        data = bytearray(file.read_bytes())
        written = 128 + 8 * 460 if target != ".csv" else len(data) - 3
        data[written] ^= 1
        file.write_bytes(data)
        with pytest.raises(DataFileError, match="last rows are computed otherwise here.*--force"):
            nnfwd.stream(mixed(), path, tmp_path / f"y{target}", resume=True)
        assert partial.exists()


def test_a_torn_journal_line_is_no_line(x, tmp_path):
    path = put(tmp_path / "x.npy", x)
    _, journal = left(mixed(), path, tmp_path / "y.npy")
    with journal.open("ab") as file:
        file.write(b'{"rows": 9')
    assert nnfwd.stream(mixed(), path, tmp_path / "y.npy", resume=True).kept == 512
    assert np.array_equal(np.load(tmp_path / "y.npy"), streamed(mixed(), x))
    _, journal = left(mixed(), path, tmp_path / "z.npy")
    journal.write_bytes(b"\0\n")
    with pytest.raises(DataFileError, match=r"z\.npy\.journal is in the way, and no journal of ours: move it"):
        nnfwd.stream(mixed(), path, tmp_path / "z.npy", resume=True)
    for damage in (b"5\n", b"x\n"):
        partial, journal = left(mixed(), path, tmp_path / "w.npy")
        journal.write_bytes(journal.read_bytes().partition(b"\n")[0] + b"\n" + damage)
        with pytest.raises(DataFileError, match=r"w\.npy\.journal is damaged: begin anew with force"):
            nnfwd.stream(mixed(), path, tmp_path / "w.npy", resume=True)
        assert partial.exists()
        nnfwd.stream(mixed(), path, tmp_path / "w.npy", force=True)
        (tmp_path / "w.npy").unlink()


@pytest.mark.parametrize("target", [".npy", ".zarr", "", ".csv"])
@pytest.mark.parametrize("step", ["after the end was noted", "after the name was given", "before anything"])
def test_killed_between_two_steps(target, step, x, tmp_path, monkeypatch):
    """What a kill leaves behind there is made by leaving the steps out that come after it."""
    path = put(tmp_path / "x.npy", x)
    nnfwd.stream(mixed(), path, tmp_path / f"whole{target}")
    sink = tmp_path / f"y{target}"
    with monkeypatch.context() as patch:
        if step == "after the end was noted":
            patch.setattr(streaming.journal.Journal, "_rename", stop)
        elif step == "after the name was given":
            patch.setattr(streaming.journal.Journal, "_end", stop)
        else:
            patch.setattr(streaming._Writing, "_begin", stop)
            patch.setattr(streaming.journal.Journal, "discard", lambda self: self.close())
        with pytest.raises(Stop):
            nnfwd.stream(mixed(), path, sink)
    assert sink.with_name(sink.name + ".journal").exists()
    assert nnfwd.stream(mixed(), path, sink, resume=True).kept == (0 if step == "before anything" else ROWS)
    assert tree(sink) == tree(tmp_path / f"whole{target}")
    assert len(list(tmp_path.iterdir())) == 3


# What is in the way, or changes, or is full.


@pytest.mark.parametrize("target", [".npy", ".csv", "", ".zarr"])
def test_a_full_disk(target, x, tmp_path, monkeypatch):
    sink, kind = (
        tmp_path / f"y{target}",
        {".npy": sinks._Npy, ".csv": sinks._Csv, "": sinks._Folder}.get(target, sinks._Zarr),
    )
    write, path = kind.write, put(tmp_path / "x.npy", x)

    def full(self, start, y):
        if start >= 512:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, start, y)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "write", full)
        with pytest.raises(DataFileError, match=r"No space left on device; 512 of 1,000 rows are kept in .*--resume"):
            nnfwd.stream(mixed(), path, sink)
    assert not sink.exists()
    assert nnfwd.stream(mixed(), path, sink, resume=True).kept == 512
    assert np.array_equal(got(sink).astype("float32"), streamed(mixed(), x))


def test_a_disk_that_was_full_from_the_start(x, tmp_path, monkeypatch):
    monkeypatch.setattr(sinks.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DataFileError, match=r"y\.npy needs 0\.0 GB and 0\.0 GB are free"):
        nnfwd.stream(mixed(), x, tmp_path / "y.npy")
    assert not list(tmp_path.iterdir())


def longer(path):
    with path.open("ab") as file:
        file.write(b"1,2,3,4\n")


def shorter(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def other(path):
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\n")


@pytest.mark.parametrize("change", [longer, shorter, other])
@pytest.mark.parametrize("source", [".npy", ".csv", "", ".zarr"])
def test_an_input_that_changes(change, source, x, tmp_path):
    path = put(tmp_path / f"x{source}", x)
    file = {"": path / "part9.npy", ".zarr": path / "c" / "5" / "0"}.get(source, path)

    def progress(done, total):
        if 0 < done <= HEIGHT:
            change(file)

    with pytest.raises(DataFileError, match=rf"x{source}.* changed while it was read: nothing was written|not a valid"):
        nnfwd.stream(mixed(), path, tmp_path / "y.npy", dtype="float32", workers=1, progress=progress)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_changes(x, tmp_path):
    path = put(tmp_path / "x", x)
    with pytest.raises(DataFileError, match="changed while it was read"):
        nnfwd.stream(mixed(), path, tmp_path / "y.npy", progress=lambda done, total: np.save(path / "new.npy", x))


@pytest.mark.parametrize(
    ("source", "sink", "match"),
    [
        ("x.npy", "x.npy", "is read from"),
        ("x", "x/y.npy", "is read from"),
        ("x/part9.npy", "x", "is read from"),
        ("x", "x/part9.npy", "is read from"),
        ("x.npy", "y.txt", r"no format \.txt here"),
        ("x.npy", "-", "is no name for an output"),
        ("x.npy", "x", "x holds part10.npy, which this run would not make"),
        ("x.npy", "absent/y.npy", "absent does not exist"),
        ("x.npy", "there.npy", "exists: choose another name"),
        ("x.npy", "foreign", "notes.txt"),
        ("x.npy", "folder.npy", "is a folder"),
        ("x.npy", "file", "is a file"),
        ("x.npy", "way.npy", r"way\.npy\.partial is in the way"),
        ("x.txt", "y.npy", r"no format \.txt here"),
        ("empty", "y.npy", r"without \.npy files"),
        ("ragged", "y.npy", "first axis alone"),
        ("short.npy", "y.npy", "holds 1,128 bytes of 16,128: it was cut off"),
        ("columns.npy", "y.npy", "3 dimensions in Fortran order"),
        ("complex.npy", "y.npy", "complex.npy: not a valid .npy"),
        ("wide.npy", "y.npy", r"cannot take x \(3, 5\)"),
    ],
)
def test_what_is_in_the_way(source, sink, match, x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(Path("x.npy"), x)
    put(Path("x"), x)
    Path("x.txt").write_text("1,2,3,4\n")
    np.save("there.npy", x)
    np.save("complex.npy", x.astype(complex))
    np.save("wide.npy", inputs(3, 5))
    np.save("columns.npy", np.asfortranarray(inputs(3, 2, 4)))
    Path("short.npy").write_bytes(Path("x.npy").read_bytes()[:1128])
    for folder in ("foreign", "folder.npy", "empty", "ragged"):
        Path(folder).mkdir()
    np.save("ragged/a.npy", x)
    np.save("ragged/b.npy", x[:, :3])
    Path("foreign/notes.txt").write_text("mine")
    Path("file").write_text("mine")
    Path("way.npy.partial").write_text("mine")
    before = tree(tmp_path)
    force = match not in ("exists: choose another name", r"way\.npy\.partial is in the way")
    with pytest.raises((DataFileError, ShapeError), match=match):
        nnfwd.stream(mixed(), source, sink, force=force)
    assert tree(tmp_path) == before


def test_bad_input_leaves_nothing(x, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b,c,d\n" + "1,2,3,4\n" * 500 + "1,2,3\n" + "1,2,3,4\n" * 10)
    with pytest.raises(DataFileError, match="rows 449 to 511: not a valid .csv"):
        nnfwd.stream(mixed(), path, tmp_path / "y.npy")
    spoilt = x.copy()
    spoilt[700] = np.nan
    with pytest.raises(ShapeError, match="NaN in 1 rows"):
        nnfwd.stream(Network(mixed(), classes=["a", "b"]), spoilt, tmp_path / "y.csv", labels=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x.csv"]


def test_arrays_that_do_not_fit(x):
    with pytest.raises(ShapeError, match=r"the sink is \(1000, 3\) float32: it must be \(1000, 2\) float32"):
        nnfwd.stream(mixed(), x, np.empty((ROWS, 3), "float32"))
    with pytest.raises(ShapeError, match="float64: it must be"):
        nnfwd.stream(mixed(), x, np.empty((ROWS, 2)))
    with pytest.raises(ArrayError, match="not a list"):
        nnfwd.stream(mixed(), x, [])
    with pytest.raises(ArrayError, match="not a list"):
        nnfwd.stream(mixed(), x.tolist(), np.empty((ROWS, 2), "float32"))
    with pytest.raises(ArrayError, match=r"filled"):
        nnfwd.stream(mixed(), np.ma.masked_array(x), np.empty((ROWS, 2), "float32"))
    with pytest.raises(DtypeError, match="complex64"):
        nnfwd.stream(mixed(), x.astype("complex64"), np.empty((ROWS, 2), "float32"))
    with pytest.raises(DataFileError, match="no journal"):
        nnfwd.stream(mixed(), x, np.empty((ROWS, 2), "float32"), resume=True)
    with pytest.raises(ArrayError, match="net is a str: it must be a Network"):
        nnfwd.stream("model.npz", x, np.empty((ROWS, 2), "float32"))
    with pytest.raises(ArrayError, match="progress is a bool"):
        nnfwd.stream(mixed(), x, np.empty((ROWS, 2), "float32"), progress=True)
    with pytest.raises(BackendError, match="executor is a str"):
        nnfwd.stream(mixed(), x, np.empty((ROWS, 2), "float32"), executor="tcp://x:1")
    with pytest.raises(ShapeError, match="holds no classes"):
        nnfwd.stream(mixed(), x, np.empty(ROWS), labels=True)


def test_csv_has_a_line_a_row(x, tmp_path):
    for net, source in ((ensemble(), x), (mixed(), x.reshape(10, 100, 4))):
        with pytest.raises(DataFileError, match="a line a row"):
            nnfwd.stream(net, source, tmp_path / "y.csv")
    assert not list(tmp_path.iterdir())


def test_a_csv_as_people_write_it(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes("\ufeffa,b,c,d\n1,2,3,4\n\n# a note\n5,6,7,8  # and another\n  \n9,10,11,12".encode())
    net = mixed("float64")
    y = np.empty((3, 2))
    nnfwd.stream(net, path, y)
    assert np.array_equal(y, streamed(net, np.arange(1.0, 13).reshape(3, 4)))


@pytest.mark.parametrize("extension", [".npy", ".npz", ".csv"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numbers_come_back_as_they_were(extension, dtype, tmp_path):
    """The identity, file to file: every digit that it takes is written."""
    x = inputs(50, 3, dtype=dtype)
    nnfwd.stream(Network([Activation("identity")]), x, tmp_path / f"y{extension}")
    assert np.array_equal(got(tmp_path / f"y{extension}").astype(dtype), x)
    assert np.array_equal(sources.read_whole(tmp_path / f"y{extension}").astype(dtype), x)


def test_csv_with_names(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n3,4\n")
    assert np.array_equal(sources.read_whole(path), [[1, 2], [3, 4]])
    path.write_text("1,2\n")
    assert sources.read_whole(path).shape == (1, 2)
    for first in ("NA,NA", "nan,null", "1;2", ",", "a,b,c"):  # a row that cannot be read is no line of names
        path.write_text(f"{first}\n1,2\n")
        with pytest.raises(DataFileError):
            sources.read_whole(path)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.npy", b"no", "not a valid .npy"),
        ("x.npz", b"no", "not a valid .npz"),
        ("x.csv", b"a,b\n1,x\n", "not a valid .csv"),
        ("x.csv", b"a,b\n1,2\n1\n", r"not a valid .csv file of numbers, with commas between: (?!.*usecols)"),
        ("x.csv", b"1;2\n", "with commas between: could not convert string '1;2'"),
        ("x.csv", b"a,b\n", "holds no numbers"),
        ("x.csv", b"0,1,2\n5,6,7\n", "begins with 0,1,...,2, which may be names or a row"),
        ("x.csv", b"a,b,c\n5,6\n", "3 names in its first line and 2 numbers in its second"),
        ("x.csv", b"\xff\xfe1,2\n", "not a valid .csv"),
        ("x.txt", b"", "no format .txt here: use .npy, .npz, .csv"),
    ],
)
def test_damaged_data(name, content, match, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=match):
        sources.read_whole(path)


# What an engineer who meant no good to it found.


def test_what_failed_once_is_never_said_to_be_on_the_disk(x, tmp_path, monkeypatch):
    """The system reports lost pages once; the next fsync succeeds."""
    path, synced, count = put(tmp_path / "x.npy", x), sinks.synced, iter(range(100))

    def fails_once(file):
        if next(count) == 3:
            raise OSError(errno.EIO, "Input/output error")
        synced(file)

    with monkeypatch.context() as patch:
        patch.setattr(sinks, "synced", fails_once)
        with pytest.raises(DataFileError, match=r"y\.npy: Input/output error; 192 of 1,000 rows are kept"):
            nnfwd.stream(mixed(), path, tmp_path / "y.npy", workers=1)
    assert next(count) == 4
    assert nnfwd.stream(mixed(), path, tmp_path / "y.npy", resume=True).kept == 192
    assert np.array_equal(np.load(tmp_path / "y.npy"), streamed(mixed(), x))


def test_a_journal_line_is_written_whole_or_not_at_all(x, tmp_path, monkeypatch):
    path, written, count = put(tmp_path / "x.npy", x), sinks.written, iter(range(100))

    def short(file, data):
        if next(count) == 4:
            written(file, data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        written(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(streaming.journal, "written", short)
        with pytest.raises(DataFileError, match=r"y\.npy: No space left on device; 192 of 1,000 rows are kept"):
            nnfwd.stream(mixed(), path, tmp_path / "y.npy")
    assert nnfwd.stream(mixed(), path, tmp_path / "y.npy", resume=True).kept == 192
    assert np.array_equal(np.load(tmp_path / "y.npy"), streamed(mixed(), x))


def test_a_disk_that_takes_a_part(x, tmp_path, monkeypatch):
    """A write that comes back short is gone on with."""
    write = streaming.sinks.written

    class Slow:
        def __init__(self, file):
            self.write = lambda data: file.write(data[: max(len(data) // 2, 1)])

    monkeypatch.setattr(sinks, "written", lambda file, data: write(Slow(file), data))
    nnfwd.stream(mixed(), x, tmp_path / "y.npy")
    assert np.array_equal(np.load(tmp_path / "y.npy"), streamed(mixed(), x))


@pytest.mark.parametrize("force", [False, True])
def test_of_two_runs_that_begin_together_one_goes_on(force, x, tmp_path, monkeypatch):
    path, sink, second = put(tmp_path / "x.npy", x), tmp_path / "y.npy", []
    begin = streaming.journal.Journal._begin

    def meet(self, *arguments, **options):
        monkeypatch.setattr(streaming.journal.Journal, "_begin", begin)
        with pytest.raises(DataFileError, match="is being written by another run"):
            nnfwd.stream(mixed(), path, sink, force=force)
        second.append(True)
        begin(self, *arguments, **options)

    monkeypatch.setattr(streaming.journal.Journal, "_begin", meet)
    nnfwd.stream(mixed(), path, sink, force=force)
    assert second
    assert np.array_equal(np.load(sink), streamed(mixed(), x))


def test_a_journal_that_was_removed_before_it_was_locked(x, tmp_path, monkeypatch):
    """The run that had it ended between our opening it and our locking it."""
    fcntl = pytest.importorskip("fcntl")
    flock, sink = fcntl.flock, tmp_path / "y.npy"
    calls = []

    def ended(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            sink.with_name("y.npy.journal").unlink()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", ended)
    nnfwd.stream(mixed(), x, sink)
    assert len(calls) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["y.npy"]


def test_a_disk_without_locks(x, tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", unsupported)
    nnfwd.stream(mixed(), x, tmp_path / "y.npy")
    assert [p.name for p in tmp_path.iterdir()] == ["y.npy"]


@pytest.mark.parametrize("content", [b"\0\1\2" * 100, b'{"mine": 1}\n', b"notes\n"])
@pytest.mark.parametrize("options", [{}, {"force": True}, {"resume": True}])
def test_a_journal_of_somebody_else(content, options, x, tmp_path):
    journal = tmp_path / "y.npy.journal"
    journal.write_bytes(content)
    with pytest.raises(DataFileError, match="in the way, and no journal of ours: move it"):
        nnfwd.stream(mixed(), put(tmp_path / "x.npy", x), tmp_path / "y.npy", **options)
    assert journal.read_bytes() == content


def test_force_removes_only_what_is_its_own(x, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "deep.npy").mkdir()
    put(tmp_path / "in.partial", x)
    before = tree(tmp_path)
    for source, sink, match in (
        (x, "out", r"out\.partial is in the way"),
        (x, "folder", r"holds deep\.npy"),
        (tmp_path / "in.partial", "in", r"in\.partial is read from"),
    ):
        with pytest.raises(DataFileError, match=match):
            nnfwd.stream(mixed(), source, tmp_path / sink, force=True)
    assert tree(tmp_path) == before


def test_force_replaces_no_group_of_zarr(x, tmp_path):
    group = need("zarr").open_group(tmp_path / "y.zarr", mode="w")
    group.create_array("c", data=x)
    with pytest.raises(DataFileError, match=r"holds zarr\.json, which this run would not make"):
        nnfwd.stream(mixed(), x, tmp_path / "y.zarr", force=True)
    assert np.array_equal(need("zarr").open_group(tmp_path / "y.zarr", mode="r")["c"][...], x)


@pytest.mark.parametrize("target", [".npy", ""])
def test_an_output_that_appears_meanwhile(target, x, tmp_path):
    path, sink = put(tmp_path / "x.npy", x), tmp_path / f"y{target}"

    def appear(done=ROWS, total=ROWS):
        if done == ROWS:
            sink.write_text("mine")

    with pytest.raises(DataFileError, match=r"has appeared meanwhile: move it, then .* its name with resume"):
        nnfwd.stream(mixed(), path, sink, progress=appear)
    assert sink.read_text() == "mine"
    with pytest.raises(DataFileError, match="exists|is a file"):
        nnfwd.stream(mixed(), path, sink, resume=True)
    sink.unlink()
    assert nnfwd.stream(mixed(), path, sink, resume=True).kept == ROWS
    assert np.array_equal(got(sink), streamed(mixed(), x))


def test_a_replacing_run_may_be_resumed_without_force(x, tmp_path):
    path, sink = put(tmp_path / "x.npy", x), put(tmp_path / "y.npy", x)
    left(mixed(), path, sink, force=True)
    assert np.array_equal(np.load(sink), x)
    assert nnfwd.stream(mixed(), path, sink, resume=True).kept == 512
    assert np.array_equal(np.load(sink), streamed(mixed(), x))


def test_killed_between_the_two_names_of_a_folder(x, tmp_path, monkeypatch):
    path, sink = put(tmp_path / "x.npy", x), tmp_path / "y"
    nnfwd.stream(mixed(seed=1), path, sink)
    with monkeypatch.context() as patch:
        patch.setattr(streaming.journal.os, "replace", stop)
        with pytest.raises(Stop):
            nnfwd.stream(mixed(), path, sink, force=True)
    assert not sink.exists()
    assert nnfwd.stream(mixed(), path, sink, resume=True).kept == ROWS
    assert np.array_equal(got(sink), streamed(mixed(), x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy", "y"]


def test_an_input_that_is_replaced_while_the_network_is_placed(x, tmp_path, monkeypatch):
    path, compile = put(tmp_path / "x.npy", x), Network.compile

    def replaced(self, **options):
        put(tmp_path / "new.npy", x * 2).replace(path)
        return compile(self, **options)

    monkeypatch.setattr(Network, "compile", replaced)
    with pytest.raises(DataFileError, match="changed while it was read"):
        nnfwd.stream(mixed(), path, tmp_path / "y.npy")
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


def test_an_array_cannot_be_gone_on_from(x, tmp_path):
    with pytest.raises(Stop) as stopped:
        nnfwd.stream(mixed(), x, tmp_path / "y.npy", progress=interrupted(Stop, 500))
    assert stopped.value.__notes__ == ["nothing was written"]
    with pytest.raises(DataFileError, match="an array as the source may be another one by now"):
        nnfwd.stream(mixed(), x, tmp_path / "y.npy", resume=True)
    assert not list(tmp_path.iterdir())


def test_a_touched_input_does_not_lose_what_an_earlier_run_has_made(x, tmp_path):
    path = put(tmp_path / "x.npy", x)
    partial, _ = left(mixed(), path, tmp_path / "y.npy")
    with pytest.raises(DataFileError, match="changed while it was read"):
        nnfwd.stream(mixed(), path, tmp_path / "y.npy", resume=True, progress=lambda done, total: path.touch())
    assert partial.exists()


def test_what_can_only_fail_destroys_nothing(x, tmp_path, monkeypatch):
    path, cube = put(tmp_path / "x.npy", x), put(tmp_path / "cube.npy", x.reshape(10, 100, 4))
    partial, journal = left(mixed(), path, tmp_path / "y.csv")
    before = partial.read_bytes(), journal.read_bytes()
    with pytest.raises(DataFileError, match="a line a row"):
        nnfwd.stream(mixed(), cube, tmp_path / "y.csv", force=True)
    assert (partial.read_bytes(), journal.read_bytes()) == before


def test_errors_name_the_file_that_is_meant(x, tmp_path, monkeypatch):
    path = put(tmp_path / "x.npy", x)
    into = sources._Npy._into

    def fails(self, block, offset):
        if offset > 8000:
            raise OSError(errno.EIO, "Input/output error")
        into(self, block, offset)

    monkeypatch.setattr(sources._Npy, "_into", fails)
    with pytest.raises(DataFileError, match=r"x\.npy: Input/output error; 512 of 1,000 rows are kept"):
        nnfwd.stream(mixed(), path, tmp_path / "y.npy")


def test_a_folder_of_many_files(tmp_path):
    """More than a process may have open."""
    resource = pytest.importorskip("resource")
    x = inputs(1200, 4)
    (tmp_path / "x").mkdir()
    for i, row in enumerate(x):
        with open(tmp_path / "x" / f"{i}.{'NPY' if i % 2 else 'npy'}", "wb") as file:
            np.save(file, row[None])
    np.save(tmp_path / "x" / "._hidden.npy", np.ones(3))
    (tmp_path / "x" / "folder.npy").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        y = np.empty((1200, 2), "float32")
        nnfwd.stream(mixed(), tmp_path / "x", y)
        nnfwd.stream(mixed(), tmp_path / "x", tmp_path / "y")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.array_equal(y, streamed(mixed(), x))
    assert len(list((tmp_path / "y").iterdir())) == 1200


def test_views_of_one_array(x):
    both = np.empty((ROWS + 1, 4), "float32")
    with pytest.raises(ArrayError, match="shares memory"):
        nnfwd.stream(Network([Activation("relu")]), both[:-1], both[1:])


def test_a_link_is_followed(x, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "y.npy").symlink_to(tmp_path / "elsewhere" / "z.npy")
    nnfwd.stream(mixed(), x, tmp_path / "y.npy")
    assert (tmp_path / "y.npy").is_symlink()
    assert np.array_equal(np.load(tmp_path / "elsewhere" / "z.npy"), streamed(mixed(), x))


# Zarr.


def test_zarr_groups_and_older_stores(x, tmp_path):
    zarr = need("zarr")
    group = zarr.open_group(tmp_path / "g.zarr", mode="w")
    with pytest.raises(DataFileError, match="no arrays"):
        nnfwd.stream(mixed(), tmp_path / "g.zarr", tmp_path / "y.npy")
    group.create_array("first", data=x)
    nnfwd.stream(mixed(), tmp_path / "g.zarr", tmp_path / "y.npy")
    group.create_array("second", data=x)
    with pytest.raises(DataFileError, match=r"first, second: name one, .*g\.zarr/first"):
        nnfwd.stream(mixed(), tmp_path / "g.zarr", tmp_path / "z.npy")
    group.create_array("x", data=x)
    zarr.create_array(tmp_path / "old.zarr", data=x, chunks=(300, 3), zarr_format=2)
    for source in ("g.zarr", "g.zarr/second", "old.zarr"):
        nnfwd.stream(mixed(), tmp_path / source, tmp_path / "z.npy", force=True)
        assert np.array_equal(np.load(tmp_path / "z.npy"), streamed(mixed(), x))
    with pytest.raises(FileNotFoundError):
        nnfwd.stream(mixed(), tmp_path / "absent.zarr", tmp_path / "z.npy")


def test_each_chunk_is_read_once(x):
    class Chunked:
        shape, dtype, chunks = x.shape, x.dtype, (130, 4)
        reads: list[int] = []  # noqa: RUF012

        def __getitem__(self, rows):
            self.reads.append(rows.start // 130)
            return x[rows]

    source = Chunked()
    assert np.array_equal(streamed_from(source), streamed(mixed(), x))
    assert source.reads == list(range(8))


def streamed_from(source):
    y = np.empty((ROWS, 2), "float32")
    nnfwd.stream(mixed(), source, y)
    return y


def test_without_zarr_it_says_what_to_install(tmp_path, x, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    (tmp_path / "x.zarr").mkdir()
    for source, sink in ((tmp_path / "x.zarr", tmp_path / "y.npy"), (x, tmp_path / "y.zarr")):
        with pytest.raises(BackendError, match=r"pip install 'nnfwd\[zarr\]'"):
            nnfwd.stream(mixed(), source, sink)
    assert [p.name for p in tmp_path.iterdir()] == ["x.zarr"]


# Blocks, and what is shown of them.


def test_the_network_decides_how_high_a_block_is(monkeypatch):
    monkeypatch.setattr(blocks, "_HIGHEST", 1 << 16)
    for widths, height in (
        ((3, 3, 1), 65536),
        ((16, 64, 32, 32, 5), 32768),
        ((784, 512, 512, 10), 2048),
        ((4096, 16384, 4096), 128),
    ):
        net = Network(Dense(np.ones((b, a), "float32")) for a, b in itertools.pairwise(widths))
        assert blocks._height(net, widths[0], widths[-1]) == height
    assert blocks._height(mixed(), 10**8, 10**8) == 1


def test_progress_on_a_terminal_and_not_in_a_pipe(x, tmp_path, monkeypatch, capsys):
    from nnfwd import progress

    times = iter(np.arange(0.0, 100, 0.5))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(times)))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress() as line:
        bar = Bar(line, "x.npy")
        for done, total in ((0, 1_000_000), (250, 1000), (500, 1000), (1_000_000, 1_000_000)):
            bar(done, total)
    shown = capsys.readouterr().err.split("\r")
    assert shown[1] == "  0% ----------  0 of 1 M rows  x.npy\x1b[K"
    assert shown[3] == " 50% #####-----  500 of 1 k rows  500 rows/s  0:01 left  x.npy\x1b[K"
    assert shown[4] == "100% ##########  1 M of 1 M rows  667 k rows/s  0:00 left  x.npy\x1b[K"
    assert shown[-1] == "\x1b[K"
    with Progress(quiet=True) as line:
        Bar(line, "x.npy")(1, 2)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with Progress() as line:
        Bar(line, "x.npy")(1, 2)
    assert not capsys.readouterr().err
