"""Uniform affine quantization (UAQ) of weights, per output channel.

A channel's range is shrunk by 1.0, 0.9 ... 0.1 and the shrink with the least mean |w - w'|^2.4 is
kept (LAPQ, Nahshan et al., 2021; Q-Diffusion, Li et al., 2023).
"""

import torch

SHRINKS = tuple(1 - tenth / 10 for tenth in range(10))


def mean_error(weight, quantized):
    """Mean |w - w'|^2.4 of each output channel [C], in float32 (float64 for float64 weights)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    difference = (weight.to(dtype) - quantized.to(dtype)).reshape(len(weight), -1)
    return difference.abs_().pow_(2.4).mean(dim=1)


def fit(weight, bits):
    """Scale and zero point [C] of each output channel of `weight` [C, ...].

    The search runs in float32 (float64 for float64 weights) and so is the scale; the zero point is
    a whole number of the same dtype. A constant channel is represented exactly.
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
    for shrink in SHRINKS:
        new_scale = (high * shrink - low * shrink) / (2**bits - 1)
        new_zero = (-low * shrink / new_scale).round()
        error = mean_error(rows, dequantize(quantize(rows, new_scale, new_zero, bits), new_scale, new_zero))
        better = error < best_error  # false for the NaN of a constant channel
        best_error = torch.where(better, error, best_error)
        scale = torch.where(better, new_scale, scale)
        zero_point = torch.where(better, new_zero, zero_point)
    constant = low == high
    scale = torch.where(constant & (low != 0), low.abs(), scale)
    return torch.ldexp(scale, exponent), torch.where(constant, (low < 0).to(scale.dtype), zero_point)


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
