"""How far rounding may take a computed pass from the exact one: a bound derived for the very input, not a guess.

The exact network is the placed weights; h is the exact activation for the exact stored input, and e bounds
|computed - h|. e = 0 for the input. The bound holds for any order of summation, with or without fused multiply-add,
with gradual underflow or with subnormals flushed to 0. It does not hold for Strassen-like products.

With n the fan-in, u the unit roundoff, lambda the smallest normal and eta the smallest subnormal number, Omega the
largest finite one and gamma_m = m u / (1 - m u), a Dense layer's weighted sum z is within E of its computed value:

    A = sum |W| (|h| + e) + |b|,    c = (1 + u_in)^2 (1 + gamma_{n+1}(u_acc)) (1 + u_out)^2 - 1
    E = sum |W| e + c A + (1 + c) U,    U the underflow of n products and sums

    N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1
    C.-P. Jeannerod and S. M. Rump, SIAM J. Matrix Anal. Appl. 34 (2013) 338-344: n u for gamma_n, with no restriction
    P. Blanchard, N. J. Higham, F. Lopez, T. Mary, S. Pranesh, SIAM J. Sci. Comput. 42 (2020): wide sums
    P. Blanchard, D. J. Higham, N. J. Higham, IMA J. Numer. Anal. 41 (2021) 2311-2330: softmax

u_out enters twice: a wide sum is rounded to the narrow format, and so is the sum with the bias after it. Where no
operation can round at all (small integers), c = U = 0 and the bound asks for equality. Where overflow is possible, here
or before, e is infinite: nothing is claimed.
"""

from typing import Any

from nnfwd import backend as _backend
from nnfwd import placement
from nnfwd.bounds.arithmetic import Arithmetic, arithmetic_of, tensor_cores
from nnfwd.bounds.arrays import array_bound
from nnfwd.bounds.looped import looped_bound
from nnfwd.bounds.result import Bounded
from nnfwd.layers import Chain

__all__ = ["Arithmetic", "Bounded", "arithmetic_of", "array_bound", "error_bound", "looped_bound", "tensor_cores"]


def error_bound(net: Any, x: Any, /, *, dtype: Any = None, backend: Any = None, precision: str = "highest") -> Bounded:
    """The exact output for x, and how far rounding may take `net(x)` from it, element by element.

    Theorem. Let the weights and x be as stored in `dtype` on that backend, and let y be what the pass computes there,
    called or compiled.
    Then |y - exact| <= error for every element, whatever the order of summation, with fused multiply-add or without.
    Where `error` is infinite overflow is possible, and nothing is claimed; where it is 0 no operation could round, and
    y is equal. Where NaN or infinity came in, the same class comes out.

    Covered: sums in any order and in blocks, gradual underflow and subnormals flushed to 0, TF32 and bfloat16 operands
    (`precision`), 16-bit products with wide sums, and each library's own exp, expm1, log1p, log, tanh and erfc, to
    which a table gives an error (`nnfwd.ulp` measures it). Not covered: products that save multiplications (Strassen,
    Winograd), whose error is bounded in norm only, and callables of one's own.

    Sources: N. J. Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., 3.1; C.-P. Jeannerod and S. M.
    Rump, SIAM J. Matrix Anal. Appl. 34 (2013); P. Blanchard, N. J. Higham, F. Lopez, T. Mary and S. Pranesh, SIAM J.
    Sci. Comput. 42 (2020); P. Blanchard, D. J. Higham and N. J. Higham, IMA J. Numer. Anal. 41 (2021). The formulas are
    in `nnfwd.bounds`, and `bounds.looped_bound` is the same by readable loops: this is never below it and, a few of
    float64's smallest subnormals aside, at most 1.01 of it.

    Args:
        net: a `Network` or a sequence of layers.
        x: `(..., in)`, an array of any library or a nested list.
        dtype, backend, precision: of the computation in question, as for `net(x)`.

    Returns:
        `Bounded`: `exact`, `error` and `unclaimed`, NumPy arrays `(..., out)`, or `(members, ..., out)`; `ratio(y)`
        says how near its bound each element of a computed y is. Dask arrays are computed.

    Raises:
        As `net(x)` does; `ArrayError` for an activation whose rounding is unknown (a callable of one's own).
    """
    _backend.check_precision(precision)
    chain = Chain.of(net)
    adapter, x, name = placement.arrive(x, chain, None if backend is None else _backend.load(backend), dtype=dtype)
    if hasattr(adapter, "computed"):  # it hands blocks on to another library
        x = adapter.computed(x)
        adapter = _backend.of(x)
    arithmetic = arithmetic_of(adapter, name, precision=precision, device=placement.device_name(adapter, x))
    return array_bound(x, chain.place(adapter, name, like=x), arithmetic=arithmetic)
