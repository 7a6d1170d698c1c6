"""The error of a quantizer on the weight that it was fitted to, from its sorted rows.

Under any algorithm a channel's weights that share a code are neighbours in its sorted row, so the
error needs the places where codes change, found by bisection, and one pass of |w - w'|^2.4. The
codes are exactly those of `Quantizer.encode`, whose divisions round to the weights' own precision.
"""

import numpy as np
import torch
from numba import prange

from quant import affine, uaq
from quant.compiled import kernel
from quant.doors import expect
from quant.kmeans import boundaries_of
from quant.power import sum_of_powers
from quant.rows import run

# Bits of a float32's mantissa that a precision does not have.
DROPPED_BITS = {torch.float16: 13, torch.bfloat16: 16, torch.float32: 0}


def of_uaq(rows, scale, zero_point, bits):
    """Sum over channels of the mean |w - w'|^2.4 of float32 `rows` [C, n] under UAQ."""
    expect("rows", rows, (None, None), np.float32)
    expect("scale", scale.contiguous(), (len(rows),), *DROPPED_BITS)
    expect("zero_point", zero_point.contiguous(), (len(rows),), torch.int8, torch.int16, torch.int32)
    codes = torch.arange(2**bits, dtype=torch.uint8).expand(len(rows), -1)
    levels = uaq.dequantize(codes, scale, zero_point).float().numpy()
    zeros = zero_point.to(scale.dtype).float().numpy()
    out = np.empty(len(rows))
    run(_of_steps, rows, scale.float().numpy(), zeros, False, np.uint32(DROPPED_BITS[scale.dtype]), levels, out)
    return float(out.sum())


def of_affine(rows, scale, offset, bits):
    """The same under affine quantization."""
    expect("rows", rows, (None, None), np.float32)
    expect("scale", scale.contiguous(), (len(rows),), *DROPPED_BITS)
    expect("offset", offset.contiguous(), (len(rows),), *DROPPED_BITS)
    codes = torch.arange(2**bits, dtype=torch.uint8).expand(len(rows), -1)
    levels = affine.dequantize(codes, scale, offset).float().numpy()
    out = np.empty(len(rows))
    run(_of_steps, rows, scale.float().numpy(), offset.float().numpy(), True, np.uint32(0), levels, out)
    return float(out.sum())


def of_kmeans(rows, centroids):
    """The same under K-Means with `centroids` [k] or [C, k]."""
    expect("rows", rows, (None, None), np.float32)
    expect("centroids", centroids.contiguous(), (len(rows), None) if centroids.ndim > 1 else (None,), *DROPPED_BITS)
    levels = centroids.expand(len(rows), -1)
    out = np.empty(len(rows))
    run(_of_kmeans, rows, boundaries_of(levels).numpy(), levels.float().numpy(), out)
    return float(out.sum())


@kernel(parallel=True, nogil=True, error_model="numpy")
def _of_steps(rows, scales, shifts, are_offsets, dropped, levels, out):
    """Under steps of `scales` [C] from `shifts` [C], which are offsets or zero points."""
    for channel in prange(len(rows)):
        row, starts = rows[channel], np.zeros(levels.shape[1] + 1, np.int64)
        at = 0
        for code in range(1, levels.shape[1]):
            low, high = at, len(row)
            while low < high:
                middle = (low + high) // 2
                if _step(row[middle], scales[channel], shifts[channel], are_offsets, dropped) >= code:
                    high = middle
                else:
                    low = middle + 1
            starts[code] = at = low
        out[channel] = _error(row, starts, levels[channel])


@kernel(parallel=True, nogil=True, error_model="numpy")
def _of_kmeans(rows, boundaries, levels, out):
    for channel in prange(len(rows)):
        starts = np.zeros(levels.shape[1] + 1, np.int64)
        starts[1:-1] = np.searchsorted(rows[channel], boundaries[channel], side="right")
        out[channel] = _error(rows[channel], starts, levels[channel])


@kernel(error_model="numpy")
def _error(row, starts, levels):
    """Mean |w - w'|^2.4 of a row whose weights from starts[c] on have code c."""
    starts[-1] = len(row)
    differences = np.empty(len(row), np.float32)
    for c in range(len(levels)):
        for i in range(starts[c], starts[c + 1]):
            differences[i] = abs(row[i] - levels[c])
    return sum_of_powers(differences) / np.float32(len(row))


@kernel(error_model="numpy")
def _step(weight, scale, shift, is_offset, dropped):
    """The code of a weight, not clipped: round((w - offset) / scale), or UAQ's."""
    return np.rint((weight - shift) / scale) if is_offset else _code(weight, scale, shift, dropped)


@kernel(error_model="numpy")
def _code(weight, scale, zero_point, dropped):
    """round(w / scale) + zero point, not clipped, each step rounded to the weights' precision."""
    return _rounded(np.rint(_rounded(weight / scale, dropped)) + zero_point, dropped)


@kernel()
def _rounded(value, dropped):
    """A float32 rounded to nearest even without its last `dropped` bits; a half's overflow is left as it is."""
    if dropped == 0:
        return value
    bits = np.float32(value).view(np.uint32)
    half = (np.uint32(1) << (dropped - np.uint32(1))) - np.uint32(1)
    bits = np.uint32(bits + half + ((bits >> dropped) & np.uint32(1)))
    return np.uint32((bits >> dropped) << dropped).view(np.float32)
