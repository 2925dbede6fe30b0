"""Dask on processes of their own: what each of them gets, and what comes back when one of them dies."""

import hashlib
import json
import os
import pickle
import signal
import socket
import sys
import time

import numpy as np
import pytest
from networks import inputs
from places import need

from nnfwd import Network, backend, error_bound
from nnfwd.benchmark.cases import PUBLISHED
from nnfwd.errors import BackendError
from nnfwd.layers import Chain

# The functions below run on the workers, which import this module.

MADE: list[Chain] = []  # in a worker: every network that was made there since `count_networks`


def count_networks():
    make = Chain.__init__

    def counted(self, layers):
        MADE.append(self)
        make(self, layers)

    Chain.__init__ = counted


def networks_made():
    """How many, and how many passes each of them compiled."""
    return [len(chain.ready) for chain in MADE]


class Shared:
    """Something larger than what Dask warns of in a graph. It counts how often it comes to a process."""

    came = 0

    def __init__(self):
        self.array = np.ones(12_000_000, "uint8")

    def __reduce__(self):
        return (Shared.restored, (self.array,))

    @classmethod
    def restored(cls, array):
        cls.came += 1
        shared = object.__new__(cls)
        shared.array = array
        return shared


def where(shared, *args):
    """The process, how often the shared object came to it, and the arguments."""
    time.sleep(0.02)
    return os.getpid(), type(shared).came, args


def fail(shared):
    raise LookupError("on purpose")


HIDDEN = {"dashboard_address": ":0", "scheduler_kwargs": {"dashboard": False}}  # without the port that is the usual one


@pytest.fixture(scope="module")
def client():
    need("dask")
    distributed = need("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, memory_limit=None, **HIDDEN) as local,
        distributed.Client(local) as client,
    ):
        yield client


def workers(client):
    """The two processes, by address; after one was killed, once it is replaced."""
    client.wait_for_workers(2, timeout=60)
    return client.run(os.getpid)


def kill(client, address):
    """SIGKILL to the process of a worker; until the scheduler knows."""
    os.kill(workers(client)[address], signal.SIGKILL)
    until(lambda: address not in client.scheduler_info()["workers"])


def until(true):
    for _ in range(300):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("it has not come true in half a minute")


def test_each_worker_gets_the_network_once(client):
    """Twelve megabytes, 64 tasks: they are in the graph once, each process unpickles them once, compiles them once."""
    import dask
    import dask.array as da
    import distributed

    wide = np.random.default_rng(0).standard_normal((1024, 1024), dtype="float32") / 32
    net = Network.from_arrays([wide, wide, wide], None, "tanh")
    size = len(pickle.dumps(net.chain))
    row = inputs(1, 1024)
    x = da.map_blocks(np.broadcast_to, row, (40, 1024), chunks=((40,) * 64, (1024,)), dtype="float32", meta=row[:0])
    client.run(count_networks)
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": size + 50_000}):  # the warning is an error
        y = client.persist(net(x))
        distributed.wait(y)
        sent = [
            len(pickle.dumps(task.run_spec)) for key, task in client.cluster.scheduler.tasks.items() if y.name in key
        ]
        assert len(sent) == 64
        assert max(sent) < row.nbytes + 2_000, "no task carries the weights"
        last = y[-40:].compute()
    assert list(client.run(networks_made).values()) == [[1], [1]]
    assert error_bound(net, np.repeat(row, 40, axis=0)).ratio(last).max() <= 1


ROWS, CHUNKS, CONTENTS = 200_000, 100, 4


def rows(content):
    return np.random.default_rng(content).standard_normal((ROWS, 16), dtype="float32")


def chunk(block_id=None):
    return rows(block_id[0] % CONTENTS)


def digest(block):
    return np.frombuffer(hashlib.sha256(block).digest(), "uint8")[None]


