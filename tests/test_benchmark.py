"""`nnfwd bench`: what it measures, that it checks before it measures, and what it says of an earlier run."""

import functools
import itertools
import json
import os

import numpy as np
import pytest
from networks import ensemble, inputs, mixed, tutorial
from places import need

import nnfwd
from nnfwd import Dense, Network, Scale, backend, benchmark
from nnfwd.benchmark import Case, Report, Result, Timing, measure, peers
from nnfwd.bounds import arithmetic_of, array_bound
from nnfwd.cli import main
from nnfwd.network import Compiled

survey = functools.cache(backend.backends)  # which takes a while


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(backend, "backends", survey)
    monkeypatch.setattr(measure, "GEMM", 64)
    monkeypatch.setattr(measure, "WARM", 1e-6)
    monkeypatch.setattr(measure, "_rest", lambda: None)
    monkeypatch.setattr(measure, "SHORTEST", 1e-5)
    monkeypatch.setenv("JAX_ENABLE_X64", "0")  # the command sets it for its own process: here it must not stay


def bench(*arguments, backends="numpy", rounds=2):
    return main(["bench", "--rounds", str(rounds), "--backends", backends, *map(str, arguments)])


@pytest.fixture
def model(tmp_path):
    nnfwd.save(mixed(), tmp_path / "model.npz")
    return tmp_path / "model.npz"


# What is measured


def test_every_published_case_is_what_it_says():
    names = [case.name for case in benchmark.published()]
    assert names == list(benchmark.PUBLISHED)
    assert len(names) == 9 + 4
    for name in set(names) - {"block"}:  # which holds half a gigabyte
        published = benchmark.PUBLISHED[name]
        net, x = published.build(3)
        assert net.dtype == x.dtype == "float32"
        assert x.shape == (3, published.widths[0])
        assert (net.in_features, *(layer.out_features for layer in net)) == published.widths
        assert tuple(layer.activation.name for layer in net) == published.activations
        assert published.build(3)[0] == net
    assert benchmark.PUBLISHED["digits-1"].rows == 1


def test_a_case_through_the_command_line(capsys):
    assert bench("--case", "tutorial,jets-1", "--rows", "50", "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""  # no progress in a pipe
    report = json.loads(out)
    assert report["ok"]
    assert report["geometric_mean"] is None
    assert [(case["case"], case["rows"]) for case in report["cases"]] == [("tutorial", 50), ("jets-1", 50)]
    case = report["cases"][0]
    assert case["network"] == "3-3-1 sigmoid, sigmoid"
    assert case["flops"] == 2 * (9 + 3) * 50
    (timing,) = case["timings"]
    assert (timing["name"], timing["peer"], timing["verdict"]) == ("numpy", False, "inside")
    assert 0 < timing["seconds"][0] <= timing["seconds"][1] <= timing["seconds"][2]
    assert timing["gflops"] == case["flops"] / timing["seconds"][1] / 1e9
    assert timing["of_gemm"] == case["flops"] / timing["seconds"][1] / case["gemm"]
    assert {"processor", "cores", "threads", "python", "versions", "blas", "date"} <= set(report["machine"])
    assert report["machine"]["versions"]["numpy"] == np.__version__


def test_the_table_beside_naive_numpy(capsys, monkeypatch):
    absent = peers.Peer("Absent", "no_such_module", "no-such-peer", peers._naive)
    monkeypatch.setattr(peers, "PEERS", (absent, peers.PEERS[-1]))
    assert bench("--case", "digits", "--rows", "20,30", "--peers") == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 110 for line in out.splitlines()[3:])
    for text in (f"{nnfwd.backend.usable_cores()} thread", "naive NumPy", "inside", "Median times"):
        assert text in out
    assert "peers that are not installed: pip install no-such-peer" in out
    assert "geometric mean of the ratios: " in out
    assert out.count("digits") == 3 * 2  # a row of three tables for each batch size


def test_a_model_at_its_rows_and_on_its_data(model, tmp_path, capsys):
    np.save(tmp_path / "x.npy", inputs(2 * 6, 4).reshape(2, 6, 4))
    for arguments, rows in (((), [1, 10_000]), (("--rows", "7,1_0"), [7, 10]), (("--data", tmp_path / "x.npy"), [12])):
        assert bench(model, "--json", *arguments) == 0
        report = json.loads(capsys.readouterr().out)
        assert [case["rows"] for case in report["cases"]] == rows
        assert {case["case"] for case in report["cases"]} == {"model.npz"}


