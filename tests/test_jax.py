"""JAX: inside the caller's jit, grad and vmap; placed weights; x64; several devices."""

import gc
import math
import weakref

import numpy as np
import pytest
from networks import ensemble, inputs, mixed, tutorial
from places import need

import nnfwd
from nnfwd import Activation, Network, Scale, activations
from nnfwd.bounds import Bounded, arithmetic_of, error_bound, looped_bound
from nnfwd.errors import DtypeError


@pytest.fixture
def jax():
    return need("jax")


@pytest.fixture(scope="module")
def compilations():
    """A function that says how many programs XLA has compiled since it was last called."""
    seen = []

    def count():
        number = len(seen)
        seen.clear()
        return number

    def listen(event, seconds, **_):
        if event.endswith("/backend_compile_duration"):
            seen.append(event)

    need("jax").monitoring.register_event_duration_secs_listener(listen)
    return count


def inside(y, net, x):
    from nnfwd import backend

    bounded = looped_bound(x, net, arithmetic=arithmetic_of(backend.load("jax"), "float32"))
    return bounded.ratio(np.asarray(y)).max() <= 1


@pytest.mark.parametrize("make", [mixed, ensemble])
def test_jit_and_vmap_agree_with_the_reference(jax, make):
    net, x = make(), inputs(6, 4)
    xj = jax.numpy.asarray(x)
    # The first call of all is under jit: the weights are placed while tracing, and kept.
    assert inside(jax.jit(lambda x: net(x))(xj), net, x)
    assert inside(jax.jit(lambda x: 1 * net(x))(xj), net, x)
    assert inside(net(xj), net, x)
    over_rows = jax.vmap(net)(xj)
    assert inside(over_rows if make is mixed else jax.numpy.moveaxis(over_rows, 0, 1), net, x)


def test_networks_and_activations_are_callables_to_jit(jax):
    """jax.jit keeps a weak reference to what it is given; twice, because the first failure once took the process down."""
    net, x = mixed(), jax.numpy.asarray(inputs(4))
    for function in (net, nnfwd.activations.gelu, net.compile(backend="jax")):
        for _ in range(2):
            assert np.isfinite(jax.jit(function)(x)).all()


def test_first_call_under_grad(jax):
    net, x = mixed(), jax.numpy.asarray(inputs(4))
    first = jax.grad(lambda x: net(x)[0])(x)
    assert np.array_equal(first, jax.grad(lambda x: net(x)[0])(x))
    assert np.isfinite(first).all()
    assert isinstance(net(x), jax.Array)


def test_gradients_over_weights_are_those_of_finite_differences(jax):
    with jax.enable_x64(True):
        net, x = mixed("float64"), jax.numpy.asarray(inputs(3, 4, dtype="float64"))
        placed = net.to("jax")

        def loss(net):
            return (net(x) ** 2).sum()

        direction = jax.tree.map(lambda a: jax.numpy.asarray(np.random.default_rng(3).standard_normal(a.shape)), placed)
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), jax.grad(loss)(placed), direction)))
        # A central difference is off by h^2 f'''/6; halving h quarters that, so Richardson's error estimate bounds it.
        moved = [
            (loss(jax.tree.map(lambda a, d, h=h: a + h * d, placed, direction))
             - loss(jax.tree.map(lambda a, d, h=h: a - h * d, placed, direction))) / (2 * h)
            for h in (2e-3, 1e-3)
        ]  # fmt: skip
        assert abs(slope - moved[1]) <= abs(moved[1] - moved[0])
        by_parameters = jax.grad(lambda p: loss(placed.with_parameters(p)))(placed.parameters)
        by_layers = jax.grad(lambda layers: (nnfwd.feed_forward(x, layers) ** 2).sum())(tuple(placed))
        for a, b, c in zip(
            jax.tree.leaves(jax.grad(loss)(placed)),
            jax.tree.leaves(by_parameters),
            jax.tree.leaves(by_layers),
            strict=True,
        ):
            assert np.array_equal(a, b)
            assert np.array_equal(a, c)


