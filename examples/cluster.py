"""What a Dask cluster makes of the jets network: `python cluster.py [tcp://host:port, or a scheduler file]`.

By itself it starts two workers on this machine. Needs nnfwd[cluster].
"""

import pickle
import sys
import time

import dask.array as da
from distributed import Client, futures_of, wait

from nnfwd.benchmark.cases import PUBLISHED

net, _ = PUBLISHED["jets"].build(1)


def measure(workers, rows, chunk):
    """Seconds for rows that lie in the workers' memory, and the bytes of what the scheduler sends for a chunk."""
    x = da.random.default_rng().random((rows, 16), dtype="float32", chunks=(chunk, 16))
    wait(x := client.persist(x, workers=workers))
    start = time.perf_counter()
    wait(y := client.persist(net(x), workers=workers))
    return time.perf_counter() - start, client.run_on_scheduler(task_size, futures_of(y)[0].key)


def task_size(key, dask_scheduler):
    return len(pickle.dumps(dask_scheduler.tasks[key].run_spec))


if __name__ == "__main__":
    there = {"address" if "://" in name else "scheduler_file": name for name in sys.argv[1:]}
    with Client(**there or {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}) as client:
        every = list(client.nthreads())
        rounds = [(measure(w, 4_000_000, 100_000), measure(w, 500, 1)) for w in (every[:1], every) * 3]
        print("workers        rows/s  ms a chunk  bytes a chunk  bytes a worker")
        for workers, found in ((1, rounds[::2]), (len(every), rounds[1::2])):
            (many, _), (few, size) = map(min, zip(*found, strict=True))
            print(f"{workers:7}{4e6 / many:14,.0f}{few / 500 * 1e3:12.2f}{size:15,}{len(pickle.dumps(net.chain)):16,}")