def test_a_model_in_float64_and_an_ensemble(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "PEERS", peers.PEERS[-1:])
    nnfwd.save(tutorial()[0], tmp_path / "wide.npz")
    nnfwd.save(ensemble(), tmp_path / "many.npz")
    assert bench(tmp_path / "wide.npz", "--rows", 5, "--json") == 0
    assert json.loads(capsys.readouterr().out)["cases"][0]["dtype"] == "float64"
    assert os.environ["JAX_ENABLE_X64"] == "0"
    assert bench(tmp_path / "many.npz", "--rows", 5, "--peers") == 0
    assert "many.npz: naive NumPy is left out: it is set up here for Dense layers alone, and this is an ensemble" in (
        capsys.readouterr().out
    )


def test_other_backends_are_measured_to_completion(capsys):
    need("jax")
    assert bench("--case", "tutorial", "--rows", "9", "--json", backends="jax,numpy") == 0
    timings = json.loads(capsys.readouterr().out)["cases"][0]["timings"]
    assert [(timing["name"], timing["verdict"]) for timing in timings] == [("numpy", "inside"), ("jax", "inside")]


def test_devices_that_are_no_cpu(capsys):
    assert bench("--case", "jets", "--rows", "9", "--json", backends="emulated") == 0
    timings = json.loads(capsys.readouterr().out)["cases"][0]["timings"]
    assert {"emulated flushing", "emulated blocked"} <= {timing["name"] for timing in timings}
    assert {timing["verdict"] for timing in timings} == {"inside"}


# The peers

SMALL = {
    "relu": (12, 9, 5),
    "sigmoid": (7, 6, 1),
    "tanh": (8, 8, 8),
    "softmax": (6, 5, 4),
    "gelu": (5, 7, 3),
}


def library(peer):
    """What the peer needs; where it is not installed, the test is skipped."""
    need(peer.module)
    if peer.module == "onnxruntime":
        need("onnx")  # to write the file


def small(name):
    rng = np.random.default_rng(0)
    first, last = {"softmax": ("relu", "softmax"), "sigmoid": ("sigmoid",) * 2}.get(name, (name, "identity"))
    widths = SMALL[name]
    weights = [rng.standard_normal((o, i), dtype="float32") for i, o in itertools.pairwise(widths)]
    return Network.from_arrays(weights, [rng.standard_normal(len(weights[0]), dtype="float32"), None], [first, last])


PAIRS = [(peer, name) for peer in peers.PEERS for name in SMALL if peer.name != "torch.compile" or name == "softmax"]
"""torch.compile once: it takes seconds."""


@pytest.mark.parametrize(("peer", "name"), PAIRS, ids=[f"{peer.name}-{name}" for peer, name in PAIRS])
def test_peers_agree_with_the_bound(peer, name):
    library(peer)
    net, x = small(name), inputs(33, SMALL[name][0])
    before = x.copy()
    try:
        call, argument = peer.prepare(net, x, 2)
    except peers.InexpressibleError as error:
        assert name == "gelu", error
        return
    y = np.asarray(call(argument))
    arithmetic = arithmetic_of(backend.load("numpy"), "float32")
    assert y.dtype == "float32"
    assert array_bound(x, net, arithmetic=arithmetic).ratio(y).max() <= 2  # they promise nothing
    assert np.array_equal(x, before)
    assert np.array_equal(np.asarray(call(argument)), y)


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_what_a_peer_cannot_run_is_said(peer):
    library(peer)
    own = Network([Dense(np.eye(3, dtype="float32"), None, lambda x, /, *, xp: x)])
    for net in (own, Network([Dense(np.eye(3, dtype="float32"), None, "mish")]), Network([Scale(2.0)])):
        with pytest.raises((peers.InexpressibleError, nnfwd.errors.NnfwdError)):
            peer.prepare(net, inputs(2, 3), 1)
        if peer.name == "ONNX Runtime":  # it runs what nnfwd.save writes
            break


def test_a_peer_that_breaks_is_a_line(capsys, monkeypatch):
    def prepare(net, x, threads):
        raise RuntimeError("no C++ compiler\nand a long story")

    def call(x):
        raise RuntimeError("out of memory")

    broken = peers.Peer("torch.compile", "numpy", "numpy", prepare)
    failing = peers.Peer("other", "numpy", "numpy", lambda net, x, threads: (call, x))
    monkeypatch.setattr(peers, "PEERS", (broken, failing, peers.PEERS[-1]))
    assert bench("--case", "tutorial", "--rows", "5", "--peers") == 0
    out = capsys.readouterr().out
    assert "tutorial: torch.compile is left out: it failed, RuntimeError: no C++ compiler\n" in out
    assert "tutorial: other is left out: it failed, RuntimeError: out of memory\n" in out


