"""Multiply-accumulates of a denoiser, layer by layer, from shapes on the meta device."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import nn
from torch.overrides import TorchFunctionMode

from quant.slots import WEIGHT_LAYERS

NORM_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, RMSNorm)
# Matrix products of two computed tensors, and where among a product's arguments the first of the two stands.
PRODUCTS = {torch.matmul: 0, torch.Tensor.matmul: 0, torch.Tensor.__matmul__: 0, torch.bmm: 0, torch.baddbmm: 1}


@dataclass
class Macs:
    """Multiply-accumulates of one denoiser call for one image."""

    layers: dict[str, int] = field(default_factory=dict)  # module path of a weight layer -> MACs
    norms: int = 0
    attention_qk: int = 0  # queries x keys
    attention_av: int = 0  # attention x values
    products: int = 0  # other products of computed tensors: linear attention, and processors that write out the softmax


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
        with torch.no_grad(), _CountProducts(macs):
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


class _CountProducts(TorchFunctionMode):
    """Counts the two matrix products of every scaled dot-product attention, in full where a mask leaves some out; others."""

    def __init__(self, macs):
        super().__init__()
        self.macs = macs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.count(*args, **kwargs)
        output = func(*args, **kwargs)
        if func in PRODUCTS:
            first = (*args, *kwargs.values())[PRODUCTS[func]]  # [..., T, D], the output [..., T, S]
            self.macs.products += output.numel() * first.shape[-1]
        return output

    def count(self, query, key, value, *_args, **_kwargs):
        """query [..., H, T, D], key [..., H', S, D], value [..., H', S, V]; H' < H where heads share keys (GQA)."""
        scores = query.numel() // query.shape[-1] * key.shape[-2]  # batch x H x T x S
        self.macs.attention_qk += scores * query.shape[-1]
        self.macs.attention_av += scores * value.shape[-1]
