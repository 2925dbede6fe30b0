"""The complementary error function in Array API operations: the standard has none, and exact gelu needs one.

For z >= 0, with t = (z - 4) / (z + 4) in [-1, 1),

    erfc(z) = exp(-z^2) * P(t) / (1 + 2 z),    P(t) = (1 + 2 z) exp(z^2) erfc(z),

a form of M. M. Shepherd and J. G. Laframboise, Math. Comp. 36 (1981) 249-253: P runs smoothly from 1 at z = 0 to
2 / sqrt(pi) at infinity. P is fitted here at Chebyshev nodes, for z up to 10.5 (float32) and 28 (float64), beyond which
erfc underflows; the fits' relative errors are 1.1e-9 and 1.6e-17. exp(-z^2) keeps its relative accuracy because z is
split into a multiple of 1/64, whose square is exact, and the rest. For z < 0, erfc(z) = 2 - erfc(-z).
"""

from typing import Any

from nnfwd.backend import Array
from nnfwd.placement import dtype_name

_FLOAT32 = (
    1.2329951186481043, -0.1396211348130777, 0.01537963641911414, 0.06809800463094816,
    -0.10103775016849999, 0.09371953400624503, -0.06635710169974308, 0.037226408654272694,
    -0.01601292981706137, 0.005049267497611673, -0.0011386667239085865, -0.0006437728425240374,
)  # fmt: skip
_FLOAT64 = (
    1.2329951186255526, -0.1396211168405629, 0.01537965210262074, 0.06809705425473732,
    -0.10103906603635213, 0.09373283499679412, -0.06633036581152939, 0.03716751556249286,
    -0.016197734059115006, 0.005031969755895426, -0.00075777334141333, -0.00019925550755614952,
    0.000150622243948303, -2.4403169244974074e-05, -1.1224789135154701e-05, 5.7178872846321855e-06,
    3.0135049944875397e-07, -8.351619688696847e-07, 6.270727157198311e-08, 1.1534943745754157e-07,
    -7.71541861441783e-09, -1.3670989863347383e-08, -1.8206098680308682e-09,
)  # fmt: skip


def erfc(z: Array, xp: Any) -> Array:
    """The complementary error function, element by element; float16 and bfloat16 are computed in float32.

    Where the namespace has an `erfc` it is taken: PyTorch's is right to one unit in the last place, and fast. (JAX's,
    which is off by 60 units in float32 and 470 in float64 far out, is not in its namespace.)
    """
    own = getattr(xp, "erfc", None)
    if own is not None:
        return own(z)
    dtype = z.dtype
    if dtype_name(dtype) in ("float16", "bfloat16"):
        return xp.astype(erfc(xp.astype(z, xp.float32), xp), dtype)
    a = xp.minimum(xp.where(z < 0, -z, z), 30.0)  # not abs(z), whose gradient at 0 is 0
    t = (a - 4) / (a + 4)
    coefficients = _FLOAT64 if dtype_name(dtype) == "float64" else _FLOAT32
    p = coefficients[-1] * t + coefficients[-2]
    for c in coefficients[-3::-1]:
        p = p * t + c
    coarse = xp.round(a * 64) / 64
    # Not the two exponentials side by side: XLA would make them one, of the sum, and lose what the split is for.
    right = xp.exp(-coarse * coarse) * (xp.exp((coarse - a) * (coarse + a)) * (p / (1 + 2 * a)))
    return xp.where(z < 0, 2 - right, right)