def test_a_peer_that_is_less_exact_is_named_and_no_error(capsys, monkeypatch):
    def prepare(net, x, threads):
        run, _ = peers._naive(net, x, threads)
        return lambda x: run(x) * np.float32(1.01), x

    monkeypatch.setattr(peers, "PEERS", (peers.Peer("loose", "numpy", "numpy", prepare),))
    assert bench("--case", "tutorial", "--rows", "5", "--peers") == 0
    assert "tutorial, 5 rows: loose differs by" in capsys.readouterr().out


# Correctness first


def test_wrong_numbers_are_outside(monkeypatch, capsys):
    run = Compiled.__call__
    monkeypatch.setattr(Compiled, "__call__", lambda self, x: run(self, x) * np.float32(1.001))
    assert bench("--case", "tutorial", "--rows", "40", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert report["cases"][0]["timings"][0]["verdict"] == "OUTSIDE"
    assert bench("--case", "tutorial", "--rows", "40") == 1
    assert "numpy OUTSIDE: " in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [lambda y: y[:-1], lambda y: y.astype("float64"), lambda y: y[0]])
def test_a_result_of_another_kind_is_outside(wrong, monkeypatch, capsys):
    run = Compiled.__call__
    monkeypatch.setattr(Compiled, "__call__", lambda self, x: wrong(run(self, x)))
    assert bench("--case", "tutorial", "--rows", "40") == 1
    assert "numpy OUTSIDE: " in capsys.readouterr().out


def test_a_backend_that_breaks_is_a_failure(monkeypatch, capsys):
    def broken(self, x):
        raise RuntimeError("illegal instruction\nsomewhere")

    monkeypatch.setattr(Compiled, "__call__", broken)
    monkeypatch.setattr(peers, "PEERS", peers.PEERS[-1:])
    assert bench("--case", "tutorial", "--rows", "40", "--peers") == 1
    assert "numpy failed: RuntimeError: illegal instruction\n" in capsys.readouterr().out


def test_an_activation_of_the_callers_own_is_not_checked():
    net = Network([Dense(np.eye(3, dtype="float32"), None, lambda x, /, *, xp: xp.sin(x))])
    note, result = measure.benchmarked(benchmark.own("own", net, rows=[4]), backends="numpy", rounds=1, threads=1)
    assert "nothing is checked" in note
    assert result.timings[0].verdict == "unchecked"


# The arithmetic of ratios


def result(**times):
    """A result whose candidates took these seconds in each round; `fast` and `slow` are peers."""
    others = {name: own for name, own in times.items() if name != "numpy"}
    products = [0.5] * len(times["numpy"])
    timings = tuple(Timing.of(name, own, others, products, 0.5, "inside") for name, own in times.items())
    return Result("digits", 10, "4-2 relu", "float32", 8_000, 3, 1, 1e6, timings)


def test_the_ratio_is_that_of_the_round():
    found = result(numpy=[2.0, 8.0, 4.0], fast=[1.0, 8.0, 2.0], slow=[2.0, 4.0, 4.0])
    own, fast, slow = found.timings
    assert own.ratio == (2.0, 2.0, 2.0)  # of 1, 4 and 2: the fastest of each round, not one peer's median
    assert own.median == 4.0
    assert own.relative == {"fast": 2.0, "slow": 1.0, "GEMM": 8.0}
    assert fast.ratio[1] == 1.0
    assert slow.ratio[1] == 2.0
    assert (own.peer, fast.peer, fast.relative) == (False, True, {})
    assert found.fastest is fast
    assert found.rate(own) == 2_000
    assert found.share(own) == 2_000 / 1e6
    alone = Timing.of("numpy", [1.0, 3.0, 2.0], {}, [1.0] * 3, 0.5, "inside")
    assert (alone.ratio, alone.seconds) == (None, (1.5, 2.0, 2.5))


def test_the_geometric_mean():
    double = result(numpy=[2.0] * 3, fast=[1.0] * 3, slow=[1.5] * 3)
    half = result(numpy=[0.5] * 3, fast=[1.0] * 3, slow=[1.5] * 3)
    assert Report({}, (double, double), ()).geometric_mean == 2
    assert Report({}, (double, half), ()).geometric_mean == 1
    assert Report({}, (), ()).geometric_mean is None


