"""Exact one-dimensional K-Means: K-Means-C (per output channel) and K-Means-A (per weight slot).

Clusters of sorted values are intervals, so the optimum is found by dynamic programming over where
each interval begins (Wang and Song, 2011; Gronlund et al., 2017). The best start of the last
interval never moves left as values are added, so each row of the table is filled by divide and
conquer: O(k n log n) for n values, and the one table holds the optimum for every k up to its
height. Sums are in double precision: exact wherever outliers are less than about a million times as
far out as their channel's clusters are wide. The two grains are those of
Mills et al. (2025).
"""

import numba
import numpy as np
import torch


def fit_per_channel(weight, bits=(4, 3)):
    """Optimal centroids of each output channel of `weight` [C, ...], per bit width.

    Returns {b: [C, min(2^b, n)]}, ascending, in float32 (float64 for float64 weights), n being the
    weights per channel. A channel with fewer distinct values than centroids repeats its largest.
    """
    rows = weight.reshape(len(weight), -1)
    values = np.sort(_to_float64(rows), axis=1)
    sizes = [min(2**b, rows.shape[1]) for b in bits]
    return _as_tensors(bits, _optimal_centroids(values, np.ones_like(values), sizes), weight)


def fit_whole(weight, bits=(4, 3)):
    """Optimal centroids of all of `weight` together: {b: [min(2^b, numel)]}, as `fit_per_channel`."""
    values, counts = np.unique(_to_float64(weight.reshape(-1)), return_counts=True)
    sizes = [min(2**b, weight.numel()) for b in bits]
    centroids = _optimal_centroids(values[None], counts[None].astype(np.float64), sizes)
    return {b: table[0] for b, table in _as_tensors(bits, centroids, weight).items()}


def assign(weight, centroids):
    """Codes (uint8, shape of `weight`): index of the nearest centroid, the lower one at a tie.

    `centroids` is [k] for the whole weight or [C, k] for each of its C output channels.
    """
    centroids = centroids.to(torch.promote_types(centroids.dtype, torch.float32))
    boundaries = ((centroids[..., 1:] + centroids[..., :-1]) / 2).contiguous()  # [(C,) k-1]
    return assign_by_boundaries(weight, boundaries)


def assign_by_boundaries(weight, boundaries):
    """Codes (uint8): how many of the ascending `boundaries` [(C,) k-1] lie below each weight."""
    shape = (-1,) if boundaries.ndim == 1 else (len(weight), -1)
    dtype = torch.promote_types(boundaries.dtype, torch.float32)
    codes = torch.searchsorted(boundaries.to(weight.device, dtype), weight.reshape(shape).to(dtype).contiguous())
    return codes.to(torch.uint8).reshape(weight.shape)


def dequantize(codes, centroids):
    """Weights of the codes' shape and the centroids' dtype: each code's centroid."""
    if centroids.ndim == 1:
        return centroids[codes.long()]
    rows = torch.gather(centroids, 1, codes.reshape(len(codes), -1).long())
    return rows.reshape(codes.shape)


def _to_float64(tensor):
    array = tensor.detach().cpu().double().numpy()
    if not array.size:
        raise ValueError("the weight is empty; K-Means cannot be fitted to it")
    if not np.isfinite(array).all():
        raise ValueError("the weight has NaN or infinite values; K-Means cannot be fitted to it")
    return array


def _as_tensors(bits, centroids, weight):
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return {b: torch.from_numpy(table).to(weight.device, dtype) for b, table in zip(bits, centroids, strict=True)}


def _optimal_centroids(values, counts, sizes):
    """Centroids [R, k] for each k of `sizes` of R rows of ascending values [R, n] with counts [R, n]."""
    out = np.empty((len(values), sum(sizes)))
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    _fit_rows(values, counts, np.array(sizes), out)
    torch.set_num_threads(threads)  # Numba's first run sets OpenMP's number of threads, which is torch's too
    return np.split(out, np.cumsum(sizes)[:-1], axis=1)


@numba.njit(parallel=True, cache=True)
def _fit_rows(values, counts, sizes, out):
    for row in numba.prange(len(values)):
        _fit_row(values[row], counts[row], sizes, out[row])


@numba.njit(cache=True)
def _fit_row(values, counts, sizes, out):
    x, w = _merge_equal(values, counts)
    m = len(x)
    # Centring on the mean keeps the prefix sums' differences accurate.
    center = (x * w).sum() / w.sum()
    weight_sum, sum1, sum2 = np.zeros(m + 1), np.zeros(m + 1), np.zeros(m + 1)
    for i in range(m):
        d = x[i] - center
        weight_sum[i + 1] = weight_sum[i] + w[i]
        sum1[i + 1] = sum1[i] + w[i] * d
        sum2[i + 1] = sum2[i] + w[i] * d * d
    start = _interval_starts(weight_sum, sum1, sum2, min(sizes.max(), m))
    offset = 0
    for k in sizes:
        used = min(k, m)
        end = m
        for c in range(used - 1, -1, -1):
            begin = start[c, end - 1]
            mass = weight_sum[end] - weight_sum[begin]
            out[offset + c] = center + (sum1[end] - sum1[begin]) / mass
            end = begin
        for c in range(used, k):
            out[offset + c] = out[offset + used - 1]
        offset += k


@numba.njit(cache=True)
def _merge_equal(values, counts):
    """Distinct values, ascending, and their counts."""
    m = 1
    for i in range(1, len(values)):
        m += values[i] != values[i - 1]
    x, w = np.empty(m), np.zeros(m)
    at = 0
    x[0] = values[0]
    for i in range(len(values)):
        if values[i] != x[at]:
            at += 1
            x[at] = values[i]
        w[at] += counts[i]
    return x, w


@numba.njit(cache=True)
def _interval_starts(weight_sum, sum1, sum2, k):
    """start[c, i]: where the last of c + 1 optimal intervals over values 0 ... i begins."""
    m = len(sum1) - 1
    start = np.zeros((k, m), np.int32)
    cost, previous = np.empty(m), np.empty(m)
    for i in range(m):
        cost[i] = sum2[i + 1] - sum1[i + 1] ** 2 / weight_sum[i + 1]
    for c in range(1, k):
        cost, previous = previous, cost
        gap = 1
        while gap < m:
            gap *= 2
        # Coarse to fine: each value searches only between the answers of its two solved neighbours.
        while gap >= 1:
            for i in range(gap - 1, m, 2 * gap):
                low = start[c, i - gap] if i >= gap else 0
                high = min(start[c, i + gap], i) if i + gap < m else i
                low, high = max(low, min(c, i)), max(high, min(c, i))
                best, best_start = np.inf, low
                w1, s1, s2 = weight_sum[i + 1], sum1[i + 1], sum2[i + 1]
                for j in range(low, high + 1):
                    d = s1 - sum1[j]
                    total = previous[j - 1] + (s2 - sum2[j]) - d * d / (w1 - weight_sum[j])
                    if total < best:
                        best, best_start = total, j
                cost[i] = best
                start[c, i] = best_start
            gap //= 2
    return start