def test_twenty_million_rows_and_a_worker_killed_in_the_middle(client):
    """Every row bit for bit, by a digest of each chunk, and some rows of each against the bound."""
    import dask.array as da
    import distributed

    net = PUBLISHED["jets"].build(1)[0]
    sizes = (ROWS,) * CHUNKS
    x = da.map_blocks(chunk, chunks=(sizes, (16,)), dtype="float32", meta=np.empty((0, 0), "float32"))
    y = net(x)
    assert y.shape == (20_000_000, 5)
    step = ROWS // 4 - 1
    digests, some = client.persist(
        [y.map_blocks(digest, chunks=((1,) * CHUNKS, (32,)), dtype="uint8"), y[::step]], optimize_graph=True
    )
    futures = distributed.futures_of(digests)
    finished = distributed.as_completed(futures)
    for _ in range(CHUNKS // 4):
        next(finished)
    address = next(iter(client.has_what()))
    killed = workers(client)[address]
    lost = set(client.has_what()[address]) & {future.key for future in futures}
    left = sum(not future.done() for future in futures)
    kill(client, address)
    assert lost, "it had results"
    assert left > 0, "there was work left"
    found, some = digests.compute(), some.compute()
    assert killed not in workers(client).values()

    alone = net.compile(backend="numpy", threads=1)  # as many as a worker's BLAS has
    contents = [rows(content) for content in range(CONTENTS)]
    expected = np.concatenate([digest(alone(content)) for content in contents])
    assert len(np.unique(expected, axis=0)) == CONTENTS
    assert np.array_equal(found, expected[np.arange(CHUNKS) % CONTENTS])
    at = np.arange(0, ROWS * CHUNKS, step)
    picked = np.stack([contents[i // ROWS % CONTENTS][i % ROWS] for i in at])
    assert some.shape == (len(at), 5)
    assert error_bound(net, picked).ratio(some).max() <= 1


def test_what_is_shared_comes_to_each_worker_once(client):
    shared, tasks = Shared(), client.cluster.scheduler.tasks
    with backend.load("dask").cluster(client.cluster.scheduler_address) as cluster:
        assert cluster.threads == 2
        answers = [future.result() for future in [cluster.submit(where, shared, i, "a") for i in range(40)]]
        assert [args for _, _, args in answers] == [(i, "a") for i in range(40)]
        assert {pid for pid, _, _ in answers} == set(workers(client).values())
        assert {came for _, came, _ in answers} == {1}
        large = shared.array[::-1]  # of which Dask would warn, too
        assert np.array_equal(cluster.submit(where, shared, large).result()[2][0], large)
        with pytest.raises(LookupError, match="on purpose"):
            cluster.submit(fail, shared).result()
        ours = {key for key in tasks if str(key).startswith(("_itself-", "where-", "fail-"))}
        assert len(ours) >= 1
    until(lambda: not ours & tasks.keys())
    assert client.submit(sum, [1, 2]).result() == 3, "the cluster runs on"


def test_what_is_shared_outlives_the_worker_that_had_it(client, tmp_path):
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": client.cluster.scheduler_address}))
    with backend.load("dask").cluster(str(file)) as cluster:
        shared = Shared()
        alone, came, _ = cluster.submit(where, shared).result()
        assert came >= 1
        (address,) = [address for address, pid in workers(client).items() if pid == alone]
        assert len(client.has_what()[address]) >= 1
        for address in workers(client):  # one after the other: at the end nobody has it who had it
            kill(client, address)
        pid, came, args = cluster.submit(where, shared, 5).result()
        assert (came, args) == (1, (5,))
        assert pid != alone


@pytest.mark.parametrize("address", ["file", "scheme", "host", "port", "json", "nobody"])
def test_where_no_scheduler_answers(address, tmp_path, monkeypatch):
    need("dask")
    need("distributed")
    adapter = backend.load("dask")
    monkeypatch.setattr(adapter, "_PATIENCE", 0.5)
    broken = tmp_path / "broken.json"
    broken.write_text("[]")
    with socket.socket() as bound:  # a port that nobody listens at
        bound.bind(("127.0.0.1", 0))
        given = {
            "file": str(tmp_path / "none.json"),
            "scheme": "smoke://127.0.0.1:8786",
            "host": "tcp://no.such.host.invalid:8786",
            "port": "tcp://127.0.0.1",
            "json": str(broken),
            "nobody": f"tcp://127.0.0.1:{bound.getsockname()[1]}",
        }[address]
        with pytest.raises(BackendError) as caught, adapter.cluster(given):
            pass
    assert str(caught.value).startswith(f"no Dask scheduler answers at {given}: give its address, tcp://host:port, or")


def test_without_distributed(monkeypatch):
    need("dask")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(BackendError, match=r"distributed is not installed: pip install 'nnfwd\[cluster\]'"),
        backend.load("dask").cluster("tcp://127.0.0.1:8786"),
    ):
        pass


def test_a_cluster_that_fails_says_so(client):
    distributed = need("distributed")

    class Lost:
        def result(self):
            raise distributed.comm.CommClosedError("in <TCP>: stream is closed")

    with backend.load("dask").cluster(client.scheduler.address) as cluster:
        outcome = cluster.submit(str, 1)
        outcome._future = Lost()
        with pytest.raises(BackendError, match="the Dask cluster failed: CommClosedError: in <TCP>: stream is closed"):
            outcome.result()
