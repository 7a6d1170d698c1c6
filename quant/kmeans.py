"""K-Means of weights: K-Means-C (centroids per output channel) and K-Means-A (per weight slot).

The two grains are those of Mills et al. (2025). Both are fitted to the exact optimum: `quant/kmeans_cpu.py` tells
how, and `quant/kmeans_cuda.py` does the same for K-Means-C on a GPU.
"""

import importlib.util

import numpy as np
import torch
from numba import prange

from quant import kmeans_cpu
from quant.compiled import kernel
from quant.doors import expect
from quant.rows import check, run, sorted_rows

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fit_per_channel(weight, bits=(4, 3), rows=None):
    """Optimal centroids of each output channel of `weight` [C, ...], per bit width.

    Returns {b: [C, min(2^b, n)]}, ascending, in float32 (float64 for float64 weights), n being the
    weights per channel. A channel with fewer distinct values than centroids repeats its largest.
    `rows` are the weight's sorted rows, if they are at hand.
    """
    sizes = [min(2**b, weight[0].numel()) for b in bits] if weight.numel() else []
    if weight.is_cuda and importlib.util.find_spec("triton"):  # which torch brings, but not on all systems
        from quant import kmeans_cuda

        check(weight)
        return _as_tensors(bits, kmeans_cuda.fit_per_channel(weight, sizes), weight)
    return _as_tensors(bits, kmeans_cpu.fit_sorted(sorted_rows(weight) if rows is None else rows, sizes), weight)


def fit_whole(weight, bits=(4, 3), rows=None):
    """Optimal centroids of all of `weight` together: {b: [min(2^b, numel)]}, as `fit_per_channel`."""
    sizes = [min(2**b, weight.numel()) for b in bits]
    if weight.itemsize == 2:
        values, counts = kmeans_cpu.histogram(weight)
    else:
        values, counts = np.sort(sorted_rows(weight) if rows is None else rows, axis=None), None
    return _as_tensors(bits, kmeans_cpu.fit_values(values, counts, sizes), weight)


def assign(weight, centroids):
    """Codes (uint8, shape of `weight`): index of the nearest centroid, the lower one at a tie.

    `centroids` is [k] for the whole weight or [C, k] for each of its C output channels.
    """
    return assign_by_boundaries(weight, boundaries_of(centroids))


def boundaries_of(centroids):
    """Midpoints [(C,) k-1] of neighbouring centroids [(C,) k], in float32 (float64 for float64 centroids)."""
    centroids = centroids.to(torch.promote_types(centroids.dtype, torch.float32))
    left, right = centroids[..., :-1], centroids[..., 1:]
    middle = (right + left) / 2
    return torch.where(middle.isfinite(), middle, right / 2 + left / 2).contiguous()  # of the largest numbers


def assign_by_boundaries(weight, boundaries):
    """Codes (uint8): how many of the ascending `boundaries` [(C,) k-1] lie below each weight."""
    shape = (-1,) if boundaries.ndim == 1 else (len(weight), -1)
    dtype = torch.promote_types(boundaries.dtype, torch.float32)
    codes = torch.searchsorted(boundaries.to(weight.device, dtype), weight.reshape(shape).to(dtype).contiguous())
    return codes.to(torch.uint8).reshape(weight.shape)


def apply(weight, centroids, boundaries=None):
    """`weight` with each value replaced by its centroid (see `assign`), in the centroids' dtype.

    `boundaries` [(C,) k-1] send other weights to a centroid than those nearest to it.
    """
    boundaries = boundaries_of(centroids) if boundaries is None else boundaries
    own = (len(weight),) if centroids.ndim > 1 else ()
    expect("centroids", centroids.contiguous(), (*own, None), *FLOATS)
    expect("boundaries", boundaries.contiguous(), (*own, centroids.shape[-1] - 1), *FLOATS)
    if weight.device.type != "cpu" or centroids.dtype == torch.float64 or weight.dtype == torch.float64:
        return dequantize(assign_by_boundaries(weight, boundaries), centroids)
    rows = weight.reshape(len(weight), -1).float()
    limits, levels = (t.float().expand(len(rows), -1).contiguous() for t in (boundaries, centroids))
    out = torch.empty_like(rows)
    run(_choose, rows.numpy(), limits.numpy(), levels.numpy(), out.numpy())
    return out.to(centroids.dtype).reshape(weight.shape)


def dequantize(codes, centroids):
    """Weights of the codes' shape and the centroids' dtype: each code's centroid."""
    if centroids.ndim == 1:
        return centroids[codes.long()]
    rows = torch.gather(centroids, 1, codes.reshape(len(codes), -1).long())
    return rows.reshape(codes.shape)


def _as_tensors(bits, centroids, weight):
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return {b: table.to(weight.device, dtype).contiguous() for b, table in zip(bits, centroids, strict=True)}


@kernel(parallel=True, nogil=True)
def _choose(rows, boundaries, levels, out):
    """out [C, n]: of each channel's `levels` [C, k], the one that its weight's `boundaries` [C, k-1] send it to."""
    for channel in prange(len(rows)):
        row, chosen = rows[channel], out[channel]
        chosen[:] = levels[channel, 0]
        for c in range(boundaries.shape[1]):  # the loop over weights is the inner one: it vectorises
            limit, level = boundaries[channel, c], levels[channel, c + 1]
            for i in range(len(row)):
                chosen[i] = level if row[i] > limit else chosen[i]
