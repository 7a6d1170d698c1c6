"""The optimum of one-dimensional K-Means by the plain table over k and the sorted values: an oracle, slow."""

import numpy as np
from numba import njit


def least_squared_error(values, k):
    """Squared error of the best k clusters of `values` [n]."""
    x = np.sort(np.asarray(values, np.float64))
    x = x - x.mean()
    n = len(x)
    sums, squares = np.r_[0, np.cumsum(x)], np.r_[0, np.cumsum(x * x)]
    first, last = np.triu_indices(n + 1, 1)
    step = np.full((n + 1, n + 1), np.inf)  # step[j, i]: error of values j ... i-1 as one cluster
    step[first, last] = (squares[last] - squares[first]) - (sums[last] - sums[first]) ** 2 / (last - first)
    best = step[0]
    for _ in range(k - 1):
        best = np.minimum(best, (best[:, None] + step).min(axis=0))  # at most, not exactly, so many clusters
    return max(best[n], 0.0)


@njit
def least_errors(values, most):
    """Squared errors [most + 1] of the best 1, 2 ... `most` clusters of ascending `values` [n]; index 0 is not used.

    No sums over all values, which one far value would drown the rest in: the error of each cluster is summed up from its
    last value to its first, about their mean as it moves (Welford, 1962).
    """
    n = len(values)
    best = np.full((most + 1, n + 1), np.inf)
    best[:, 0] = 0
    mean, error = 0.0, 0.0  # about the first value
    for i in range(n):
        gap = values[i] - values[0] - mean
        error += gap * gap * i / (i + 1)
        mean += gap / (i + 1)
        best[1, i + 1] = error
    for i in range(1, n + 1):
        mean, error = 0.0, 0.0  # about the last value
        for j in range(i - 1, -1, -1):
            count = i - 1 - j
            gap = values[j] - values[i - 1] - mean
            error += gap * gap * count / (count + 1)
            mean += gap / (count + 1)
            if error > best[2, i]:
                break
            for k in range(2, most + 1):
                best[k, i] = min(best[k, i], best[k - 1, j] + error)
    return best[:, n]
