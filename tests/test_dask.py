"""Dask: one lazy map_blocks, nothing computed until asked, metadata known before. On workers: test_cluster.py."""

import pickle

import numpy as np
import pytest
from networks import ensemble, inputs, mixed
from places import need

import nnfwd
from nnfwd import Dense, Network
from nnfwd.benchmark.cases import PUBLISHED
from nnfwd.bounds import arithmetic_of, error_bound, looped_bound
from nnfwd.errors import ArrayError, ShapeError


@pytest.fixture
def da():
    need("dask")
    import dask.array

    return dask.array


def refuse(*arguments, **options):
    raise AssertionError("a Dask graph was computed")


def test_lazy_and_one_layer_of_tasks(da):
    import dask

    net, x = mixed(), inputs(20, 4)
    with dask.config.set(scheduler=refuse):
        source = da.from_array(x, chunks=(6, 4))
        y = net(source)
        assert isinstance(y, da.Array)
        assert (y.shape, y.dtype, y.chunks) == ((20, 2), np.dtype("float32"), ((6, 6, 6, 2), (2,)))
        assert isinstance(y._meta, np.ndarray)
        assert len(dict(y.dask)) == len(dict(source.dask)) + 4 + 1  # a task a chunk, and the network
        assert net(source.astype("int8")).dtype == "float32"
    bounded = looped_bound(x, net, arithmetic=arithmetic_of(nnfwd.backend.load("dask"), "float32"))
    assert bounded.ratio(y.compute(scheduler="synchronous")).max() <= 1


@pytest.mark.parametrize("shape", [(4,), (7, 4), (2, 3, 4)])
def test_ensembles_and_leading_axes(da, shape):
    net, x = ensemble(), inputs(*shape)
    y = net(da.from_array(x, chunks=(*(2,) * (len(shape) - 1), 4)))
    assert y.shape == (3, *shape[:-1], 2)
    bounded = looped_bound(x, net, arithmetic=arithmetic_of(nnfwd.backend.load("dask"), "float32"))
    computed = y.compute(scheduler="synchronous")
    assert computed.shape == y.shape
    assert bounded.ratio(computed).max() <= 1


def test_unknown_row_chunks(da):
    net, x = mixed(), inputs(20, 4)
    rows = da.from_array(x, chunks=(6, 4))
    some = rows[rows[:, 0] > 0]
    y = net(some)
    assert np.isnan(y.shape[0])
    assert y.compute(scheduler="synchronous").shape == (int((x[:, 0] > 0).sum()), 2)


def test_several_feature_chunks_are_refused(da):
    with pytest.raises(ShapeError, match=r"2 chunks.*x\.rechunk"):
        mixed()(da.ones((4, 4), chunks=(4, 2)))


def test_weights_of_another_library_are_refused_before_computing(da):
    need("jax")
    with pytest.raises(ArrayError, match=r"jax.*numpy"):
        mixed().to("jax")(da.ones((4, 4), dtype="float32", chunks=(2, 4)))


def test_trace_is_lazy_too(da):
    net, x = mixed(), inputs(6, 4)
    t = nnfwd.trace(net, da.from_array(x, chunks=(2, 4)))
    assert all(isinstance(h, da.Array) for h in t.h)
    assert t.y.compute(scheduler="synchronous").shape == (6, 2)


def test_chunks_of_another_library_are_run_by_it(da):
    need("jax")
    place = nnfwd.backend.load("jax")
    block = place.place(inputs(6, 4), dtype="float32")
    x = da.from_array(inputs(6, 4), chunks=(3, 4)).map_blocks(
        lambda b: place.place(b, dtype="float32"), meta=block[:0], dtype="float32"
    )
    y = mixed()(x)
    assert nnfwd.backend.of(y._meta) is place
    assert nnfwd.backend.of(y.blocks[0].compute(scheduler="synchronous")) is place
    moved = mixed().to("jax")(x)
    assert moved.shape == (6, 2)


def test_the_bound_is_that_of_the_chunks(da):
    jax = need("jax")
    net = Network([Dense(np.full((1, 1), value, "float32")) for value in (1e-20, 1e20)])
    x = da.from_array(jax.numpy.full((1, 1), 1e-20, "float32"), asarray=False)
    y = net(x).compute()
    assert float(y[0, 0]) == 0  # JAX flushes subnormal numbers
    assert error_bound(net, x).ratio(y).max() <= 1 < error_bound(net, np.asarray(x.compute())).ratio(y).max()