def test_networks_are_pytrees(jax):
    net = mixed().to("jax")
    leaves, structure = jax.tree.flatten(net)
    assert len(leaves) == 2 + 3 + 1 + 2
    again = jax.tree.unflatten(structure, leaves)
    assert again == net
    assert hash(structure) == hash(jax.tree.structure(mixed(seed=9).to("jax")))
    assert structure == jax.tree.structure(mixed(seed=9).to("jax"))
    assert structure != jax.tree.structure(ensemble().to("jax"))
    jax.tree.unflatten(structure, [object()] * len(leaves))  # validates nothing
    traces = []

    @jax.jit
    def run(net, x):
        traces.append(1)
        return net(x)

    x = jax.numpy.asarray(inputs(4))
    run(net, x)
    run(mixed(seed=9).to("jax"), x)
    assert len(traces) == 1, "another network of the same structure must not compile again"


@pytest.mark.parametrize("layers", [mixed(), [Scale(2.0, center=1.0), Activation("elu")]])
def test_compiled_moves_nothing(jax, layers):
    run = Network(layers).compile(backend="jax", dtype="float32")
    x = jax.numpy.asarray(inputs(6, 4))
    run(x)
    with jax.transfer_guard("disallow"):
        run(x)


def test_compiled_passes_weights_as_arguments(jax):
    net, x = mixed(), inputs(6, 4)
    run = net.compile(backend="jax", dtype="float32")
    assert inside(run(x), net, x)
    assert inside(run(jax.numpy.asarray(x)), net, x)
    [call] = [step for step in jax.make_jaxpr(run._run)(jax.numpy.asarray(x)).eqns if "jaxpr" in step.params]
    scalars = jax.tree.leaves([layer.scalars for layer in net])  # as arguments too: XLA merges constants
    assert len(call.invars) == 1 + len(jax.tree.leaves(net.to("jax"))) + len(scalars) == 1 + 8 + 1
    assert not call.params["jaxpr"].consts


@pytest.mark.parametrize(
    ("layers", "x", "dtype"),
    [
        ([Scale(300.0), Scale(300.0)], 1e-3, "float16"),
        ([Scale(1e-4), Scale(1e-4)], 6e4, "float16"),
        ([Scale(1e30), Scale(1e30)], 1e-30, "float32"),
        ([Scale(1e-30), Activation(activations.hard_sigmoid(alpha=1e-20, beta=0.0))], 1e30, "float32"),
        ([Scale(1e30), Activation(activations.leaky_relu(negative_slope=1e20))], -1e-30, "float32"),
        ([Scale(np.linspace(-1.3, 1.1, 8)), Activation("softmax")], 1e9, "float32"),
        ([Scale(np.linspace(-1.3, 1.1, 8)), Activation("log_softmax")], 1e4, "float32"),
        ([Activation(activations.celu(alpha=9e37))], -1e37, "float32"),
        ([Activation(activations.celu(alpha=1e-5))], 0.0, "float16"),
    ],
)
def test_what_xla_rewrites_stays_inside(jax, layers, x, dtype):
    """It merges constant factors, contracts a product into a softmax's shift, and multiplies with reciprocals."""
    net = Network(layers)
    x = jax.numpy.asarray(x * np.random.default_rng(0).uniform(0.9, 1, (64, 8)), dtype)
    bounded = error_bound(net, x)
    for y in (net(x), net.compile(backend="jax", dtype=dtype)(x)):
        assert (bounded.ratio(y) <= 1).all()


