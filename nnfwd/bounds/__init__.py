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

from nnfwd.bounds.arithmetic import Arithmetic, arithmetic_of, tensor_cores
from nnfwd.bounds.looped import looped_bound
from nnfwd.bounds.result import Bounded

__all__ = ["Arithmetic", "Bounded", "arithmetic_of", "looped_bound", "tensor_cores"]
