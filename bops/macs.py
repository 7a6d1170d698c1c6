"""Multiply-accumulates of a denoiser, layer by layer, from shapes on the meta device."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from quant.slots import WEIGHT_LAYERS

NORM_LAYERS = (nn.LayerNorm, nn.GroupNorm)


@dataclass
class Macs:
    """Multiply-accumulates of one denoiser call for one image."""

    layers: dict[str, int] = field(default_factory=dict)  # module path of a weight layer -> MACs
    norms: int = 0
    attention_qk: int = 0  # queries x keys
    attention_av: int = 0  # attention x values


def count_macs(denoiser, inputs):
    """Count on a meta-device `denoiser` called with the meta tensors `inputs` (keyword arguments).

    A normalisation counts one MAC per element, plus one if it has an affine part.
    """
    macs = Macs()
    handles = [
        module.register_forward_hook(_counter(macs, path))
        for path, module in denoiser.named_modules()
        if isinstance(module, (*WEIGHT_LAYERS, *NORM_LAYERS))
    ]
    try:
        with torch.no_grad(), _CountAttention(macs):
            denoiser(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return macs


def _counter(macs, path):
    def count(module, args, output):
        if isinstance(module, NORM_LAYERS):
            macs.norms += output.numel() * (1 + (module.weight is not None))
        else:
            per_output = module.weight.numel() // len(module.weight)
            macs.layers[path] = macs.layers.get(path, 0) + output.numel() * per_output

    return count


class _CountAttention(TorchFunctionMode):
    """Counts the two matrix products of every scaled dot-product attention."""

    def __init__(self, macs):
        super().__init__()
        self.macs = macs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]  # [..., T, D], [..., S, D], [..., S, V]
            scores = query.numel() // query.shape[-1] * key.shape[-2]  # batch x heads x T x S
            self.macs.attention_qk += scores * query.shape[-1]
            self.macs.attention_av += scores * value.shape[-1]
        return func(*args, **(kwargs or {}))