def test_everyone_runs_as_often_in_turn(monkeypatch):
    calls = []

    def counted(name):
        def prepare(net, x, threads):
            run, _ = peers._naive(net, x, threads)
            return lambda x: calls.append(name) or run(x), x

        return peers.Peer(name, "numpy", "numpy", prepare)

    monkeypatch.setattr(peers, "PEERS", (counted("a"), counted("b")))
    monkeypatch.setattr(measure, "_alone", lambda candidate: 1.0)  # long, so that no call goes uncounted
    cases = benchmark.published(["tutorial"], [3])
    (found,) = measure.benchmarked(cases, backends="numpy", compare=True, rounds=4, threads=1)
    assert found.inner == 1
    assert calls == ["a", "b"] * (1 + 4)  # one to check, and the rounds


# Against an earlier run


@pytest.fixture
def earlier(tmp_path, capsys):
    """Writes this run's JSON, changed by a function."""

    def write(change=lambda report: None, *arguments):
        assert bench("--case", "tutorial", "--rows", "30", "--json", *arguments) == 0
        report = json.loads(capsys.readouterr().out)
        change(report)
        (tmp_path / "before.json").write_text(json.dumps(report))
        return tmp_path / "before.json"

    return write


def faster(factor, *names):
    def change(report):
        for timing in report["cases"][0]["timings"]:
            if timing["name"] in names:
                timing["seconds"] = [value / factor for value in timing["seconds"]]
                timing["relative"] = {name: value / factor for name, value in timing["relative"].items()}

    return change


def test_a_regression_is_a_ratio_and_exit_1(earlier, capsys):
    before = earlier(faster(1000, "numpy"))
    assert bench("--against", before) == 1
    out = capsys.readouterr().out
    assert "Against " in out
    assert "SLOWER: tutorial, 30 rows, on numpy: " in out
    assert "GEMM" in out
    assert bench("--against", before, "--limit", 1e9) == 0
    assert "Nothing takes more than 1e+09 of the time it took." in capsys.readouterr().out
    assert bench("--against", before, "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"]
    assert "SLOWER" in err


def test_peers_that_ran_then_run_again_and_are_the_unit(earlier, capsys, monkeypatch):
    monkeypatch.setattr(peers, "PEERS", peers.PEERS[-1:])
    assert bench("--against", earlier(lambda report: None, "--peers"), "--limit", 1e9) == 0
    assert "naive NumPy" in capsys.readouterr().out.partition("Against")[2]


def test_the_unit_is_the_peer_of_then():
    then = result(numpy=[2.0] * 3, fast=[1.0] * 3, slow=[1.5] * 3)
    now = result(numpy=[9.0] * 3, fast=[3.0] * 3, slow=[2.5] * 3)
    report = Report({"threads": 2}, (now,), ())
    (change,) = benchmark.Earlier(None, {}, (then,)).changes(report)
    assert (change.unit, change.then, change.now, change.ratio) == ("fast", 2.0, 3.0, 1.5)
    slower = result(numpy=[20.0] * 3, fast=[10.0] * 3, slow=[15.0] * 3)
    (change,) = benchmark.Earlier(None, {}, (then,)).changes(Report({"threads": 2}, (slower,), ()))
    assert change.ratio == 1  # the machine is, we are not
    alone = result(numpy=[3.0] * 3)
    (change,) = benchmark.Earlier(None, {}, (then,)).changes(Report({"threads": 2}, (alone,), ()))
    assert (change.unit, change.then, change.now) == ("GEMM", 4.0, 6.0)


def test_what_else_differs_is_said(earlier, capsys):
    def change(report):
        report["machine"]["threads"] += 1
        report["machine"]["versions"]["numpy"] = "0.1"
        report["cases"].append(report["cases"][0] | {"case": "jets"})

    before = earlier(change)
    bench("--against", before, "--case", "tutorial", "--rows", "30", "--limit", 1e9)
    out = capsys.readouterr().out
    threads = nnfwd.backend.usable_cores()
    assert f"threads: then {threads + 1}, now {threads}" in out
    assert f"numpy: then 0.1, now {np.__version__}" in out
    assert "not measured again: jets (30 rows)" in out


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--case", "digit"), "unknown case 'digit': did you mean 'digits'?"),
        (("--case", ","), "name at least one case"),
        (("--case", "digits", "--rows", "0"), "0 rows cannot be measured: give positive numbers"),
        (("--case", "digits", "--rounds", "0"), "0 rounds cannot be measured"),
        (("--case", "digits", "--threads", "0"), "0 threads cannot compute"),
        (("--data", "x.npy"), "--data x.npy needs a MODEL to run it"),
        (("{model}", "--case", "digits"), "--case names published networks, and "),
        (("{model}", "--data", "{x}", "--rows", "3"), "--data has rows of its own: leave --rows out"),
        (("{model}", "--rows", "-1"), "-1 rows cannot be measured"),
        (("--against", "{text}"), "is not what `nnfwd bench --json` prints"),
        (("--against", "{list}"), "is not what `nnfwd bench --json` prints"),
        (("--against", "{model}"), "is not what `nnfwd bench --json` prints"),
        (("--against", "nowhere.json"), "No such file"),
        (("--case", "tutorial", "--plot", "{model}"), "no format .npz here: use .png, .svg, .pdf"),
        (("--case", "tutorial", "--plot", "{png}"), "exists: choose another name, or replace it with --force"),
    ],
)
def test_errors(arguments, message, model, tmp_path, capsys):
    files = {name: tmp_path / f"{name}.{end}" for name, end in (("text", "json"), ("list", "json"), ("png", "png"))}
    files["text"].write_text("not JSON")
    files["list"].write_text("[1, 2]")
    files["png"].write_bytes(b"")
    np.save(tmp_path / "x.npy", inputs(3, 4))
    given = [text.format(model=model, x=tmp_path / "x.npy", **files) for text in arguments]
    assert bench(*given) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("nnfwd: ")
    assert err.count("\n") == 1


