"""Every place computes every network inside the bound derived for that very input."""

import functools
import math

import agreement
import numpy as np
import pytest
from cases import cases, layouts, pool_signatures
from hypothesis import given
from places import DTYPES, Place, places

from nnfwd.bounds import arithmetic_of, array_bound
from nnfwd.cases import Case

# JAX compiles for every new shape, so it takes part where shapes come from a pool. Dask builds a graph for every call,
# and runs NumPy: a long run gives it no more networks than a short one.
COMPILES = ("jax",)
GRAPHS = {"dask": 300}


@functools.cache
def at(dtype: str) -> tuple[Place, ...]:
    return tuple(place for place in places() if place.has(dtype))


def run(case: Case, layout: str, where: tuple[Place, ...], count, precision: str = "highest") -> None:
    bounds = {}
    for place in where:
        if count.networks(place, case.dtype, precision) >= GRAPHS.get(place.name, math.inf):
            continue
        arithmetic = arithmetic_of(place.adapter, case.dtype, precision=precision, device=place.device)
        key = repr(arithmetic)
        if key not in bounds:
            bounds[key] = array_bound(case.x, case.network, arithmetic=arithmetic)
        with place.context(case.dtype):
            x = placed(case, layout, place)
            before = place.adapter.to_numpy(x).tobytes()
            y = case.network(x, precision=precision)
            ratio = agreement.check(y, place, case.dtype, bounds[key])
            assert place.adapter.to_numpy(x).tobytes() == before, "the input was changed"
        count(place, case, precision, ratio, bounds[key].unclaimed)


def placed(case: Case, layout: str, place: Place):
    """The case's x at a place, in a layout."""
    if layout == "transposed" and case.x.ndim > 1:
        turned = place.put(np.ascontiguousarray(np.swapaxes(case.x, -1, -2)), case.dtype)
        x = place.adapter.xp.matrix_transpose(turned)
        return x.rechunk({-1: -1}) if place.name == "dask" else x
    if layout == "strided":
        return place.put(np.repeat(case.x, 2, axis=-1), case.dtype)[..., ::2]
    x = place.put(case.x.copy(), case.dtype)
    if layout == "read-only" and isinstance(x, np.ndarray):
        x.flags.writeable = False
    return x


@pytest.mark.parametrize("dtype", DTYPES)
def test_free_shapes(dtype, count):
    where = tuple(place for place in at(dtype) if place.name not in COMPILES)

    @given(case=cases(dtype), layout=layouts)
    def every_network(case, layout):
        run(case, layout, where, count)

    every_network()


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_from_a_pool(dtype, count):
    where = at(dtype)

    @given(case=cases(dtype, pool_signatures), layout=layouts)
    def every_network(case, layout):
        run(case, layout, where, count)

    every_network()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_other_precisions(precision, count):
    where = tuple(place for place in at("float32") if place.name not in ("array_api_strict", "dask"))  # NumPy's

    @given(case=cases("float32", pool_signatures))
    def every_network(case):
        run(case, "C", where, count, precision)

    every_network()