def test_precision_is_explicit_in_the_program(jax):
    net = tutorial()[0].to("jax", dtype="float32")
    x = jax.numpy.ones((2, 3))
    for precision, name in (("highest", "HIGHEST"), ("high", "HIGH"), ("medium", "DEFAULT")):
        text = jax.jit(lambda x, p=precision: net(x, precision=p)).lower(x).as_text()
        assert f"precision = [{name}, {name}]" in text or (name == "DEFAULT" and "HIGH" not in text), text


def test_float64_only_with_x64(jax):
    net, x = tutorial()
    with pytest.raises(DtypeError, match='dtype="float32".*jax_enable_x64'):
        net(np.array(x), backend="jax")
    assert net(x, backend="jax").dtype == "float32"
    with jax.enable_x64(True):
        assert net(np.array(x), backend="jax").dtype == "float64"


def test_a_tree_of_anything_has_the_networks_structure(jax):
    """Leaves may be mapped to numbers, None or shapes: the structure does not depend on what they are."""
    net = mixed().to("jax")
    norms = jax.tree.map(lambda a: float((a**2).sum()), net)
    assert len(jax.tree.leaves(norms)) == len(jax.tree.leaves(net))
    assert jax.tree.structure(norms) == jax.tree.structure(net)
    scaled = jax.tree.map(lambda a, s: a * s, net, jax.tree.map(lambda a: 0.5, net))
    assert np.array_equal(scaled[1].weight, net[1].weight * 0.5)
    assert "Dense" in repr(jax.tree.map(lambda a: None, net)) + repr(jax.tree.map(lambda a: a.shape, net))
    stacked = jax.tree.map(lambda *a: jax.numpy.stack(a), net, mixed(seed=5).to("jax"))
    x = jax.numpy.asarray(inputs(3, 4))
    both = jax.vmap(lambda net: net(x))(stacked)
    assert inside(both[0], mixed(), inputs(3, 4))
    assert inside(both[1], mixed(seed=5), inputs(3, 4))


def test_a_trace_can_be_returned_from_jit(jax):
    net, x = mixed(), jax.numpy.asarray(inputs(3, 4))
    t = jax.jit(lambda x: nnfwd.trace(net, x))(x)
    assert inside(t.y, net, inputs(3, 4))
    assert len(t.z) == 4


def small(activation="tanh", seed=0, hidden=3):
    """A 4-hidden-2 network, quickly compiled."""
    rng = np.random.default_rng(seed)
    return Network.from_arrays(
        [rng.standard_normal((hidden, 4)).astype("float32"), rng.standard_normal((2, hidden)).astype("float32")],
        [rng.standard_normal(hidden).astype("float32"), None],
        [activation, "softmax"],
    )


def test_a_shape_that_was_seen_is_not_compiled_again(jax, compilations):
    small(hidden=4).compile(backend="jax")(jax.device_put(inputs(2, 4)))  # JAX traces functions of its own once
    run = small(hidden=5).compile(backend="jax")
    batches = [jax.device_put(inputs(*lead, 4)) for lead in ((), (7,), (3, 2), (0,))]
    compilations()
    for x in batches:
        run(x)
        assert compilations() == 1
    for x in batches:
        run(x)
    assert compilations() == 0


def test_ever_other_numbers_of_rows_do_not_compile_for_ever(jax, compilations):
    import nnfwd_jax

    net, most = small(), 2000
    x = inputs(most, 4)
    bounded = error_bound(net, jax.device_put(x))
    run = net.compile(backend="jax")
    sizes = np.random.default_rng(5).integers(0, most + 1, 200)
    compilations()
    for again in (False, True):
        for n in sizes:
            y = np.asarray(run(jax.device_put(x[:n])))
            assert (Bounded(bounded.exact[:n], bounded.error[:n]).ratio(y) <= 1).all()
        compiled = compilations()
        assert compiled == 0 if again else len(set(sizes)) > compiled <= nnfwd_jax.EXACT + 4 * math.log2(most)


