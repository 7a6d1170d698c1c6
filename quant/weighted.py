"""Levels that know their inputs: K-Means by squared errors weighted by the inputs' second moments.

Of a weight W [C, n] whose inputs have the second moments E[x_j^2] (quant/calibration.py), the output's squared error is
about sum_j E[x_j^2] (w_j - w'_j)^2, as far as inputs are uncorrelated. K-Means with a mass for each value has the same
exact optimum as without: the shortest path of quant/kmeans_cpu.py over sums of masses.
"""

import numpy as np
import torch
from numba import prange

from quant import kmeans_cpu
from quant.compiled import kernel
from quant.kmeans_cpu import PENALTY, ROWS_PER_TASK, _fit_values, _prefix_sums
from quant.rows import check, run

LEAST = 1e-6  # of the mean importance: what is never fed with anything has a mass too


def importance(weight, moments):
    """E[x^2] of the input that each number of `weight` [C, ...] is multiplied by, in its shape, their mean 1.

    ValueError if the weight has NaN or infinite values, or another number of inputs than the moments.
    """
    check(weight)
    diagonal = moments.diagonal.double()
    if len(diagonal) != weight[0].numel():
        raise ValueError(f"the moments are of {len(diagonal)} inputs, and the weight has {weight[0].numel()}")
    mean = diagonal.mean()
    diagonal = (diagonal / mean).clamp(min=LEAST) if mean > 0 else torch.ones_like(diagonal)
    return diagonal.to(weight.device).expand(len(weight), -1).reshape(weight.shape)


def fit_per_channel(weight, importance, bits):
    """Optimal centroids [C, min(2^bits, n)] of each output channel of `weight` [C, ...], by masses of its shape.

    Ascending, in float32 (float64 for float64 weights).
    """
    rows, masses = (each.detach().reshape(len(weight), -1).double().cpu() for each in (weight, importance))
    rows, order = rows.sort(dim=1)
    count = min(2**bits, rows.shape[1])
    out = np.empty((len(rows), count))
    run(_fit_rows, rows.numpy(), masses.gather(1, order).numpy(), np.array([count]), out)
    return torch.from_numpy(out).to(weight.device, torch.promote_types(weight.dtype, torch.float32))


def fit_whole(weight, importance, bits):
    """Optimal centroids [min(2^bits, numel)] of all of `weight` together, as `fit_per_channel`."""
    values, order = weight.detach().reshape(-1).double().cpu().sort()
    masses = importance.reshape(-1).double().cpu()[order]
    values, places = values.unique_consecutive(return_inverse=True)
    masses = torch.zeros_like(values).index_add_(0, places, masses)
    (found,) = kmeans_cpu.fit_values(values.numpy(), masses.numpy(), [min(2**bits, weight.numel())])
    return found.to(weight.device, torch.promote_types(weight.dtype, torch.float32))


@kernel(parallel=True, nogil=True, error_model="numpy")
def _fit_rows(rows, masses, sizes, out):
    """Centroids of each ascending row of `rows` [R, n] with `masses` [R, n], for each size in turn: out [R, sum(sizes)]."""
    count, n = rows.shape
    for task in prange((count + ROWS_PER_TASK - 1) // ROWS_PER_TASK):
        factors = np.full(len(sizes), PENALTY)
        x, mass, moment = np.empty(n), np.empty(n + 1), np.empty(n + 1)
        cost, start = np.empty(n + 1), np.empty(n + 1, np.uint32)
        for row in range(task * ROWS_PER_TASK, min((task + 1) * ROWS_PER_TASK, count)):
            told = _prefix_sums(rows[row], masses[row], x, mass, moment)
            m, offset = told[0], 0
            sums = x[:m], mass[: m + 1], moment[: m + 1]
            for s in range(len(sizes)):
                own = out[row, offset : offset + sizes[s]]
                factors[s] *= _fit_values(rows[row], sums, told, factors[s], cost, start, own)
                offset += sizes[s]
