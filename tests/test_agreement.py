"""Every place computes every network inside the bound derived for that very input."""

import functools

import agreement
import numpy as np
import pytest
from cases import POOL, Case, cases
from hypothesis import given
from hypothesis import strategies as st
from places import DTYPES, Place, places

from nnfwd.bounds import arithmetic_of

# JAX compiles for every new shape, so it takes part where shapes come from a pool.
COMPILES = ("jax",)


@functools.cache
def at(dtype: str) -> tuple[Place, ...]:
    return tuple(place for place in places() if place.has(dtype))


def run(case: Case, where: tuple[Place, ...], count) -> None:
    bounds = {}
    for place in where:
        arithmetic = arithmetic_of(place.adapter, case.dtype)
        key = repr(arithmetic)
        if key not in bounds:
            bounds[key] = case.bounded(arithmetic)
        with place.context(case.dtype):
            x = placed(case, place)
            before = place.adapter.to_numpy(x).tobytes()
            y = case.network(x)
            ratio = agreement.check(y, place, case.dtype, bounds[key])
            assert place.adapter.to_numpy(x).tobytes() == before, "the input was changed"
        count(place, case.dtype, ratio, bounds[key].unclaimed)


def placed(case: Case, place: Place):
    """The case's x at a place, in its layout."""
    if case.layout == "transposed" and case.x.ndim > 1:
        turned = place.put(np.ascontiguousarray(np.swapaxes(case.x, -1, -2)), case.dtype)
        x = place.adapter.xp.matrix_transpose(turned)
        return x.rechunk({-1: -1}) if place.name == "dask" else x
    if case.layout == "strided":
        return place.put(np.repeat(case.x, 2, axis=-1), case.dtype)[..., ::2]
    x = place.put(case.x.copy(), case.dtype)
    if case.layout == "read-only" and isinstance(x, np.ndarray):
        x.flags.writeable = False
    return x


@pytest.mark.parametrize("dtype", DTYPES)
def test_free_shapes(dtype, count):
    where = tuple(place for place in at(dtype) if place.name not in COMPILES)

    @given(case=cases(dtype))
    def every_network(case):
        run(case, where, count)

    every_network()


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_from_a_pool(dtype, count):
    where = at(dtype)

    @given(case=cases(dtype, st.sampled_from(POOL)))
    def every_network(case):
        run(case, where, count)

    every_network()
