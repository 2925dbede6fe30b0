"""NumPy's execution: tiles, threads and recorded passes give the pass's own numbers, whatever the machine."""

import gc
import itertools
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import nnfwd_numpy
import numpy as np
import pytest
import threadpoolctl
from cases import cases
from elsewhere import forked
from hypothesis import given
from hypothesis import strategies as st
from networks import ensemble, inputs, mixed, tutorial
from nnfwd_numpy import program, threads, tiles
from nnfwd_numpy.recording import record

from nnfwd import Activation, Dense, Network, activations
from nnfwd.bounds import arithmetic_of, array_bound
from nnfwd.cases import Case
from nnfwd.errors import BackendError, NnfwdError, UnknownNameError

MEBIBYTE = 1 << 20


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few rows on several threads, whatever the batch: every way of running is taken on small arrays."""
    monkeypatch.setattr(tiles, "_TALL", 4)
    monkeypatch.setattr(tiles, "_WORK", 1)
    monkeypatch.setattr(tiles, "_LOW", 0)
    monkeypatch.setattr(tiles, "_HEAVY", -1)
    monkeypatch.setattr(tiles, "cache_size", lambda: 64)
    monkeypatch.setattr(program, "cache_size", lambda: 64)
    monkeypatch.setattr(program, "_WIDE", 2)


ORDERS = ("straight", "rows", "features", "by layers", "one by one")


def run_as(order, net, x, monkeypatch, count=3):
    """The output for x `(rows, in)`, run in the one way or the other."""
    run = net.compile(backend="numpy", dtype=x.dtype, threads=count)
    if order == "one by one":
        return np.stack([run(row) for row in x], axis=-2)
    monkeypatch.setattr(tiles, "_LOW", 10**9 if order == "by layers" else 0)
    monkeypatch.setattr(tiles, "_WORK", 10**12 if order == "straight" else 1)
    monkeypatch.setattr(tiles, "_WIDE", 3)
    in_tiles = "features" if order == "features" and net.chain.members is None else "rows"
    monkeypatch.setattr(tiles, "_order", lambda values: in_tiles)
    return run(x)


def assert_inside(net, x, y):
    bounded = array_bound(x, net, arithmetic=arithmetic_of(nnfwd_numpy, str(x.dtype)))
    assert y.dtype == x.dtype
    assert y.shape == bounded.exact.shape
    assert (bounded.ratio(y) <= 1).all()


def every_parameter(name):
    function = activations.named(name)
    return function(**{key: -0.5 if key == "lower" else 0.75 for key in function.parameters})


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", activations.names())
def test_every_activation_in_every_order(name, order, small_tiles, monkeypatch):
    function = every_parameter(name)
    for dtype in ("float16", "float32", "float64"):
        rng = np.random.default_rng(0)

        def draw(*shape, rng=rng, dtype=dtype):
            return rng.standard_normal(shape).astype(dtype)

        layers = [Dense(draw(5, 4), draw(5), function), Dense(draw(6, 5), None, function), Dense(draw(1, 6), draw(1))]
        x = draw(29, 4)
        for net in (Network(layers), Network([Activation(function), *layers[:2]])):
            assert_inside(net, x, run_as(order, net, x, monkeypatch))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_random_networks_in_every_order(order, dtype, small_tiles, monkeypatch):
    @given(case=cases(dtype))
    def every_network(case: Case):
        x = case.x.reshape(-1, case.x.shape[-1])
        if order == "one by one" and not len(x):
            return
        bounded = array_bound(x, case.network, arithmetic=arithmetic_of(nnfwd_numpy, dtype))
        y = run_as(order, case.network, x, monkeypatch)
        assert y.shape == bounded.exact.shape
        assert (bounded.ratio(y) <= 1).all()

    every_network()


@pytest.mark.parametrize("make", [mixed, ensemble])
@given(rows=st.integers(0, 70), count=st.integers(1, 5))
def test_any_number_of_rows_and_threads(make, rows, count):
    net, x = make("float32"), inputs(rows, 4)
    with mock.patch.multiple(tiles, _WORK=1, _TALL=8, cache_size=lambda: 64):
        y = net.compile(backend="numpy", threads=count)(x)
    assert_inside(net, x, y)


LAYOUTS = {
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "column-major": np.asfortranarray,
    "every other": lambda x: np.repeat(x, 2, axis=-1)[:, ::2],
    "backwards": lambda x: x[::-1].copy()[::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "unaligned": lambda x: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape),
}


@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [mixed, ensemble, lambda dtype: tutorial()[0].to(dtype=dtype)[:1]])
def test_layouts_of_x(make, layout, rows, small_tiles):
    net = make("float32")
    x = inputs(rows, net.in_features)
    given = LAYOUTS[layout](x)
    before = given.tobytes()
    y = net.compile(backend="numpy")(given)
    assert y.dtype == np.float32
    assert y.dtype.isnative
    assert_inside(net, x, y)
    assert given.tobytes() == before


def test_leading_axes_and_single_rows(small_tiles):
    net = mixed()
    run = net.compile(backend="numpy")
    x = inputs(3, 2, 5, 4)
    for one in (x, x[0], x[0, 0], x[0, 0, 0], x[:1, :1, :1], x[:0], x[:, :, :0]):
        y = run(one)
        assert y.shape == (*one.shape[:-1], 2)
        flat = one.reshape(-1, 4)
        assert_inside(net, flat, y.reshape(-1, 2))
    many = ensemble().compile(backend="numpy")
    assert [many(one).shape for one in (x, x[0, 0, 0], x[:0])] == [(3, 3, 2, 5, 2), (3, 2), (3, 0, 2, 5, 2)]


def test_a_network_without_weights_takes_any_width():
    run = Network([Activation("softmax")]).compile(backend="numpy", dtype="float32")
    for width in (3, 4, 3):
        for rows in (1, 6):
            x = inputs(rows, width)
            assert_inside(Network([Activation("softmax")]), x, run(x))


def test_few_widths_are_kept():
    run = Network([Activation("relu")]).compile(backend="numpy", dtype="float32")
    for width in range(1, 20):
        for rows in (1, 5):
            assert run(np.ones((rows, width), "float32")).shape == (rows, width)
    assert len(run._run._passes) <= 4


@pytest.mark.parametrize("rows", [1, 7, 3000])
def test_results_are_the_callers_own(rows):
    run = mixed().compile(backend="numpy")
    first = run(inputs(rows, 4))
    kept = first.copy()
    second = run(inputs(rows, 4, seed=5))
    assert np.array_equal(first, kept)
    assert not np.shares_memory(first, second)
    assert first.flags.owndata or first.base.flags.owndata
    first[...] = 0


def test_a_row_of_nan_leaves_the_others_as_they_are(small_tiles):
    run, x = mixed().compile(backend="numpy", threads=2), inputs(50, 4)
    spoilt = x.copy()
    spoilt[[3, 30]] = np.nan
    others = np.setdiff1d(np.arange(50), [3, 30])
    assert np.array_equal(run(spoilt)[others], run(x)[others])
    assert np.isnan(run(spoilt)[[3, 30]]).all()


def test_the_same_shape_gives_the_same_bits():
    """Whatever else runs, and however many threads BLAS has."""
    many = Network([Dense(inputs(20_000, 5), None, "softmax")])
    for net, rows in ((wide(64), 3000), (wide(512), 300), (wide(64), 1), (many, 1), (many, 40)):
        run, x = net.compile(backend="numpy", threads=2), inputs(rows, net.in_features)
        wanted = run(x).tobytes()
        with ThreadPoolExecutor(6) as pool:
            assert {y.tobytes() for y in pool.map(run, [x] * 24)} == {wanted}
        for limit in (1, 2):
            with threadpoolctl.threadpool_limits(limit, "blas"):
                assert run(x).tobytes() == wanted


def wide(width):
    rng = np.random.default_rng(0)
    widths = (width, 2 * width, width, 7)
    return Network(
        Dense(rng.standard_normal((out, n), dtype="float32") / n**0.5, rng.standard_normal(out, dtype="float32"), name)
        for n, out, name in zip(widths, widths[1:], ("relu", "gelu", "softmax"), strict=False)
    )


def blas_threads():
    found = [library for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
    own = [library for library in found if "numpy" in library["filepath"]]  # SciPy may bring another, later
    return [library["num_threads"] for library in own or found]


@pytest.fixture
def two_threads():
    with threadpoolctl.threadpool_limits(2, "blas"):
        if set(blas_threads()) != {2}:
            pytest.skip("this BLAS cannot be set to two threads")
        yield


def test_blas_runs_on_one_thread_and_is_set_back(two_threads, monkeypatch):
    seen = []
    run = tiles._Tiles._tile

    def watched(self, *arguments):
        seen.append(blas_threads())
        run(self, *arguments)

    monkeypatch.setattr(tiles._Tiles, "_tile", watched)
    compiled = wide(64).compile(backend="numpy")
    compiled(inputs(5000, 64))
    assert {n for found in seen for n in found} == {1}
    assert set(blas_threads()) == {2}


def test_blas_is_set_back_after_an_error_and_no_thread_goes_on(two_threads, monkeypatch):
    started, stopped = threading.Event(), []

    def breaks(self, x, y, start, stop, height):
        if threading.current_thread() is threading.main_thread():
            started.wait(5)
            raise MemoryError("no more")
        started.set()
        stopped.append(start)

    compiled = wide(64).compile(backend="numpy", threads=2)
    x = inputs(20_000, 64)
    wanted = compiled(x)
    with monkeypatch.context() as patched:
        patched.setattr(tiles._Tiles, "_tile", breaks)
        with pytest.raises(MemoryError, match="no more"):
            compiled(x)
    assert set(blas_threads()) == {2}
    assert np.array_equal(compiled(x), wanted)


def test_an_error_in_a_helping_thread_is_raised(two_threads, monkeypatch):
    helped = threading.Event()
    run = tiles._Tiles._tile

    def breaks(self, *arguments):
        if threading.current_thread() is threading.main_thread():
            helped.wait(5)
            return run(self, *arguments)
        helped.set()
        raise MemoryError("no more")

    compiled = wide(64).compile(backend="numpy", threads=2)
    monkeypatch.setattr(tiles._Tiles, "_tile", breaks)
    with pytest.raises(MemoryError, match="no more"):
        compiled(inputs(20_000, 64))
    assert set(blas_threads()) == {2}


def test_blas_is_set_back_when_the_last_of_many_calls_ends(two_threads):
    compiled = [wide(64).compile(backend="numpy", threads=n) for n in (1, 2, 3)]
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(lambda i: compiled[i % 3](inputs(2000 + i, 64)).shape, range(60)))) == 60
    assert set(blas_threads()) == {2}


def test_a_forked_process_has_threads_of_its_own():
    net, x = wide(64), inputs(20_000, 64)
    run = net.compile(backend="numpy", threads=2)
    wanted = run(x).tobytes()
    assert forked(lambda: run(x).tobytes() == wanted)


def test_a_thread_that_outlives_the_main_one():
    program = (
        "import threading, time, numpy, nnfwd\n"
        "net = nnfwd.Network([nnfwd.Dense(numpy.ones((8, 64)))])\n"
        "x = numpy.ones((20000, 64))\n"
        "net(x)\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print(net(x).sum()))).start()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{20000 * 8 * 64.0}\n", done.stderr


def test_a_softmax_after_a_single_feature():
    x = inputs(3, 1)
    net = Network([Dense(inputs(1, 1), inputs(1)), Dense(inputs(4, 1), inputs(4), "softmax")])
    for rows in (x, x[:1]):
        assert_inside(net, rows, net.compile(backend="numpy")(rows))


def test_threads_and_other_options():
    net = mixed()
    for count in (0, -1, 1.5, "two", True):
        with pytest.raises(BackendError, match=rf"threads is {count!r}: it must be a positive whole number"):
            net.compile(backend="numpy", threads=count)
    with pytest.raises(UnknownNameError, match="unknown option of compile on numpy 'thread': did you mean 'threads'"):
        net.compile(backend="numpy", thread=2)
    again = pickle.loads(pickle.dumps(net.compile(backend="numpy", threads=2)))
    assert again.options == {"threads": 2}


def test_a_callable_that_mixes_rows_is_run_whole(small_tiles):
    def centred(x, /, *, xp):
        return x - xp.mean(x, axis=0, keepdims=True)

    net, x = Network([Dense(np.eye(4, dtype="float32"), None, centred)]), inputs(50, 4)
    assert np.array_equal(net.compile(backend="numpy", threads=3)(x), net(x))


def test_a_large_x_is_run_in_tiles_and_a_small_one_is_not(monkeypatch):
    net, x = wide(64), inputs(5000, 64)
    used = []
    run = tiles._Tiles._tile
    monkeypatch.setattr(tiles._Tiles, "_tile", lambda self, *arguments: (used.append(1), run(self, *arguments))[1])
    assert net(x[:100]).shape == (100, 7)
    assert not used
    assert not net.chain.ready
    assert np.array_equal(net(x), net.compile(backend="numpy")(x))
    assert used
    assert_inside(net, x[:300], net(x)[:300])


def peak(call):
    gc.collect()
    tracemalloc.start()
    try:
        y = call()
        return tracemalloc.get_traced_memory()[1] - y.nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("widths", "name", "rows"),
    [
        ((3, 3, 1), "sigmoid", 2_000_000),
        ((16, 64, 32, 32, 5), "gelu", 400_000),
        ((784, 512, 512, 10), "softmax", 30_000),
        ((640, 8, 640), "mish", 60_000),
        ((64, 8192, 64), "gelu", 5_000),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 16])
def test_memory_is_output_and_model_and_64_mebibytes(widths, name, rows, count):
    rng = np.random.default_rng(0)
    net = Network(
        Dense(rng.standard_normal((out, n), dtype="float32") / n**0.5, np.zeros(out, "float32"), name)
        for n, out in itertools.pairwise(widths)
    )
    model = sum(layer.weight.nbytes for layer in net)
    x = np.zeros((rows, widths[0]), "float32")
    run = net.compile(backend="numpy", threads=count)
    assert peak(lambda: run(x)) <= model + 64 * MEBIBYTE
    assert peak(lambda: net(x)) <= model + 64 * MEBIBYTE


def test_a_mapped_file_is_read_once_and_in_order(tmp_path, monkeypatch):
    x = inputs(40_000, 64)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    taken = []
    run = tiles._Tiles._tile

    def watched(self, x, y, start, stop, height):
        taken.append((start, stop))
        run(self, x, y, start, stop, height)

    monkeypatch.setattr(tiles._Tiles, "_tile", watched)
    net = wide(64)
    y = net.compile(backend="numpy", threads=1)(mapped)
    assert type(y) is np.ndarray
    assert len(taken) > 3
    assert [start for start, _ in taken] == [0, *(stop for _, stop in taken[:-1])]
    assert taken[-1][1] == len(x)
    assert np.array_equal(y, net.compile(backend="numpy", threads=1)(x))


def test_what_cannot_be_recorded_says_so():
    for strange in (np.sort, lambda x: np.max(x, axis=0), lambda x: x @ x, lambda x: np.add(x, 1, dtype="float64")):
        with pytest.raises(NotImplementedError, match="the pass asks for"):
            record(strange, 4, "float32")


def test_steps_that_nothing_needs_are_left_out():
    def wasteful(x):
        np.exp(x)
        return np.maximum(x, 0.0)

    assert [value.kind for value in record(wasteful, 4, "float32")] == ["input", "ufunc"]


def test_products_and_their_biases_are_one_call():
    values = record(lambda x: np.add(np.matmul(x, np.ones((4, 3))), np.ones(3)), 4, "float64")
    assert len(program.Program(values, "rows").values) == 3
    assert len(program.Program(values, "features").values) == 2
    large = record(lambda x: np.add(np.matmul(x, np.ones((2**12, 2**8))), np.ones(2**8)), 2**12, "float64")
    assert len(program.Program(large, "features").values) == 3


def test_errors_are_those_of_the_plain_pass():
    run = mixed().compile(backend="numpy")
    for wrong in (inputs(3, 5), inputs(3, 4).astype("float64"), np.ones((3, 4), "complex64")):
        with pytest.raises(NnfwdError):
            run(wrong)


def test_processors_are_asked_for_where_the_system_has_them():
    assert threads.cache_size() >= 1 << 15
    if sys.platform == "linux":
        found = threads._others(3)
        assert len(found) == 3
