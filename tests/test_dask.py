"""Dask: one lazy map_blocks, nothing computed until asked, metadata known before."""

import numpy as np
import pytest
from networks import ensemble, inputs, mixed
from places import need

import nnfwd
from nnfwd import Dense, Network
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
        assert len(y.dask.layers) == len(source.dask.layers) + 1
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


def test_placed_copies_do_not_travel(da):
    import pickle

    net = mixed()
    before = len(pickle.dumps(net.chain))
    net(inputs(3, 4, dtype="float64"))
    assert len(pickle.dumps(net.chain)) == before
