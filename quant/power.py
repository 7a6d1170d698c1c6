"""|e|^2.4, the error that UAQ's search minimises and sensitivities are told in, as a fast kernel.

e^2.4 = e^2 x e^0.4, and with e = m x 2^p, e^0.4 = m^0.4 x 2^(2p/5): a polynomial for m in [1, 2), and another
through the five values that the fraction of 2p/5 takes. About 2e-7 relative error, in float32.
"""

import numpy as np
from numba import njit
from numpy.polynomial import Chebyshev, Polynomial

from quant.compiled import kernel


def _coefficients(function, degree, domain):
    fitted = Chebyshev.interpolate(function, degree, domain)
    return tuple(np.float32(c) for c in fitted.convert(kind=Polynomial).coef)


M = _coefficients(lambda m: (1.5 + m) ** 0.4, 7, (-0.5, 0.5))  # in m - 1.5
_FIFTHS = np.arange(5) / 5
# 2^(2 x 127 / 5) = 2^(51 - 0.2)
F = tuple(np.float32(c) for c in np.linalg.solve(np.vander(_FIFTHS, increasing=True), 2 ** (_FIFTHS + 0.2)))


@njit(fastmath={"contract"}, error_model="numpy")
def power_2_4(e):
    """e^2.4 of a float32 e >= 0; not for infinities or NaN."""
    # Each whole number is cast back to 32 bits: wider ones would not vectorise.
    bits = np.float32(e).view(np.int32)
    m = np.int32(np.int32(bits & np.int32(0x7FFFFF)) | np.int32(0x3F800000)).view(np.float32) - np.float32(1.5)
    p = np.float32(np.int32(bits >> np.int32(23)))  # + 127
    whole = np.int32(p * np.float32(0.4) + np.float32(0.1))  # of 2 p / 5
    fraction = (np.float32(2) * p - np.float32(5) * np.float32(whole)) * np.float32(0.2)
    power = np.int32(np.int32(whole + np.int32(76)) << np.int32(23)).view(np.float32)  # 2^(whole - 51)
    mantissa = M[7]
    mantissa = mantissa * m + M[6]
    mantissa = mantissa * m + M[5]
    mantissa = mantissa * m + M[4]
    mantissa = mantissa * m + M[3]
    mantissa = mantissa * m + M[2]
    mantissa = mantissa * m + M[1]
    mantissa = mantissa * m + M[0]
    root = ((F[4] * fraction + F[3]) * fraction + F[2]) * fraction + F[1]
    root = root * fraction + F[0]
    return e * e * mantissa * root * power


@kernel(fastmath={"contract", "reassoc"}, error_model="numpy")
def sum_of_powers(errors):
    """Sum of e^2.4 over a float32 array of e >= 0."""
    total = np.float32(0)
    for i in range(len(errors)):
        total += power_2_4(errors[i])
    return total
