"""Uniform affine quantization (UAQ) of weights, per output channel.

A channel's range is shrunk by 1.0, 0.9 ... 0.1 and the shrink with the least mean |w - w'|^2.4 is
kept (LAPQ, Nahshan et al., 2021; Q-Diffusion, Li et al., 2023). `fit` is that search in torch, on any
device; `fit_rows` is the same for the CPU, a channel at a time while it is in the processor's cache,
all shrinks and bit widths together.
"""

import math

import numpy as np
import torch
from numba import prange

from quant.compiled import kernel
from quant.doors import expect
from quant.power import power_2_4
from quant.rows import run

SHRINKS = tuple(1 - tenth / 10 for tenth in range(10))
MOST_ZERO = {torch.float16: 2**15}  # so that a code and a zero point make a number of that precision
MOST_ZERO_ELSE = 2**30
LARGE = 128  # a number whose 255-fold half precision holds, and little beyond
_SHRINKS_32 = np.array(SHRINKS, np.float32)


def mean_error(weight, quantized):
    """Mean |w - w'|^2.4 of each output channel [C], in float32 (float64 for float64 weights)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    difference = (weight.to(dtype) - quantized.to(dtype)).reshape(len(weight), -1)
    return difference.abs_().pow_(2.4).mean(dim=1)


def total_error(weight, quantized):
    """Quantization error of a slot: sum over output channels of the channel's mean |w - w'|^2.4."""
    total = mean_error(weight, quantized).double().sum().item()
    if math.isfinite(total):
        return total
    return mean_error(weight.double(), quantized.double()).sum().item()  # more than float32 holds


def fit(weight, bits, importance=None):
    """Scale and zero point [C] of each output channel of `weight` [C, ...].

    With the `importance` of each weight, in its shape, the least sum of importance x (w - w')^2 wins. The search runs in
    float32 (float64 for float64 weights) and so is the scale; the zero point is a whole number of the same dtype. A
    constant channel is represented exactly.
    """
    rows = weight.detach().reshape(len(weight), -1)
    rows = rows.to(torch.promote_types(weight.dtype, torch.float32))  # [C, n]
    if not rows.isfinite().all():
        raise ValueError("the weight has NaN or infinite values; UAQ cannot be fitted to it")
    # A power of two per channel takes the |w - w'|^2.4 of very large or small weights back into range.
    exponent = rows.abs().amax(dim=1).frexp().exponent.clamp(-100, 100)  # [C]
    rows = torch.ldexp(rows, -exponent[:, None])
    low, high = rows.aminmax(dim=1)  # [C], [C]
    best_error = torch.full_like(low, torch.inf)
    scale, zero_point = torch.ones_like(low), torch.zeros_like(low)
    steps = torch.full_like(low, 2**bits - 1)  # a tensor: CUDA would multiply by the inverse of a number
    for shrink in SHRINKS:
        new_scale = (high * shrink - low * shrink) / steps
        new_zero = (-low * shrink / new_scale).round()
        error = _error(rows, dequantize(quantize(rows, new_scale, new_zero, bits), new_scale, new_zero), importance)
        better = error < best_error  # false for the NaN of a constant channel
        best_error = torch.where(better, error, best_error)
        scale = torch.where(better, new_scale, scale)
        zero_point = torch.where(better, new_zero, zero_point)
    constant = low == high
    scale = torch.where(constant & (low != 0), low.abs(), scale)
    zero_point = torch.where(constant, (low < 0).to(scale.dtype), zero_point)
    # As the outermost level, which is exact too, a large number has none beyond it that could overflow.
    outermost = constant & (torch.ldexp(low.abs(), exponent) > LARGE)
    scale = torch.where(outermost, scale / 2**bits, scale)
    zero_point = torch.where(outermost, torch.where(low < 0, 2.0**bits, -1.0), zero_point)
    return torch.ldexp(scale, exponent), zero_point


def _error(rows, quantized, importance):
    if importance is None:
        return mean_error(rows, quantized)
    return ((rows - quantized).square_() * importance.reshape(rows.shape).to(rows.dtype)).mean(dim=1)


def stored(scale, zero_point, dtype, bits):
    """The tables of a fitted scale and zero point of so many bits, as they are kept: {name: tensor}; all levels finite."""
    offset = zero_point * scale
    # A channel far from zero whose values lie close together has a coarser grid, of zero points that `dtype` can hold.
    least = (offset.abs() / MOST_ZERO.get(dtype, MOST_ZERO_ELSE)).nan_to_num(0)
    storable = storable_scale(torch.maximum(scale, least), dtype)
    # A scale that rounding moves far (a subnormal one) must not move the channel's offset with it.
    zero_point = (offset / storable).nan_to_num(0).round()
    storable = _with_finite_levels(storable, zero_point, bits)
    return {"scale": storable, "zero_point": whole_numbers(zero_point)}


def _with_finite_levels(scale, zero_point, bits):
    """The scales, smaller where the lowest or the highest level would overflow: of weights near the largest number."""
    steps = _ends(zero_point, scale.dtype, bits).abs().amax(dim=-1)
    largest = torch.full_like(scale, torch.finfo(scale.dtype).max) * (1 - torch.finfo(scale.dtype).eps)
    return torch.where((steps * scale).isfinite(), scale, largest / steps)


def has_finite_levels(scale, zero_point, bits):
    """Whether every code stands for a finite weight."""
    return bool((_ends(zero_point, scale.dtype, bits) * scale[..., None]).isfinite().all())


def _ends(zero_point, dtype, bits):
    """The lowest and the highest level in steps of the scale: [..., 2]."""
    codes = torch.tensor([0, 2**bits - 1], dtype=dtype, device=zero_point.device)
    return codes - zero_point.to(dtype)[..., None]


def storable_scale(scale, dtype):
    """The scale in the weights' precision; one too small for it becomes its smallest number, not 0."""
    rounded = scale.to(dtype)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return torch.where(rounded > 0, rounded, smallest)


def whole_numbers(zero_point):
    """Zero points as the smallest integer type that holds them: 0 ... 2^b - 1 where weights straddle 0."""
    for dtype in (torch.int8, torch.int16, torch.int32):
        if zero_point.abs().max() <= torch.iinfo(dtype).max:
            return zero_point.to(dtype)
    return zero_point.clamp(-(2**31) + 1, 2**31 - 1).to(torch.int32)


def quantize(weight, scale, zero_point, bits):
    """Codes 0 ... 2^bits - 1, in the dtype of `weight` [C, ...]: round(w / scale) + zero point, clipped."""
    scale, zero_point = _per_channel(weight, scale, zero_point)
    return (weight / scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)


def dequantize(codes, scale, zero_point):
    """Weights (codes - zero point) x scale, in the dtype of `scale`."""
    scale, zero_point = _per_channel(codes, scale, zero_point)
    return (codes.to(scale.dtype) - zero_point) * scale


def _per_channel(tensor, scale, zero_point):
    shape = (-1,) + (1,) * (tensor.ndim - 1)
    return scale.reshape(shape), zero_point.to(scale.dtype).reshape(shape)


def fit_rows(rows, bits):
    """`fit` for each of several bit widths of float32 rows (numpy [C, n], ascending): {b: (scale, zero point)}."""
    expect("rows", rows, (None, None), np.float32)
    if not rows.size or not all(1 <= b <= 8 for b in bits):
        raise ValueError(f"rows of shape {list(rows.shape)} have no scales of {bits} bits")
    out = np.empty((2, len(bits), len(rows)), np.float32)
    run(_fit_rows, rows, np.array([2**b - 1 for b in bits], np.float32), _SHRINKS_32, out)
    scale, zero_point = torch.from_numpy(out)
    return {b: (scale[i], zero_point[i]) for i, b in enumerate(bits)}


@kernel(parallel=True, nogil=True, error_model="numpy")
def _fit_rows(rows, tops, shrinks, out):
    """Scales and zero points out [2, bit widths, C] of ascending rows [C, n]; `tops` are the highest codes."""
    for channel in prange(len(rows)):
        row = rows[channel]
        _, exponent = math.frexp(max(abs(row[0]), abs(row[-1])))
        exponent = min(max(exponent, -100), 100)  # a power of two takes very large or small weights back into range
        scaled = row * np.float32(2.0**-exponent)
        low, high = scaled[0], scaled[-1]
        for b in range(len(tops)):
            scale, zero_point = _search(scaled, low, high, tops[b], shrinks)
            if low == high:
                scale, zero_point = abs(low) if low != 0 else np.float32(1), np.float32(low < 0)
                if abs(low) * np.float32(2.0**exponent) > LARGE:  # see `fit`
                    count = tops[b] + np.float32(1)
                    scale, zero_point = scale / count, count if low < 0 else np.float32(-1)
            out[0, b, channel] = scale * np.float32(2.0**exponent)
            out[1, b, channel] = zero_point


@kernel(error_model="numpy")
def _search(row, low, high, top, shrinks):
    best, best_scale, best_zero = np.float32(np.inf), np.float32(1), np.float32(0)
    for s in range(len(shrinks)):
        scale = np.float32(np.float32(high * shrinks[s]) - np.float32(low * shrinks[s])) / top
        zero_point = np.float32(np.rint(np.float32(-low * shrinks[s]) / scale))
        error = _sum_of_errors(row, scale, zero_point, top)
        if error < best:  # false for the NaN of a constant channel
            best, best_scale, best_zero = error, scale, zero_point
    return best_scale, best_zero


@kernel(fastmath={"contract", "reassoc"}, error_model="numpy")
def _sum_of_errors(row, scale, zero_point, top):
    """Sum of |w - w'|^2.4; codes are truncated from half above them, which differs from rounding only at ties."""
    inverse, shifted = np.float32(1) / scale, zero_point + np.float32(0.5)
    above = top + np.float32(0.5)
    total = np.float32(0)
    for i in range(len(row)):
        code = np.float32(np.int32(min(max(row[i] * inverse + shifted, np.float32(0)), above)))
        total += power_2_4(abs((code - zero_point) * scale - row[i]))
    return total