@pytest.mark.parametrize("make", [mixed, ensemble])
def test_rows_in_pieces_are_what_they_were(jax, make, monkeypatch):
    """Of any leading axes, filled up or not, committed or not; and under the caller's jit and grad it is his program."""
    monkeypatch.setattr("nnfwd_jax.EXACT", 0)
    net = make()
    run = net.compile(backend="jax", dtype="float32")
    for lead in ((), (1,), (16,), (21,), (0,), (0, 3), (5, 1, 4), (1100,)):
        x = jax.device_put(inputs(*lead, 4))
        y = run(x)
        assert y.shape == net(x).shape
        assert y.committed == x.committed
        bounded = error_bound(net, x)
        assert (bounded.ratio(y) <= 1).all()
    on_device = jax.device_put(inputs(21, 4), jax.devices()[0])
    assert on_device.committed
    assert run(on_device).committed
    x = jax.device_put(inputs(23, 4))
    assert (error_bound(net, x).ratio(jax.jit(run)(x)) <= 1).all()
    assert jax.grad(lambda x: run(x).sum())(x).shape == x.shape
    with jax.debug_nans(True), jax.transfer_guard("disallow"):
        run(x)


def mixes_rows(x, /, *, xp):
    return x - xp.mean(x, axis=0, keepdims=True)


def test_callables_of_the_callers_are_not_cut_in_rows_nor_shared(jax, monkeypatch, compilations):
    monkeypatch.setattr("nnfwd_jax.EXACT", 0)
    net, x = small(mixes_rows), jax.device_put(inputs(21, 4))
    for _ in range(2):
        run = net.compile(backend="jax")
        compilations()
        y = run(x)
        assert compilations() == 1
        run(x)
        assert compilations() == 0
    assert np.array_equal(y, jax.jit(lambda x: net(x))(x))


def test_an_activation_without_a_hash_is_compiled(jax):
    class Twice:
        __hash__ = None

        def __call__(self, x, /, *, xp):
            return 2 * x

    x = jax.device_put(inputs(3, 4))
    assert np.array_equal(
        small(Twice()).compile(backend="jax")(x), small(lambda x, /, *, xp: 2 * x).compile(backend="jax")(x)
    )


def test_networks_of_one_structure_share_what_was_compiled(jax, compilations):
    x = jax.device_put(inputs(6, 4))
    nets = [mixed(seed=seed) for seed in range(3)]
    runs = [net.compile(backend="jax") for net in nets]
    runs[0](x)
    compilations()
    for net, run in zip(nets, runs, strict=True):
        assert inside(run(x), net, np.asarray(x))
    assert compilations() == 0
    others = [small(), small("relu"), small(hidden=4), Network([*small(), Scale(2.0)]), Network([*small(), Scale(3.0)])]
    for other in others:
        assert inside(other.compile(backend="jax")(x), other, np.asarray(x))


def test_precisions_are_not_shared(jax):
    net, x = small(), jax.numpy.ones((2, 4))
    runs = [net.compile(backend="jax", precision=precision) for precision in ("highest", "high", "medium")]
    assert len({str(jax.make_jaxpr(run)(x)) for run in runs}) == 3


def test_what_was_compiled_goes_with_the_last_network(jax):
    import nnfwd_jax

    def programs():
        gc.collect()
        return len(jax.devices()[0].client.live_executables()), len(nnfwd_jax._programs)

    x = jax.device_put(inputs(6, 4))
    small("elu", hidden=6).compile(backend="jax")  # JAX keeps what places weights of these shapes
    before, with_one = programs(), tuple(n + 1 for n in programs())
    first, second = (small("elu", seed=seed, hidden=6).compile(backend="jax") for seed in range(2))
    first(x)
    second(x)
    assert programs() == with_one
    weight = weakref.ref(first._anchor)
    assert isinstance(weight(), jax.Array)
    del first
    gc.collect()
    assert weight() is None
    second(x)
    assert programs() == with_one
    del second
    assert programs() == before
