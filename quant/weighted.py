"""Levels that know their inputs: K-Means by squared errors weighted by the inputs' second moments.

Of a weight W [C, n] whose inputs have the second moments E[x_j^2] (quant/calibration.py), the output's squared error is
about sum_j E[x_j^2] (w_j - w'_j)^2, as far as inputs are uncorrelated. K-Means with a mass for each value has the same
exact optimum as without: the shortest path of quant/kmeans_cpu.py over sums of masses.
"""

import torch

from quant import kmeans_cpu
from quant.rows import check

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
    sizes = [min(2**bits, rows.shape[1])]
    (found,) = kmeans_cpu.fit_sorted(rows.numpy(), sizes, masses.gather(1, order).numpy())
    return found.to(weight.device, torch.promote_types(weight.dtype, torch.float32))


def fit_whole(weight, importance, bits):
    """Optimal centroids [min(2^bits, numel)] of all of `weight` together, as `fit_per_channel`."""
    values, order = weight.detach().reshape(-1).double().cpu().sort()
    masses = importance.reshape(-1).double().cpu()[order]
    values, places = values.unique_consecutive(return_inverse=True)
    masses = torch.zeros_like(values).index_add_(0, places, masses)
    (found,) = kmeans_cpu.fit_values(values.numpy(), masses.numpy(), [min(2**bits, weight.numel())])
    return found.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
