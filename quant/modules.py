"""What stands in the denoiser in place of a float layer: the same layer, its weight quantized.

Each layer keeps its float original, in the family's precision, and each part of its weight the method
in force; a new method is always computed from the original, so any number of changes leaves no drift.
`pack` turns a layer into its low-bit form: packed codes and their scales or centroids, decoded when it
runs, and no float weight.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.layers import find_slots
from quant import methods
from quant.activations import quantize_channels, quantize_tokens
from quant.packing import pack_codes, unpack_codes


class WeightPart:
    """A slot's share of a layer's weight, all of it for most layers, and the method that it is under."""

    def __init__(self, layer, slot):
        self.layer, self.slot = layer, slot
        self.method = None  # full precision
        self.suffix = f"_{len(layer.parts)}" if layer.parts else ""  # of the names of its packed buffers

    @torch.no_grad()
    def set_method(self, name, parameters=None):
        """Put the weight under the method `name`; None puts the float weight back."""
        if self.layer.is_packed:
            raise RuntimeError("this layer is packed: its float weight is gone; load the model again")
        weight, original = self.slot.part_of(self.layer.weight), self.original
        if name is None:
            weight.copy_(original)
        else:
            on_device = {key: value.to(original.device) for key, value in parameters.items()}
            weight.copy_(methods.apply(name, original, on_device))
        self.method = name

    @property
    def original(self):
        """The float weight, contiguous, in the family's precision."""
        return self.slot.part_of(self.layer.original).contiguous()

    @torch.no_grad()
    def pack(self, parameters):
        """Keep only packed codes and the parameters of the method in force; there is no way back."""
        original = self.original
        on_device = {key: value.to(original.device) for key, value in parameters.items()}
        codes = methods.quantize(self.method, original, on_device)
        packed = {"codes": pack_codes(codes, methods.METHODS[self.method].bits)}
        packed |= {name: on_device[name] for name in methods.decoding_parameters(self.method)}
        for name, tensor in packed.items():
            self.layer.register_buffer(name + self.suffix, tensor)
        if all(part.is_packed for part in self.layer.parts):
            del self.layer.weight
            del self.layer.original

    @property
    def is_packed(self):
        return f"codes{self.suffix}" in self.layer._buffers

    def decoded(self):
        """The weight that the packed codes stand for, in the parameters' precision."""
        parameters = {name.removesuffix(self.suffix): self.layer._buffers[name] for name in self.buffer_names()}
        codes = unpack_codes(parameters["codes"], methods.METHODS[self.method].bits, self.slot.shape.numel())
        return methods.dequantize(self.method, codes.view(self.slot.shape), parameters)

    def buffer_names(self):
        return [name + self.suffix for name in ("codes", *methods.decoding_parameters(self.method))]


class QuantLayer:
    """What QuantLinear, QuantConv1d and QuantConv2d share; `wrap` makes one from a float layer."""

    original: torch.Tensor  # float weight in the family's precision
    parts: list[WeightPart]
    act_bits: int | None  # None: inputs are taken as they are

    @classmethod
    def wrap(cls, layer, precision):
        """The quantizable form of `layer`, which shares its parameters, hooks and settings."""
        wrapped = cls.__new__(cls)
        wrapped.__dict__ = layer.__dict__
        wrapped.original = layer.weight.detach().to(precision, copy=True)
        wrapped.parts = []
        wrapped.act_bits = None
        return wrapped

    @property
    def is_packed(self):
        return any(part.is_packed for part in self.parts)

    @property
    def weight_bytes(self):
        if not self.is_packed:
            return self.weight.nbytes
        return sum(self._buffers[name].nbytes for part in self.parts for name in part.buffer_names())

    def effective_weight(self, dtype):
        """The weight to compute with: as it stands, or decoded from the packed codes."""
        if not self.is_packed:
            return self.weight
        decoded = [part.decoded() for part in self.parts]
        return (decoded[0] if len(decoded) == 1 else torch.cat(decoded, dim=1)).to(dtype)

    def forward(self, input):
        if self.act_bits is not None:
            input = self.quantize_input(input, self.act_bits)
        return self.compute(input, self.effective_weight(input.dtype))

    def _apply(self, fn, recurse=True):
        """Follow the layer to another device, but keep what weights are computed from through any cast."""
        names = [name for part in self.parts if part.is_packed for name in part.buffer_names()]
        exact = {name: self._buffers[name] for name in names}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            self._buffers[name] = tensor.to(self._buffers[name].device)
        if not self.is_packed:
            self.original = self.original.to(self.weight.device)
        return self


class QuantLinear(QuantLayer, nn.Linear):
    quantize_input = staticmethod(quantize_tokens)

    def compute(self, input, weight):
        return F.linear(input, weight, self.bias)


class QuantConv1d(QuantLayer, nn.Conv1d):
    quantize_input = staticmethod(quantize_channels)

    def compute(self, input, weight):
        return self._conv_forward(input, weight, self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    quantize_input = staticmethod(quantize_channels)

    def compute(self, input, weight):
        return self._conv_forward(input, weight, self.bias)


QUANT_CLASSES = {nn.Linear: QuantLinear, nn.Conv1d: QuantConv1d, nn.Conv2d: QuantConv2d}


def install(denoiser, family, slots=None):
    """Replace every weight layer of the denoiser in place; returns the weights {key: WeightPart} of the slots.

    `slots` are the denoiser's, as a multiquantizer splits them. The denoiser keeps its class and computes
    as before until a configuration is applied.
    """
    slots = slots or find_slots(denoiser, family)
    wrapped = set()
    for slot in slots.values():
        path = slot.module_path
        layer = denoiser.get_submodule(path)
        if not isinstance(layer, QuantLayer):
            layer = next(new for old, new in QUANT_CLASSES.items() if isinstance(layer, old)).wrap(layer, family.dtype)
            parent, _, name = path.rpartition(".")
            setattr(denoiser.get_submodule(parent), name, layer)
            wrapped.add(path)
        if path in wrapped:
            layer.parts.append(WeightPart(layer, slot))
    return {part.slot.key: part for layer in _quant_layers(denoiser) for part in layer.parts}


def _quant_layers(denoiser):
    return (layer for layer in denoiser.modules() if isinstance(layer, QuantLayer))


def weight_bytes(denoiser):
    """Bytes that the quantizable weights take now: codes and what decodes them once packed."""
    return sum(layer.weight_bytes for layer in _quant_layers(denoiser))
