"""`nnfwd run` as a process: killed at any moment, interrupted, on a disk that fills up, in memory that stays the same."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from networks import inputs
from places import need

import nnfwd
from nnfwd import Dense, Network

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "backends")))}
if not hasattr(os, "fork"):
    pytest.skip("signals and limits as Unix has them", allow_module_level=True)


# As in a terminal: a process that is begun in the background may be told to ignore SIGINT.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from nnfwd.cli import main
sys.exit(main())
"""
LIMITED = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)){PROGRAM}"


def command(*arguments, program=PROGRAM):
    return [sys.executable, "-c", program, "run", *map(str, arguments)]


def done(*arguments, program=PROGRAM):
    return subprocess.run(command(*arguments, program=program), env=ENVIRONMENT, capture_output=True, text=True)


def wait_for(what, process):
    """Until it is true, while the process runs."""
    while not what():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A folder with a model and inputs that take some seconds: 157 blocks of 256 rows."""
    folder = tmp_path_factory.mktemp("slow")
    net = Network([Dense(inputs(8192, 64) / 8, None, "gelu"), Dense(inputs(8, 8192) / 90, inputs(8))])
    nnfwd.save(net, folder / "model.npz")
    x = inputs(40_000, 64)
    np.save(folder / "x.npy", x)
    assert done(folder / "model.npz", folder / "x.npy", "-o", folder / "whole.npy").returncode == 0
    y = np.load(folder / "whole.npy")
    some = np.r_[:50, 39_950:40_000]
    assert nnfwd.error_bound(net, x[some]).ratio(y[some]).max() <= 1
    return folder


def test_killed_again_and_again(slow, note):
    """SIGKILL at drawn moments; each run goes on from the journal, the last one to the end."""
    moments, sink = random.Random(0), slow / "y.npy"
    arguments = (slow / "model.npz", slow / "x.npy", "-o", sink, "--resume", "--quiet")
    kills, rows = 0, [0]
    for workers in (1, 2, 3, 1, 2):
        process = subprocess.Popen([*command(*arguments), "--workers", str(workers)], env=ENVIRONMENT)
        time.sleep(moments.uniform(0.5, 2.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if sink.exists():
            break
        journal = sink.with_name("y.npy.journal")
        lines = journal.read_text().splitlines() if journal.exists() else []
        rows.append(int(lines[-1].split('"rows": ')[1].split(",")[0]) if len(lines) > 1 else 0)
        assert rows[-1] >= rows[-2]
    assert kills
    last = done(*arguments)
    assert last.returncode == 0 or "exists" in last.stderr
    assert sink.read_bytes() == (slow / "whole.npy").read_bytes()
    assert not [path for path in slow.iterdir() if path.suffix in (".journal", ".partial")]
    note(f"nnfwd run was killed {kills} times, with {', '.join(f'{n:,}' for n in rows[1:])} of 40,000 rows kept")
    sink.unlink()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_from_the_keyboard_or_by_a_scheduler(slow, sent):
    sink = slow / "y.csv"
    process = subprocess.Popen(
        command(slow / "model.npz", slow / "x.npy", "-o", sink), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    journal = sink.with_name("y.csv.journal")
    wait_for(lambda: journal.exists() and len(journal.read_text().splitlines()) > 1, process)
    process.send_signal(sent)
    _, error = process.communicate()
    assert process.returncode == 130
    assert error.count("\n") == 1
    assert "rows are kept in" in error
    assert "--resume" in error
    assert not sink.exists()
    again = done(slow / "model.npz", slow / "x.npy", "-o", sink, "--resume")
    assert "rows were there already" in again.stdout
    assert np.array_equal(np.loadtxt(sink, delimiter=",").astype("f4"), np.load(slow / "whole.npy"))
    sink.unlink()


def test_two_runs_of_one_output(slow):
    sink = slow / "y.npy"
    arguments = (slow / "model.npz", slow / "x.npy", "-o", sink)
    process = subprocess.Popen(command(*arguments), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(sink.with_name("y.npy.journal").exists, process)
    for options in ((), ("--resume",), ("--force",)):
        second = done(*arguments, *options)
        assert second.returncode == 1
        assert "is being written by another run" in second.stderr
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert sink.read_bytes() == (slow / "whole.npy").read_bytes()
    sink.unlink()


@pytest.mark.parametrize("target", ["y.npy", "y.csv", "y"])
def test_a_file_that_may_not_grow(slow, target):
    """The system itself refuses to write on, as it does on a full disk."""
    sink = slow / target
    limited = done(slow / "model.npz", slow / "x.npy", "-o", sink, program=LIMITED)
    assert limited.returncode == 1
    assert limited.stderr.count("\n") == 1
    assert "File too large" in limited.stderr
    assert target in limited.stderr
    assert not sink.exists()
    assert done(slow / "model.npz", slow / "x.npy", "-o", sink, "--resume").returncode == 0
    if target == "y.npy":
        assert sink.read_bytes() == (slow / "whole.npy").read_bytes()
    elif target == "y.csv":
        assert np.array_equal(np.loadtxt(sink, delimiter=",").astype("f4"), np.load(slow / "whole.npy"))
        sink.unlink()
    else:
        assert np.array_equal(np.load(sink / "part-00000.npy"), np.load(slow / "whole.npy"))


def test_on_a_cluster_of_processes(slow):
    """The same bytes from `--dask`, which names a running cluster."""
    need("dask")
    distributed = need("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, worker_dashboard_address=None
    ) as cluster:
        finished = done(slow / "model.npz", slow / "x.npy", "-o", slow / "d.npy", "--dask", cluster.scheduler_address)
    assert finished.returncode == 0, finished.stderr
    assert (slow / "d.npy").read_bytes() == (slow / "whole.npy").read_bytes()


MEASURED = r"""
import re, sys
from nnfwd.cli import main
status = main(sys.argv[1:])
print(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1])
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_memory_does_not_grow_with_the_input(tmp_path, note):
    """Eight times the input, the same memory; the files are holes, so no disk is needed to read them from."""
    widths = (16, 64, 32, 32, 5)
    net = Network(Dense(inputs(b, a), inputs(b), "relu") for a, b in itertools.pairwise(widths))
    nnfwd.save(net, tmp_path / "model.npz")
    peaks = []
    for rows in (4_000_000, 32_000_000):
        np.lib.format.open_memmap(tmp_path / "x.npy", "w+", "f4", (rows, 16))
        arguments = ["run", "model.npz", "x.npy", "-o", "y.npy", "--force", "--quiet"]
        finished = subprocess.run(
            [sys.executable, "-c", MEASURED, *arguments],
            env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(int(finished.stdout) / 1024)
    note(f"nnfwd run of 256 MB and of 2 GB took {peaks[0]:.0f} and {peaks[1]:.0f} MiB of memory")
    assert peaks[1] <= 1.05 * peaks[0]
    assert peaks[1] <= 150
