"""Activation quantization, online: every scale and zero point comes from the values at hand (Mills et al., 2025).

A layer's input is quantized per token (Linear) or per sample and channel (convolutions); attention's
Q, K and V per token and head, its probabilities as unsigned 8 bit. All of it is fake quantization: what
comes back are floats, in the dtype of what went in, that the codes stand for.
"""

import functools
import math

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch.overrides import TorchFunctionMode

ACT_BITS = (8, 6)
SOFTMAX_BITS = 8  # whatever bits the rest takes
MAX_SCORES = 2**26  # attention scores held at a time: 256 MiB in float32


def quantize_tokens(values, bits):
    """`values` [..., n] in 2^bits levels from each token's min to its max, in their own dtype.

    Scale and zero point of a token are computed in float32 (float64 for float64 values):
    scale = (max - min)/(2^bits - 1), zero = round(-min/scale), codes clipped to 0 ... 2^bits - 1.
    A constant token comes back as it is, one with NaN or infinite values as NaN.
    """
    largest_code = 2**bits - 1
    scale, zero_point = _token_range(values, largest_code)
    codes = (values / scale).round_().add_(zero_point).clamp_(0, largest_code)  # promotes to the scale's dtype
    limits = torch.finfo(values.dtype)  # rounding the zero point may carry the range's ends past them
    return codes.sub_(zero_point).mul_(scale).clamp_(limits.min, limits.max).to(values.dtype)


def quantize_channels(values, bits):
    """`values` [N, C, H, W] or [N, C, L], a convolution's input, quantized per sample and channel."""
    return quantize_tokens(values.flatten(2), bits).view(values.shape)


def _token_range(values, largest_code):
    """Scale and zero point [..., 1] of each token of `values` [..., n]."""
    low, high = values.aminmax(dim=-1, keepdim=True)
    low, high = _widen(low), _widen(high)
    scale = (high / 2 - low / 2) / (largest_code / 2)  # halved, so that the difference cannot overflow
    limits = torch.finfo(scale.dtype)
    # A constant token is one whole step away from zero, which is exact; an all-zero one takes any scale.
    scale = torch.where(low == high, low.abs(), scale).clamp_(min=limits.smallest_normal * limits.eps)
    return scale, (-low / scale).round_()


def _widen(values):
    return values.to(torch.promote_types(values.dtype, torch.float32))


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *, bits):
    """F.scaled_dot_product_attention with Q, K, V and the probabilities quantized (Mills et al., 2025).

    query [..., L, D], key [..., S, D], value [..., S, E]; attn_mask, boolean (true: attend) or additive,
    broadcasts to [..., L, S]; returns [..., L, E] in the query's dtype. Products and softmax are computed
    in float32 (float64 for float64). Queries are taken a chunk at a time, MAX_SCORES scores at most.
    """
    for name, wanted in {"dropout_p": dropout_p, "is_causal": is_causal, "enable_gqa": enable_gqa}.items():
        if wanted:
            raise NotImplementedError(f"quantized attention has no {name} (given {wanted})")
    dtype = query.dtype
    query, key, value = (_widen(quantize_tokens(tensor, bits)) for tensor in (query, key, value))
    query.mul_(query.shape[-1] ** -0.5 if scale is None else scale)
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    chunk = max(1, MAX_SCORES // (math.prod(batch) * key.shape[-2]))  # queries
    queries = query.split(chunk, dim=-2)
    masks = [None] * len(queries)
    if attn_mask is not None:
        masks = attn_mask.expand(*batch, query.shape[-2], key.shape[-2]).split(chunk, dim=-2)
    outputs = [_attend(some, key, value, mask) for some, mask in zip(queries, masks, strict=True)]
    return torch.cat(outputs, dim=-2).to(dtype)


def _attend(query, key, value, mask):
    """Attention [..., L, E] of quantized and scaled `query`, `key`, `value` under `mask` [..., L, S] or None."""
    scores = query @ key.mT  # [..., L, S]
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        scores.add_(mask)
    codes, scale = softmax_codes(scores)
    return (codes @ value).mul_(scale)  # [..., L, E]


def softmax_codes(scores):
    """Softmax of `scores` [..., S], unsigned SOFTMAX_BITS from zero to each row's largest probability.

    Returns the codes [..., S], written over the scores, and their scale [..., 1]. The largest is exp(0)
    over the sum, so the codes are rounded exponentials. A row of -inf alone gives zeros.
    """
    largest_code = 2**SOFTMAX_BITS - 1
    top = scores.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    exponentials = scores.sub_(top).exp_()
    total = exponentials.sum(dim=-1, keepdim=True).clamp_(min=1)  # below 1 only in a row of -inf
    return exponentials.mul_(largest_code).round_(), 1 / (largest_code * total)


class _QuantizedAttention(TorchFunctionMode):
    """While it is entered, F.scaled_dot_product_attention is `attention`; counts its calls."""

    def __init__(self, bits):
        super().__init__()
        self.bits = bits
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return attention(*args, **(kwargs or {}), bits=self.bits)


class QuantAttnProcessor:
    """diffusers' attention processor `inner`, unchanged but for its attention being quantized.

    `calls` counts how often it has run. RuntimeError if `inner` does not go through
    F.scaled_dot_product_attention, where there would be nothing to quantize.
    """

    def __init__(self, inner, bits):
        self.inner = inner
        self.bits = bits
        self.calls = 0

    @property
    def __call__(self):
        """A function with the parameters of `inner`, by which diffusers decides what to pass."""

        @functools.wraps(self.inner.__call__)
        def call(*args, **kwargs):
            with _QuantizedAttention(self.bits) as mode:
                output = self.inner(*args, **kwargs)
            if not mode.calls:
                name = type(self.inner).__name__
                raise RuntimeError(f"{name} does not call F.scaled_dot_product_attention: it cannot be quantized")
            self.calls += 1
            return output

        return call


def set_activation_bits(denoiser, bits):
    """Quantize the activations of `denoiser` to `bits` (ACT_BITS); None: back to what it was, processors included.

    Reaches the layers that quant.layers.install has put in (they have `act_bits`) and every attention.
    """
    if bits is not None and bits not in ACT_BITS:
        raise ValueError(f"activations take {' or '.join(map(str, ACT_BITS))} bits, or None, not {bits!r}")
    for module in list(denoiser.modules()):  # setting a processor may change the modules
        if hasattr(module, "act_bits"):
            module.act_bits = bits
        elif isinstance(module, Attention):
            module.set_processor(_with_bits(module.processor, bits))


def _with_bits(processor, bits):
    """The form of `processor`, which may be one already, that quantizes to `bits`; its inner one for None."""
    if not isinstance(processor, QuantAttnProcessor):
        return processor if bits is None else QuantAttnProcessor(processor, bits)
    processor.bits = bits
    return processor.inner if bits is None else processor
