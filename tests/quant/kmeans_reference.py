"""The optimum of one-dimensional K-Means by the plain table over k and the sorted values: an oracle, slow."""

import numpy as np


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
