"""JAX over eight devices, virtual ones of a CPU. They must be asked for before JAX starts: the tests run in a process
of their own, all in one, which this file is run in by pytest once more."""

import functools
import inspect
import os
import pickle
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from networks import ensemble, inputs
from places import need

from nnfwd import Activation, Dense, Network, Scale, activations, backend, error_bound
from nnfwd.cases import POOL, REGIMES, Case
from nnfwd.errors import DeviceError
from nnfwd.layers import leaves

jax = need("jax")
from jax.sharding import AxisType, Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

FLAG = "--xla_force_host_platform_device_count=8"
HERE = FLAG in os.environ.get("XLA_FLAGS", "")
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of every test in the process of eight devices: None, or the traceback."""
    report = tmp_path_factory.mktemp("devices") / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", __file__],
        env={**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert report.exists(), done.stdout + done.stderr
    cases = xml.etree.ElementTree.parse(report).iter("testcase")
    return {case.get("name"): next((part.text for part in case), None) for case in cases}


def eight(test):
    """The test here, where there are eight devices; else one that says what became of it there."""
    if HERE:
        return test

    @functools.wraps(test)
    def there(outcomes, request, **_):
        assert outcomes.get(request.node.name, "it was not run") is None, outcomes[request.node.name]

    asked = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("outcomes", "request")]
    signature = inspect.signature(test)
    there.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *asked])
    return there


def mesh(*shape, devices=None, kind="auto"):
    axes = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[kind]
    devices = np.array(jax.devices() if devices is None else devices).reshape(shape)
    return Mesh(devices, ("rows", "columns")[: len(shape)], axis_types=(axes,) * len(shape))


def put(a, where, *spec):
    return jax.device_put(a, NamedSharding(where, P(*spec)))


def inside(net, x, *ys):
    """Whether results for x, an array on the host, are inside the bound of JAX."""
    bounded = error_bound(net, jax.numpy.asarray(x))
    return all((bounded.ratio(np.asarray(y)) <= 1).all() for y in ys)


def stands(y, where, *spec):
    return y.sharding.is_equivalent_to(NamedSharding(where, P(*spec)), y.ndim)


def wide(dtype="float32"):
    """A 4-8-8-2 network: a pair, with all that may stand between the two, and a layer that is in no pair."""
    rng = np.random.default_rng(4)

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    return Network(
        [
            Dense(draw(8, 4), draw(8), activations.prelu(negative_slope=draw(8))),
            Scale(draw(8), center=draw(8), shift=0.5),
            Activation("tanh"),
            Dense(draw(8, 8), draw(8), "softmax"),
            Dense(draw(2, 8), draw(2)),
        ]
    )


def narrow(dtype="float32"):
    """A 4-5-2 network of few operations, each of which JAX compiles for each mesh when a network is only called."""
    rng = np.random.default_rng(6)
    weights = rng.standard_normal((5, 4)).astype(dtype), rng.standard_normal((2, 5)).astype(dtype)
    slopes = rng.standard_normal(5).astype(dtype)
    prelu = activations.prelu(negative_slope=slopes)
    return Network([Dense(weights[0], slopes, prelu), Dense(weights[1])])


@pytest.fixture
def programs(monkeypatch):
    """The text of every program that `net.compile` makes, and jits of this module, by XLA."""
    texts = []
    plain = jax.jit

    def jit(function):
        jitted = plain(function)

        def call(*arguments):
            texts.append(jitted.lower(*arguments).compile().as_text())
            return jitted(*arguments)

        return call

    monkeypatch.setattr(jax, "jit", jit)
    return texts


def collectives(text):
    """How often each kind is started in a program."""
    return {name: n for name in COLLECTIVES if (n := len(re.findall(rf" {name}(?:-start)?\(", text)))}


kinds = pytest.mark.parametrize("kind", ["auto", "explicit"])


@eight
def test_there_are_eight():
    assert len(jax.devices()) == 8


@eight
@pytest.mark.parametrize(("dtype", "kind"), [("float32", "auto"), ("float32", "explicit"), ("float64", "auto")])
@pytest.mark.parametrize("make", [narrow, ensemble])
def test_the_rows_of_x_stay_where_they_are(make, dtype, kind):
    every = mesh(8, kind=kind)
    with jax.enable_x64(dtype == "float64"):
        net = make(dtype)
        for shape, spec in (((16, 4), ("rows",)), ((8, 3, 4), ("rows",)), ((4,), ())):
            x = inputs(*shape, dtype=dtype)
            there = put(x, every, *spec)
            ys = net(there), jax.jit(lambda x: net(x))(there)
            assert inside(net, x, *ys)
            members = (None,) * (ys[0].ndim - x.ndim)
            for y in ys:
                assert y.dtype == dtype
                assert stands(y, every, *members, *spec)


@eight
@kinds
def test_host_weights_are_placed_once_for_each_mesh(kind, monkeypatch):
    import nnfwd_jax

    placed = []
    place = nnfwd_jax.place

    def counted(a, /, **where):
        placed.append(a)
        return place(a, **where)

    monkeypatch.setattr(nnfwd_jax, "place", counted)
    net, x = Network([dense(5, 4, "identity"), dense(2, 5, "relu")]), inputs(8, 4)
    arrays = len(jax.tree.leaves(net.to("jax")))
    bounded = error_bound(net, jax.numpy.asarray(x))
    jax.jit(lambda x: net(x))(put(x, mesh(8, kind=kind), "rows"))  # placed on no device, and not to be found again
    half = [mesh(4, devices=jax.devices()[part], kind=kind) for part in (slice(0, 4), slice(4, 8))]
    for where in (*half, mesh(4, 2, kind=kind)):
        placed.clear()
        for spec in (("rows",), ()):
            y = net(put(x, where, *spec))
            assert bounded.ratio(np.asarray(y)).max() <= 1
            assert stands(y, where, *spec)
        assert len(placed) == arrays
        for a in jax.tree.leaves(net.chain.placed["jax", where, "float32"]):
            assert a.sharding == NamedSharding(where, P())
    placed.clear()
    net(put(x, half[0], "rows"))
    assert not placed


def divided(net, where):
    """The network with the first pair of Dense layers divided, as its owner would."""
    axes = [{"weight": ("columns", None), "bias": ("columns",), "activation": {"negative_slope": ("columns",)}}]
    axes += [{"scale": ("columns",), "center": ("columns",)}, {}, {"weight": (None, "columns"), "bias": ()}]
    axes += [{"weight": (), "bias": ()}]
    return net.with_parameters(
        jax.tree.map(lambda spec, a: put(a, where, *spec), axes, net.parameters, is_leaf=lambda a: isinstance(a, tuple))
    )


@eight
@kinds
def test_weights_stay_divided(kind, programs):
    net, x, where = wide(), inputs(16, 4), mesh(4, 2, kind=kind)
    placed, there = divided(net, where), put(x, where, "rows")
    ys = placed(there), jax.jit(lambda net, x: net(x))(placed, there), placed.compile()(there)
    assert inside(net, x, *ys)
    assert all(stands(y, where, "rows") for y in ys)
    assert [collectives(text) for text in programs] == [{"all-reduce": 1}] * 2
    assert inside(net, x, placed(jax.numpy.asarray(x)), placed(x, backend="jax"), placed.compile(backend="jax")(x))


@eight
@kinds
def test_a_mesh_of_one_device_and_one_of_three_axes(kind):
    net, x = Network([dense(5, 4), dense(2, 5)]), inputs(8, 4)
    one = mesh(1, devices=jax.devices()[:1], kind=kind)
    cube = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("a", "b", "c"), axis_types=(one.axis_types * 3))
    for there in (put(x, one, "rows"), jax.device_put(x, jax.devices()[0]), put(x, cube, ("a", "c"))):
        y = net(there)
        assert inside(net, x, y)
        assert y.sharding.is_equivalent_to(there.sharding, 2)


@eight
def test_two_sets_of_devices_are_refused_and_named():
    net, halves = wide(), [mesh(4, devices=jax.devices()[part]) for part in (slice(0, 4), slice(4, 8))]
    first, second = "cpu:0, cpu:1, cpu:2, cpu:3", "cpu:4, cpu:5, cpu:6, cpu:7"
    x = inputs(8, 4)
    spread = net.to("jax", device=halves[0])
    alone = net.to("jax", device="cpu:5")
    compiled = net.compile(backend="jax")
    for run, there, names in (
        (spread, put(x, halves[1], "rows"), (first, second)),
        (spread, jax.device_put(x, jax.devices()[6]), (first, "cpu:6")),
        (spread.compile(), put(x, halves[1], "rows"), (first, second)),
        (alone, put(x, halves[0], "rows"), ("cpu:5", first)),
        (compiled, put(x, halves[1], "rows"), ("cpu:0", second)),
    ):
        with pytest.raises(DeviceError, match=f"the weights are on {names[0]} and x is on {names[1]}: put both"):
            run(there)


SHAPES = ((24, 4), (13, 4), (0, 4), (4,), (5, 3, 4))


@eight
@pytest.mark.parametrize(
    ("make", "device"),
    [
        (wide, lambda: ["cpu:1", "cpu:6"]),
        (ensemble, lambda: tuple(jax.devices()[3:6])),
        (wide, lambda: mesh(4, 2)),
        (ensemble, lambda: mesh(4, 2, kind="explicit")),
        (lambda: Network([Activation("tanh")]), lambda: mesh(2, 4)),
    ],
    ids=["names", "devices", "mesh", "explicit", "without weights"],
)
def test_compiled_over_several_devices(make, device):
    net, where = make(), device()
    run = net.compile(backend="jax", device=where)
    several = where.devices if isinstance(where, Mesh) else np.array([jax.devices()[int(str(d)[-1])] for d in where])
    count = len(several)
    for shape in SHAPES:
        x = inputs(*shape)
        for given in (x, x.tolist(), jax.device_put(x, jax.devices()[2])) if x.size else (x,):
            y = run(given)
            assert inside(net, x, y)
            assert y.shape == net(x).shape
            assert y.sharding.device_set == set(several.flat)
            rows = y.shape[-x.ndim]
            divides = x.ndim > 1 and rows % count == 0
            assert {shard.data.shape[-x.ndim] for shard in y.addressable_shards} == {rows // count if divides else rows}


@eight
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("signature", range(0, len(POOL), 3))
def test_random_networks_over_a_mesh(signature, dtype):
    case = Case(POOL[signature], dtype, REGIMES[signature // 3 % len(REGIMES)], "none", seed=signature)
    with jax.enable_x64(dtype == "float64"):
        y = case.network.compile(backend="jax", device=mesh(4, 2), dtype=dtype)(case.x)
        assert y.dtype == dtype
        assert inside(case.network, case.x, y)


@eight
def test_only_a_sum_over_divided_weights_is_collective(programs):
    net, x = wide(), inputs(16, 4)
    net.compile(backend="jax", device=jax.devices())(x)
    net.compile(backend="jax", device=mesh(8))(x)
    placed = put(x, mesh(8), "rows")
    jax.jit(lambda x: net(x))(placed)
    net.compile(backend="jax", device=mesh(8, 1))(x)
    assert [collectives(text) for text in programs] == [{}] * 4
    programs.clear()
    two = Network([*net, Dense(inputs(8, 2), None, "tanh"), Dense(inputs(4, 8), inputs(4))])
    for kind in ("auto", "explicit"):
        net.compile(backend="jax", device=mesh(4, 2, kind=kind))(x)
        two.compile(backend="jax", device=mesh(2, 4, kind=kind))(x)
    assert [collectives(text) for text in programs] == [{"all-reduce": 1}, {"all-reduce": 2}] * 2


def mean(x, /, *, xp):
    return x - xp.mean(x, axis=0, keepdims=True)


def dense(out, width, activation="tanh", members=None):
    shape = (out, width) if members is None else (members, out, width)
    return Dense(inputs(*shape), inputs(*shape[:-1], seed=3), activation)


OUT, IN, WHOLE = [-2, -1], [-1, None], [None, None]  # of a weight and its bias


@eight
@pytest.mark.parametrize(
    ("layers", "parts", "expected"),
    [
        (list(wide()), 2, [[*OUT, -1], [-1, -1], [], IN, WHOLE]),
        (list(wide()), 3, [[*WHOLE, None], WHOLE, [], WHOLE, WHOLE]),
        (list(wide()), 1, [[*WHOLE, None], WHOLE, [], WHOLE, WHOLE]),
        ([dense(6, 4), dense(6, 6), dense(6, 6), dense(5, 6)], 2, [OUT, IN, OUT, IN]),
        ([dense(5, 4), dense(6, 5), dense(6, 6), dense(5, 6)], 2, [WHOLE, OUT, IN, WHOLE]),
        ([dense(6, 4, "softmax"), dense(6, 6), dense(6, 6)], 2, [WHOLE, OUT, IN]),
        ([dense(6, 4), Activation("log_softmax"), dense(6, 6)], 2, [WHOLE, [], WHOLE]),
        ([dense(6, 4, mean), dense(6, 6), dense(6, 6)], 2, [WHOLE, OUT, IN]),
        ([dense(6, 4), dense(6, 6, "softmax"), dense(6, 6)], 2, [OUT, IN, WHOLE]),
        ([dense(6, 4, members=3), dense(6, 6, members=3)], 2, [OUT, IN]),
        ([dense(6, 4), dense(6, 6, members=3)], 2, [OUT, IN]),
    ],
)
def test_which_weights_are_divided(layers, parts, expected):
    """The first of a pair by its outputs, with all between the two; the second by its inputs, but not its bias."""
    import nnfwd_jax

    where = mesh(2, parts, devices=jax.devices()[: 2 * parts])
    placed = Network(layers).chain.spread(backend.load("jax"), "float32", nnfwd_jax.spread(where))
    found = []
    for layer in placed:
        arrays = leaves(layer.parameters)
        assert all({name for name in a.sharding.spec if name} <= {"columns"} for a in arrays)
        axes = [[i for i, name in enumerate(a.sharding.spec) if name] for a in arrays]
        found.append([axis[0] - a.ndim if axis else None for a, axis in zip(arrays, axes, strict=True)])
    assert found == expected


@eight
@kinds
def test_x_on_these_devices_stays_as_it_is(kind):
    net, where = wide(), mesh(4, 2, kind=kind)
    run = net.compile(backend="jax", device=where)
    for shape, spec in (((16, 4), ("rows",)), ((16, 4), ()), ((4,), ())):
        x = inputs(*shape)
        y = run(put(x, where, *spec))
        assert inside(net, x, y)
        assert stands(y, where, *spec)
    other, x = mesh(8, kind=kind), inputs(8, 4)
    y = run(put(x, other, "rows"))
    assert inside(net, x, y)
    assert y.sharding.device_set == set(jax.devices())


@eight
def test_each_device_is_given_its_rows_of_an_array_on_the_host(monkeypatch):
    run, x = wide().compile(backend="jax", device=mesh(4, 2)), inputs(13, 4)
    given = []
    device_put = jax.device_put

    def put(a, where=None):
        if isinstance(a, np.ndarray):
            given.append((a.shape, where))
        return device_put(a, where)

    monkeypatch.setattr(jax, "device_put", put)
    run(x)
    assert given == [((16, 4), NamedSharding(mesh(4, 2), P("rows")))]


@eight
def test_an_array_on_the_host_may_be_changed_once_it_was_placed():
    x, place = inputs(1 << 12, 64), backend.load("jax").place
    for device in (None, "cpu:3", jax.devices(), NamedSharding(mesh(8), P("rows"))):
        given = x.copy()
        placed = place(given, dtype="float32", device=device)
        given[:] = np.nan
        assert np.array_equal(placed, x)


@eight
def test_a_callable_that_may_mix_rows_is_given_all_of_them():
    net, x = Network([dense(6, 4, mean), dense(2, 6)]), inputs(13, 4)
    run = net.compile(backend="jax", device=jax.devices())
    assert np.array_equal(run(x), net.compile(backend="jax")(x))
    assert run(inputs(16, 4)).sharding.spec == P("rows")


@eight
def test_rows_over_several_devices_are_never_taken_in_pieces(monkeypatch):
    """Nor are their numbers counted for what is compiled for one device."""
    import nnfwd_jax

    taken = []
    in_pieces = nnfwd_jax._in_pieces

    def pieces(run, x):
        taken.append(x.shape)
        return in_pieces(run, x)

    monkeypatch.setattr(nnfwd_jax, "EXACT", 1)
    monkeypatch.setattr(nnfwd_jax, "_in_pieces", pieces)
    net, x = wide(), {rows: inputs(rows, 4) for rows in (2, 4, 6, 8)}
    over = net.compile(backend="jax", device=["cpu:1", "cpu:2"])
    placed = divided(net, mesh(4, 2)).compile(backend="jax")
    for rows in (2, 4):
        assert inside(net, x[rows], over(x[rows]), placed(x[rows]))
    alone = net.compile(backend="jax", device="cpu:1")
    assert inside(net, x[6], alone(x[6]))
    assert not taken
    assert inside(net, x[8], alone(x[8]))
    assert taken == [(8, 4)]


@eight
def test_the_callers_jit_over_what_was_compiled():
    net, x, where = wide(), inputs(16, 4), mesh(4, 2)
    run = net.compile(backend="jax", device=where)
    y = jax.jit(run)(put(x, where, "rows"))
    assert inside(net, x, y)
    assert stands(y, where, "rows")
    assert jax.grad(lambda x: run(x).sum())(put(x, where, "rows")).shape == x.shape


@eight
def test_devices_that_are_not_there():
    for device, message in (
        (["cpu:0", "cpu:8"], "jax has no device 'cpu:8' here: there is cpu:0, cpu:1"),
        (["cpu:0", "cpu:0"], "each once"),
        ([], "one or more devices"),
        ([7], "jax cannot place float32 on device"),
        (Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("a", "b", "c")), "a mesh of 3 axes"),
    ):
        with pytest.raises(DeviceError, match=re.escape(message)):
            wide().compile(backend="jax", device=device)


@eight
def test_what_is_compiled_over_named_devices_can_be_pickled():
    x = inputs(6, 4)
    run = wide().compile(backend="jax", device=["cpu:2", "cpu:5"])
    again = pickle.loads(pickle.dumps(run))
    y = again(x)
    assert np.array_equal(y, run(x))
    assert y.sharding == run(x).sharding
    for device in (jax.devices()[1], jax.devices(), mesh(4, 2)):
        with pytest.raises(TypeError, match="cannot pickle"):  # JAX's own: such a one is to be named
            pickle.dumps(wide().compile(backend="jax", device=device))
