"""Layers whose weight can be put under one method after another: the form for experiments, made by labelling stages.

The float layer stays what it is, with a float weight that holds quantized values. Each part of it has a method in force,
and a new one is always computed from the float original, in the precision P of the model, so any number of changes leaves
no drift. A weight that is at full precision is its own original; while it is not, the original waits in the host's memory,
once, whatever device the weight is on. Where no method is going to be changed, no original is kept.
"""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn

from quant.activations import quantize_channels, quantize_tokens
from quant.layers import CONVOLUTION, HOOKS, module_places, packed_form, packed_parts, replace_module
from quant.offload import at_home, put_hook, take_hook
from quant.quantizer import FLOAT
from quant.registry import quantizer

FULL_PRECISION = (None, FLOAT)  # under no method, or left float by a configuration


class WeightPart:
    """A slot's share of a layer's weight, all of it for most layers, and the method that it is under."""

    def __init__(self, layer, slot):
        self.layer, self.slot = layer, slot
        self.method = self.parameters = None  # full precision

    @torch.no_grad()
    def set_method(self, name, parameters=None):
        """Put the weight under the method `name`; None puts the float weight back."""
        with at_home(self.layer):
            original = self.original
            if name in FULL_PRECISION:
                self.slot.part_of(self.layer.weight).copy_(original)
            else:
                quantized = quantizer(name).apply(original, on_device(original.device, parameters))
                self.layer.keep_original()
                self.slot.part_of(self.layer.own_weight()).copy_(quantized)
            self.method, self.parameters = name, parameters
            self.layer.drop_original()

    @property
    def original(self):
        """The float weight, contiguous, in the precision P, on the device of the layer's weight."""
        layer = self.layer
        if layer.original is None and self.method not in FULL_PRECISION:
            raise RuntimeError("this layer was quantized for good: its float weight is gone; load the model again")
        float_weight = layer.weight.detach() if layer.original is None else layer.original
        return self.slot.part_of(float_weight).to(layer.weight.device, layer.precision).contiguous()


def on_device(device, parameters):
    """A quantizer's parameters {name: tensor}, moved to a device."""
    return {name: value.to(device) for name, value in parameters.items()}


class ExchangeableLayer:
    """What the exchangeable layers share; made from a float layer, whose parameters, hooks and settings they take."""

    original: torch.Tensor | None  # float weight on the host; None: the weight is it, or no one has it
    parts: list[WeightPart]
    act_bits: int | None  # None: inputs are taken as they are
    simulated = True  # quantized inputs are floats

    def __init__(self, layer, precision, keep_originals=True):
        hook = take_hook(layer)
        replaced = layer.__dict__.pop("forward", None)  # hooks leave the class's own behind
        if replaced is not None and getattr(replaced, "__func__", None) is not type(layer).forward:
            raise RuntimeError(f"the forward of a {type(layer).__name__} is replaced: quantize the model before that")
        nn.Module.__init__(self)
        for name in (*self.geometry, *HOOKS):
            setattr(self, name, getattr(layer, name))
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)
        self.train(layer.training)
        self.precision, self.keeps_original = precision, keep_originals
        self.original, self.parts, self.act_bits, self.shares_weight = None, [], None, False
        put_hook(self, hook)

    def own_weight(self):
        """The weight, to be written to: from now on apart from the same one of other modules, which stay as they are."""
        if self.shares_weight:
            self.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
            self.shares_weight = False
        return self.weight

    @property
    def is_float(self):
        """Whether every part of the weight is at full precision."""
        return all(part.method in FULL_PRECISION for part in self.parts)

    def keep_original(self):
        """Put the float weight aside before a part of it is overwritten, where another method may come."""
        if self.keeps_original and self.original is None:
            self.original = self.weight.detach().to("cpu", self.precision, copy=True)

    def drop_original(self):
        """Let the float weight put aside go where the weight is at full precision again and can hold it."""
        if self.is_float and _holds(self.weight, self.precision):
            self.original = None

    @torch.no_grad()
    def packed(self, methods, parameters):
        """The packed layer of this one's float weight: a method and its parameters {name: tensor} for each part.

        A float layer, where all parts are to stay float.
        """
        if set(methods) == {FLOAT}:
            return self._as_float()
        hook = take_hook(self)
        try:
            parts = packed_parts(self.weight.shape, methods, [part.slot.inputs for part in self.parts])
            packed = packed_form(self, parts)
            for mine, part, tables in zip(self.parts, parts, parameters, strict=True):
                original = mine.original
                packed.fill(part, original, on_device(original.device, tables))
        except BaseException:
            put_hook(self, hook)
            raise
        put_hook(packed, hook)
        return packed

    def _as_float(self):
        """The layer of PyTorch's own with this one's weight, bias and hooks."""
        hook = take_hook(self)
        kind = next(kind for kind in EXCHANGEABLE if isinstance(self, kind))
        layer = kind.__new__(kind)
        nn.Module.__init__(layer)
        for name in (*self.geometry, *HOOKS):
            setattr(layer, name, getattr(self, name))
        layer.weight = self.weight
        layer.register_parameter("bias", self.bias)
        put_hook(layer, hook)
        return layer.train(self.training)

    def forward(self, input):
        """The float layer's output; with `act_bits`, for an input that is quantized to them first.

        Where a configuration leaves the whole weight float, the input is left as it is, too.
        """
        if self.act_bits is not None and not (self.parts and all(part.method == FLOAT for part in self.parts)):
            input = self.quantize_input(input, self.act_bits)
        return self.compute(input)

    def _apply(self, fn, recurse=True):
        """Follow the layer to another device, but keep what weights are computed from through any cast."""
        before = self.weight.detach()
        super()._apply(fn, recurse)
        if self.is_float and _holds(before, self.precision) and not _holds(self.weight, self.precision):
            self.original = before.to("cpu", self.precision)
        return self