def test_dask_can_name_a_network(da):
    x = da.from_array(inputs(6, 4), chunks=(3, 4))
    y = da.apply_gufunc(mixed(), "(i)->(j)", x, output_sizes={"j": 2}, output_dtypes="float32", vectorize=False)
    assert y.compute(scheduler="synchronous").shape == (6, 2)


def read(da, x):
    import dask

    return da.from_delayed(dask.delayed(np.array)(x), x.shape, x.dtype).rechunk((5, 64))


def picked(da, x):
    rows = da.from_array(x, chunks=(6, 64))
    return rows[rows[:, 0] > 0]


SOURCES = {
    "array": lambda da, x: da.from_array(x, chunks=(6, 64)),
    "one chunk": lambda da, x: da.from_array(x, chunks=(20, 64)),
    "made": lambda da, x: da.ones((20, 64), chunks=(6, 64), dtype="float32") * 2,
    "sliced": lambda da, x: da.from_array(x, chunks=(6, 64))[2:],
    "unknown rows": picked,
    "rechunked": lambda da, x: da.from_array(x, chunks=(6, 64)).rechunk((5, 64)),
    "read": read,
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_network_is_one_key_that_every_chunk_depends_on(da, source):
    """Also after Dask's optimization, which fuses and inlines: no other task carries the weights."""
    import cloudpickle
    import dask
    from dask.core import get_deps

    net = Network.from_arrays([np.ones((64, 64), "float32")] * 4, None, "tanh")
    x = SOURCES[source](da, inputs(20, 64))
    (y,) = dask.optimize(net(x))
    graph = dict(y.__dask_graph__())
    sizes = {key: len(cloudpickle.dumps(task)) for key, task in graph.items()}
    (network,) = [key for key in graph if str(key).startswith("network-")]
    assert sizes.pop(network) >= 4 * 64 * 64 * 4
    data = 20 * 64 * 4  # x itself may be in the graph
    assert max(sizes.values()) < data + 4_000
    _, dependents = get_deps(graph)
    assert len(dependents[network]) == x.npartitions


@pytest.mark.parametrize("make", [mixed, lambda: PUBLISHED["jets"].build(1)[0]])
def test_equal_networks_have_equal_names(da, make, tmp_path):
    net = make()
    x = da.from_array(inputs(6, net.in_features), chunks=(3, -1))
    nnfwd.save(net, tmp_path / "net.npz")
    equal = [make(), pickle.loads(pickle.dumps(net)), nnfwd.load(tmp_path / "net.npz"), Network(list(net))]
    net(inputs(3, net.in_features, dtype="float64"))  # what it keeps has no part in it
    assert {n(x).name for n in equal} == {net(x).name}


def test_other_networks_have_other_names(da):
    net, x = mixed(), da.from_array(inputs(6, 4), chunks=(3, 4))

    def nudged(i, parameters):
        """The network with the last number of one of its arrays next to what it was."""
        changed = [dict(layer) for layer in net.parameters]
        layer = changed[i]
        for name in parameters[:-1]:
            layer[name] = dict(layer[name])
            layer = layer[name]
        array = np.array(layer[parameters[-1]])
        array.flat[-1] = np.nextafter(array.flat[-1], np.inf, dtype=array.dtype)
        layer[parameters[-1]] = array
        return net.with_parameters(changed)

    def paths(parameters):
        for name, value in parameters.items():
            yield from ((name, *rest) for rest in paths(value)) if isinstance(value, dict) else [(name,)]

    others = [nudged(i, path) for i, layer in enumerate(net.parameters) for path in paths(layer)]
    others += [net[:2], net[:3], Network([*net, nnfwd.Activation("relu")]), Network([*net, nnfwd.Activation("tanh")])]
    others += [Network([*net, nnfwd.Activation(nnfwd.activations.elu(alpha=a))]) for a in (0.25, 0.5)]
    others += [Network([*net, nnfwd.Activation(f)]) for f in (lambda x, /, *, xp: x + 1, lambda x, /, *, xp: x + 2)]
    names = {n(x).name for n in (net, *others)} | {net(x, precision="high").name}
    assert len(names) == len(others) + 2


def test_placed_copies_do_not_travel(da):
    net = mixed()
    before = len(pickle.dumps(net.chain))
    net(inputs(3, 4, dtype="float64"))
    assert len(pickle.dumps(net.chain)) == before
