"""Activation quantization, online: every scale and zero point comes from the values at hand (Mills et al., 2025).

A layer's input is quantized per token (Linear) or per sample and channel (convolutions); attention's
Q, K and V per token and head, its probabilities as unsigned 8 bit. All of it is fake quantization: what
comes back are floats, in the dtype of what went in, that the codes stand for.
"""

import contextlib
import inspect
import logging
import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

log = logging.getLogger("qua2sedimo")

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
    """`values` [N, C, L], [N, C, H, W] or [N, C, T, H, W], a convolution's input, quantized per sample and channel."""
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
    broadcasts to [..., L, S]; returns [..., L, E] in the query's dtype. With is_causal query i attends to keys 0 to i;
    with enable_gqa each head of key and value [..., H', S, D] serves H/H' heads of the query, one after the other.
    Products and softmax are computed in float32 (float64 for float64). Queries are taken a chunk at a time, MAX_SCORES
    scores at most. NotImplementedError for dropout, which belongs to training.
    """
    if dropout_p:
        raise NotImplementedError(f"quantized attention has no dropout_p (given {dropout_p}); call eval() on the denoiser")
    if is_causal and attn_mask is not None:
        raise ValueError("attention takes attn_mask or is_causal, not both")
    dtype = query.dtype
    query, key, value = (_widen(quantize_tokens(tensor, bits)) for tensor in (query, key, value))
    query.mul_(query.shape[-1] ** -0.5 if scale is None else scale)
    if enable_gqa:
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], dim=-3) for each in (key, value))
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
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


class _QuantizingForward:
    """The forward of `denoiser`, attention in it quantized to `bits`; None: as it was.

    It stands in the denoiser's own attributes in place of the forward that it calls, below accelerate's hooks where there
    are any. Another library that takes its own hooks off from beneath takes this off as well: a hook after the forward
    notices, and puts it back. What it refers to copies and pickles with the denoiser. The first forward tells which
    attention stays float.
    """

    def __init__(self, denoiser):
        self.denoiser = denoiser
        self.bits = None
        self.inner = None  # None: the class's own forward
        self.has_told = False
        self.has_run = False  # since the last call of the denoiser
        self.handle = None  # of the hook after the forward

    @property
    def __signature__(self):
        return inspect.signature(self._inner())

    def __call__(self, *args, **kwargs):
        self.has_run = True
        if self.bits is None:
            return self._inner()(*args, **kwargs)
        with _QuantizedAttention(self.bits) as mode:
            if self.has_told or torch.compiler.is_compiling():
                return self._inner()(*args, **kwargs)
            with _telling_float_attention(self.denoiser, mode):
                output = self._inner()(*args, **kwargs)
        self.has_told = True
        return output

    def _inner(self):
        return self.inner or type(self.denoiser).forward.__get__(self.denoiser)

    def put_on(self):
        self._stand_in()
        self.handle = self.denoiser.register_forward_hook(self._make_sure, with_kwargs=True)

    def _make_sure(self, denoiser, args, kwargs, output):
        """After a call of the denoiser, if this was taken off: put it back, and its output in place of the other."""
        if not self.has_run and self.bits is not None and not self._stands():
            self._stand_in()
            output = denoiser.forward(*args, **kwargs)
        self.has_run = False
        return output

    def _stand_in(self):
        place, attributes = self._place(), vars(self.denoiser)
        inner = attributes.get(place)
        is_own = getattr(inner, "__func__", None) is type(self.denoiser).forward  # as accelerate leaves it: no need of it
        self.inner = None if is_own else inner
        attributes.update({place: self, "_quantizing_forward": self})

    def _stands(self):
        """Whether this is what the denoiser has, or beneath it: others may wrap it, and answer without asking it."""
        forward = vars(self.denoiser).get(self._place())
        while forward is not None and forward is not self:
            forward = getattr(forward, "__wrapped__", None)
        return forward is self

    def take_off(self):
        """Put the inner forward back; where another library has wrapped this one, it stays and changes nothing."""
        self.bits = None
        place, attributes = self._place(), vars(self.denoiser)
        if attributes.get(place) is not self:
            return
        self.handle.remove()
        del attributes["_quantizing_forward"], attributes[place]
        if self.inner is not None or place != "forward":
            attributes[place] = self._inner()

    def _place(self):
        """The attribute that holds the forward: accelerate's hooks call and put back the one that they keep."""
        return "_old_forward" if "_old_forward" in vars(self.denoiser) else "forward"


@contextlib.contextmanager
def _telling_float_attention(denoiser, mode):
    """Log, once the block has run through, which attention modules of the denoiser ran in it without a call of `mode`."""
    calls, stays_float = {}, {}  # module -> calls of `mode` before it ran; whether there were as many after it

    def before(module, _args):
        calls[module] = mode.calls

    def after(module, _args, _output):
        stays_float[module] = mode.calls == calls[module]

    handles = []
    for module in denoiser.modules():
        if "Attention" in type(module).__name__:
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    _tell(denoiser, [module for module in stays_float if stays_float[module]], len(stays_float), mode.calls)


def _tell(denoiser, floats, count, calls):
    if floats:
        names = Counter(map(_attention_name, floats))
        log.warning(
            "%d of %d attention modules keep float activations, since they do not call F.scaled_dot_product_attention: %s",
            *(len(floats), count, ", ".join(f"{number} {name}" for name, number in names.items())),
        )
    elif not calls:
        log.warning(
            "%s keeps float attention, if it has any: it does not call F.scaled_dot_product_attention",
            type(denoiser).__name__,
        )


def _attention_name(module):
    """Class of an attention module, and of its processor, which is what computes, where it has one."""
    name, processor = type(module).__name__, getattr(module, "processor", None)
    return name if processor is None else f"{name} with {type(processor).__name__}"


def set_activation_bits(denoiser, bits, simulated=False):
    """Quantize the activations of `denoiser` to `bits` (ACT_BITS); None: back to what it was. ValueError for other bits.

    Reaches the inputs of the layers that quant.layers.install has put in (they have `act_bits`), and in the denoiser's
    forward, of this denoiser alone, all that goes through F.scaled_dot_product_attention, whichever module calls it.
    Attention that does not (linear attention, processors of their own, other kernels) stays float; the first forward
    says so in the log.

    Packed linear layers multiply integers where the processor does so faster than floats. A denoiser that has such
    layers quantizes these alone, on any processor: its convolutions and attention stay float, which the log says, unless
    the quantization is to be `simulated` throughout.
    """
    if bits is not None and bits not in ACT_BITS:
        raise ValueError(f"activations take {' or '.join(map(str, ACT_BITS))} bits, or None, not {bits!r}")
    layers = [module for module in denoiser.modules() if hasattr(module, "act_bits")]
    packed = [layer for layer in layers if hasattr(layer, "codes")]
    for layer in layers:
        layer.act_bits = bits
    for layer in packed:
        layer.simulated = simulated
    in_integers = bool(packed) and not simulated
    if in_integers and bits is not None:
        log.info(
            "activations: the inputs of %d linear layers in %d bits; convolutions and attention stay float",
            *(sum(isinstance(layer, torch.nn.Linear) for layer in packed), bits),
        )
    forward = vars(denoiser).get("_quantizing_forward")
    if bits is None or in_integers:
        if forward is not None:
            forward.take_off()
        return
    if forward is None:
        forward = _QuantizingForward(denoiser)
        forward.put_on()
    forward.bits = bits