def _holds(weight, precision):
    """Whether the weight's own precision has all numbers of `precision`."""
    return torch.promote_types(weight.dtype, precision) == weight.dtype


class ExchangeableLinear(ExchangeableLayer, nn.Linear):
    """A linear layer; activations are quantized per token (Mills et al., 2025)."""

    geometry = ("in_features", "out_features")
    quantize_input = staticmethod(quantize_tokens)

    def compute(self, input):
        """input [..., n] times the weight [C, n], plus the bias: [..., C]."""
        return F.linear(input, self.weight, self.bias)


class _ExchangeableConvolution(ExchangeableLayer):
    geometry = CONVOLUTION
    quantize_input = staticmethod(quantize_channels)

    def compute(self, input):
        return self._conv_forward(input, self.weight, self.bias)


class ExchangeableConv1d(_ExchangeableConvolution, nn.Conv1d):
    """A convolution over [N, C, L]; activations are quantized per sample and channel."""


class ExchangeableConv2d(_ExchangeableConvolution, nn.Conv2d):
    """A convolution over [N, C, H, W]; activations are quantized per sample and channel."""


class ExchangeableConv3d(_ExchangeableConvolution, nn.Conv3d):
    """A convolution over [N, C, T, H, W]; activations are quantized per sample and channel."""


EXCHANGEABLE = {
    nn.Linear: ExchangeableLinear,
    nn.Conv1d: ExchangeableConv1d,
    nn.Conv2d: ExchangeableConv2d,
    nn.Conv3d: ExchangeableConv3d,
}


def exchangeable_form(layer, precision, keep_originals=True):
    """The exchangeable layer that takes the place of a float one."""
    chosen = next(new for old, new in EXCHANGEABLE.items() if isinstance(layer, old))
    return chosen(layer, precision, keep_originals)


def install(module, slots, precision, keep_originals=True):
    """Replace the weight layers of `slots` in `module` in place; returns {key: WeightPart}.

    The module keeps its class and computes as before until a method is set. Without `keep_originals` each weight takes
    one method, for good. Parameters need no gradients from now on: PyTorch multiplies by a weight that needs one in
    another order, so a packed layer, whose weight is decoded and needs none, would round differently.
    """
    module.requires_grad_(False)
    parts, made, places, owners = {}, set(), module_places(module), _owners(module)
    for slot in slots.values():
        layer = module.get_submodule(slot.module_path)
        if not isinstance(layer, ExchangeableLayer):
            old, layer = layer, exchangeable_form(layer, precision, keep_originals)
            replace_module(places[id(old)], layer)
            layer.shares_weight = owners[_memory(layer.weight)] > 1
            made.add(slot.module_path)
        if slot.module_path in made:
            layer.parts.append(WeightPart(layer, slot))
        parts |= {part.slot.key: part for part in layer.parts}
    return parts


def _owners(module):
    """{memory of a parameter: number of modules that have it}."""
    return Counter(_memory(each) for part in module.modules() for each in part._parameters.values() if each is not None)


def _memory(parameter):
    """What parameters have in common that are one: their memory, or themselves where they wait elsewhere or are empty."""
    return id(parameter) if parameter.is_meta or not parameter.numel() else parameter.data_ptr()
