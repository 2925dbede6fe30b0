"""Threads that share a network, processes that are sent one, and processes forked while a library was in use."""

import functools
import importlib
import multiprocessing
import os
import sys
import threading
import types
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import pytest
from elsewhere import elsewhere, forked
from networks import inputs, mixed
from places import Place, need, places

from nnfwd import Dense, Network, backend
from nnfwd.backend import PRECISIONS
from nnfwd.errors import BackendError

THREADS = 32


def pytest_generate_tests(metafunc):
    """A test of a place is one of every place; they are not looked for where only functions of this module are wanted."""
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", places(), ids=str)


def at_once(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """What a function returns for each item, each in a thread of its own, all set going together."""
    items = list(items)
    together = threading.Barrier(len(items))

    def run(item: Any) -> Any:
        together.wait(timeout=60)
        return function(item)

    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(run, items))


@pytest.fixture
def restless():
    """Threads are interrupted as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def results(run: Callable[[Any], Any], place: Place, x: np.ndarray) -> list[bytes]:
    """Two calls with one x, home."""
    return [place.adapter.to_numpy(run(place.put(x, "float32"))).tobytes() for _ in range(2)]


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize("compiled", [False, True], ids=["called", "compiled"])
def test_threads_that_share_a_network_get_what_one_thread_gets(place, compiled):
    """Bit for bit, from the first calls on, when all of them find the weights not placed yet."""
    xs = [inputs(5, 4, seed=seed) for seed in range(THREADS)]
    for seed in range(6):
        shared, alone = (
            net.compile(backend=place.name, device=place.device) if compiled else net
            for net in (mixed(seed=seed), mixed(seed=seed))
        )
        found = at_once(functools.partial(results, shared, place), xs)
        assert found == [results(alone, place, x) for x in xs]


def test_precisions_of_jax_do_not_meet():
    """Three precisions are traced together, each inside the scopes of the others, and compile to what they do alone."""
    jax = need("jax")
    x = jax.numpy.asarray(inputs(5, 4))

    def program(precision: str, meet: Callable[[], Any]) -> str:
        def probe(h, /, *, xp):
            meet()
            return h

        net = Network([Dense(np.eye(4, dtype="float32"), None, probe), Dense(np.ones((2, 4), dtype="float32"))])
        text = jax.jit(lambda x: net(x, precision=precision)).lower(x).as_text()
        assert jax.config.jax_default_matmul_precision is None
        return text

    alone = [program(precision, lambda: None) for precision in PRECISIONS]
    assert len(set(alone)) == len(PRECISIONS)
    together = threading.Barrier(len(PRECISIONS))
    assert at_once(lambda precision: program(precision, lambda: together.wait(timeout=60)), PRECISIONS) == alone


@pytest.fixture(scope="module")
def spawned():
    """A process started afresh, as `spawn` does: it has none of this one's memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


def home(run: Callable[[Any], Any], x: np.ndarray) -> tuple[int, np.ndarray]:
    """The process, and the result on the host."""
    y = run(x)
    return os.getpid(), backend.of(y).to_numpy(y)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("name", ["numpy", "jax", "torch"])
def test_a_compiled_network_survives_spawn(name, precision, spawned):
    need(name)
    run = mixed().compile(backend=name, precision=precision)
    xs = [inputs(rows, 4, seed=rows) for rows in (3, 3, 7)]
    for (process, there), x in zip(spawned.map(functools.partial(home, run), xs), xs, strict=True):
        _, here = home(run, x)
        assert process != os.getpid()
        assert here.dtype == there.dtype
        assert here.tobytes() == there.tobytes()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks on this system")


def wide() -> tuple[Network, np.ndarray]:
    """A network and an x wide enough that libraries set several threads to work."""
    weight = np.random.default_rng(0).standard_normal((512, 512), dtype="float32")
    return Network([Dense(weight, None, "tanh"), Dense(weight, None, "relu")]), inputs(1024, 512)


def refused(call: Callable[[], Any]) -> str:
    """The message of the `BackendError` that the call must raise."""
    with pytest.raises(BackendError) as caught:
        call()
    return str(caught.value)


def forked_from_jax(_: None) -> dict[str, Any]:
    """What a process forked from one that uses JAX gets of NumPy, and from each way to JAX."""
    net, x = wide()
    backend.load("numpy")
    importlib.import_module("nnfwd_jax")
    unused = forked(lambda: net(x[:2], backend="jax").shape)
    backend.load("jax")  # which asks for its devices, and so starts its threads
    asked = forked(lambda: refused(lambda: net(x, backend="jax")))
    expected = net(x).tobytes()
    adapter, placed, compiled = backend.load("jax"), net.to("jax"), net.compile(backend="jax")
    xj = adapter.place(x, dtype="float32")
    compiled(xj)
    calls = {
        "place": lambda: adapter.place(x, dtype="float32"),
        "net(x)": lambda: placed(xj),
        "host weights": lambda: Network(list(net))(xj),
        "backend=": lambda: net(x, backend="jax"),
        "compiled": lambda: compiled(xj),
        "compiled, x of NumPy": lambda: compiled(x),
        "compile": lambda: net.compile(backend="jax"),
        "to": lambda: net.to("jax"),
        "home": lambda: placed.to("numpy"),
    }

    def child() -> dict[str, Any]:
        return {name: refused(call) for name, call in calls.items()} | {"numpy": net(x).tobytes() == expected}

    return {"unused": unused, "asked": asked} | forked(child)


@needs_fork
def test_a_process_forked_while_jax_is_in_use():
    """NumPy works there as ever. JAX, whose threads stayed behind, is refused, where it would wait for ever."""
    need("jax")
    found = elsewhere(forked_from_jax)
    assert found.pop("unused") == [2, 512], "JAX was not in use yet: it may be used after the fork"
    assert found.pop("numpy")
    for call, message in found.items():
        assert message.startswith("jax was in use when this process was forked"), (call, message)
        assert "multiprocessing.get_context('spawn')" in message


def forked_from_torch(_: None) -> list[bool]:
    """Whether a process forked from one that uses PyTorch gets the same of NumPy, and of PyTorch with one thread."""
    torch = importlib.import_module("torch")
    net, x = wide()
    xt = torch.tensor(x)
    net(xt)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = net(x).tobytes(), net(xt).numpy().tobytes()
    torch.set_num_threads(threads)
    net(xt)

    def child() -> list[bool]:
        torch.set_num_threads(1)
        return [net(x).tobytes() == expected[0], net(xt).numpy().tobytes() == expected[1]]

    return forked(child)


@needs_fork
def test_a_process_forked_while_torch_is_in_use():
    need("torch")
    assert elsewhere(forked_from_torch) == [True, True]


def test_torch_refuses_cuda_in_a_forked_process():
    """PyTorch knows of itself that it was forked; here it only says so, for want of a GPU."""
    torch = need("torch")
    adapter, x = backend.load("torch"), inputs(5, 4)
    on_a_gpu = types.SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float32)
    with mock.patch.object(torch.cuda, "_is_in_bad_fork", return_value=True):
        for call in (
            lambda: adapter.place(x, dtype="float32", device="cuda:0"),
            lambda: adapter.place(x, dtype="float32", like=on_a_gpu),
            lambda: adapter.scope("highest", on_a_gpu).__enter__(),
        ):
            assert "spawn" in refused(call)
        assert np.array_equal(mixed()(torch.tensor(x)).numpy(), mixed()(x, backend="torch", device="cpu").numpy())