def test_rows_are_whole_numbers(capsys):
    with pytest.raises(SystemExit):
        bench("--rows", "1,many")
    assert "'1,many' is not a list of whole numbers like 1,10000" in capsys.readouterr().err


def test_backends_that_cannot_be_measured(capsys):
    assert bench("--case", "tutorial", "--rows", "3", backends="nunpy") == 1
    assert "did you mean 'numpy'?" in capsys.readouterr().err
    need("dask")
    assert bench("--case", "tutorial", "--rows", "3", backends="dask") == 1
    assert "dask hands its blocks on to other backends: measure those" in capsys.readouterr().err


def test_another_network_of_the_same_name(earlier, capsys):
    def change(report):
        report["cases"][0]["network"] = "3-4-1 sigmoid, sigmoid"

    assert bench("--against", earlier(change)) == 1
    assert "tutorial was 3-4-1 sigmoid, sigmoid, and is 3-3-1 sigmoid, sigmoid" in capsys.readouterr().err


def test_an_earlier_run_without_these_cases_is_refused_before_anything_runs(earlier, capsys):
    before = earlier()
    assert bench("--against", before, "--case", "block") == 1
    assert "has none of these cases at these rows: nothing can be compared" in capsys.readouterr().err


# The rest


def test_progress_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert bench("--case", "tutorial,jets", "--rows", "3", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"]
    assert "\rcase 2 of 2, jets, 3 rows: round 2 of 2\x1b[K" in err
    assert err.endswith("\r\x1b[K")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot hold a process to some cores")
def test_threads_hold_the_process_to_as_many_cores(monkeypatch, capsys):
    held = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 3, 5})
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: held.append(set(cores)))
    assert bench("--case", "tutorial", "--rows", "3", "--threads", "2", "--json") == 0
    assert held == [{1, 3}, {1, 3, 5}]
    assert json.loads(capsys.readouterr().out)["machine"]["threads"] == 2


def test_everyone_has_the_threads_and_gives_them_back():
    import threadpoolctl

    def blas():
        return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}

    before = blas()
    seen = []
    net = tutorial()[0].to("numpy", dtype="float32")

    def build():
        return net, np.ones((4, 3), "float32")

    def tell(text):
        if text.endswith("round 1 of 1"):
            seen.append(blas())

    assert list(measure.benchmarked([Case("t", 4, build)], backends="numpy", rounds=1, threads=1, tell=tell))
    assert seen == [{1}]
    assert blas() == before


def test_the_picture(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'nnfwd[plot]'")
    from nnfwd.plot.benchmark import benchmark as drawn

    monkeypatch.setattr(peers, "PEERS", peers.PEERS[-1:])
    for arguments in ((), ("--peers",)):
        path = tmp_path / f"bench{len(arguments)}.svg"
        assert bench("--case", "tutorial,jets", "--rows", "3", "--plot", path, *arguments) == 0
        assert path.read_bytes().startswith(b"<?xml")
    found = result(numpy=[50.0] * 3, fast=[1.0] * 3, slow=[1.5] * 3)
    ax = drawn(Report({}, (found, found), ()))
    assert [bar.get_height() for bar in ax.patches] == [4.0, 4.0, 1.0, 1.0, 1.5, 1.5]
    assert [text.get_text() for text in ax.texts] == ["50", "50"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["nnfwd on numpy", "fast", "slow"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["digits\n10"] * 2
