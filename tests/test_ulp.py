"""The libraries' own functions, measured here, stay within the rows that the bound takes for them.

python tests/test_ulp.py        prints what is measured beside each row
"""

import functools
import math

import numpy as np
import pytest
from cases import rounded
from places import DTYPES, places

from nnfwd.bounds import Arithmetic, arithmetic_of
from nnfwd.erfc import erfc
from nnfwd.reference import digits

# The arguments the activations call each with; results stay normal numbers, underflow has terms of its own.
DOMAINS = {
    "exp": {"float16": (-9.5, 11), "bfloat16": (-86, 88), "float32": (-87, 88), "float64": (-708, 709)},
    "expm1": dict.fromkeys(DTYPES, (-20.0, 0.0)),
    "log1p": dict.fromkeys(DTYPES, (0.0, 1.0)),
    "log": dict.fromkeys(DTYPES, (1.0, 64.0)),
    "tanh": dict.fromkeys(DTYPES, (-12.0, 12.0)),
    "erfc": {"float16": (-4, 2.4), "bfloat16": (-4, 9), "float32": (-6, 9.1), "float64": (-6, 26)},
}
POINTS = {"float16": 4000, "bfloat16": 4000, "float32": 20000, "float64": 1500}


@functools.cache
def points(name: str, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arguments, the exact results as float64 pairs (head, tail), for float64 from 60 digits."""
    low, high = DOMAINS[name][dtype]
    rng = np.random.default_rng(0)
    n = POINTS[dtype]
    near_zero = rng.choice([-1, 1], n // 2) * 2.0 ** rng.uniform(-12, 3, n // 2)
    x = rounded(np.clip(np.concatenate([rng.uniform(low, high, n), near_zero]), low, high), dtype)
    if dtype == "float64":
        m = digits()
        exact = [getattr(m, name)(m.number(v)) for v in x.tolist()]
        head = np.array([float(v) for v in exact])
        tail = np.array([float(v - m.number(h)) for v, h in zip(exact, head.tolist(), strict=True)])
    else:
        f = math.erfc if name == "erfc" else getattr(math, name)
        head = np.array([f(v) for v in x.astype("float64").tolist()])
        tail = np.zeros_like(head)
    return x, head, tail


def measured(place, name: str, dtype: str) -> float:
    """The largest error at these points, in units in the last place."""
    x, head, tail = points(name, dtype)
    u = Arithmetic(dtype).u
    with place.context(dtype):
        given = place.put(x, dtype)
        xp = place.adapter.xp
        y = place.adapter.to_numpy(erfc(given, xp) if name == "erfc" else getattr(xp, name)(given)).astype("float64")
    unit = 2 * u * 2.0 ** np.floor(np.log2(np.abs(head), where=head != 0, out=np.zeros_like(head)))
    return float((np.abs((y - head) - tail) / unit).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DOMAINS)
def test_errors_stay_within_their_rows(name, dtype):
    for place in places():
        if place.name != "dask" and place.has(dtype):
            row = arithmetic_of(place.adapter, dtype).ulp[name]
            assert measured(place, name, dtype) <= row, f"{place} {dtype} {name}"


if __name__ == "__main__":
    for place in places():
        for dtype in DTYPES:
            if place.has(dtype):
                rows = arithmetic_of(place.adapter, dtype).ulp
                found = (f"{name} {measured(place, name, dtype):.2f} (row {rows[name]})" for name in DOMAINS)
                print(f"{place!s:30} {dtype:9}", "  ".join(found))
