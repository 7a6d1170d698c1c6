"""What stands in the denoiser in place of a float layer: the same layer, its weight quantized.

Each layer keeps its float original, in the family's precision, and the method in force; a new
method is always computed from the original, so any number of changes leaves no drift. `pack` turns
a layer into its low-bit form: packed codes and their scales or centroids, decoded when it runs, and
no float weight.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.layers import find_slots
from quant import methods
from quant.packing import pack_codes, unpack_codes


class QuantLayer:
    """What QuantLinear, QuantConv1d and QuantConv2d share; `wrap` makes one from a float layer."""

    original: torch.Tensor  # float weight in the family's precision
    method: str | None  # None: full precision

    @classmethod
    def wrap(cls, layer, precision):
        """The quantizable form of `layer`, which shares its parameters, hooks and settings."""
        wrapped = cls.__new__(cls)
        wrapped.__dict__ = layer.__dict__
        wrapped.original = layer.weight.detach().to(precision, copy=True)
        wrapped.method = None
        return wrapped

    @torch.no_grad()
    def set_method(self, name, parameters=None):
        """Put the weight under the method `name`; None puts the float weight back."""
        if self.is_packed:
            raise RuntimeError("this layer is packed: its float weight is gone; load the model again")
        if name is None:
            self.weight.copy_(self.original)
        else:
            on_device = {key: value.to(self.original.device) for key, value in parameters.items()}
            self.weight.copy_(methods.apply(name, self.original, on_device))
        self.method = name

    @torch.no_grad()
    def pack(self, parameters):
        """Keep only packed codes and the parameters of the method in force; there is no way back."""
        on_device = {key: value.to(self.original.device) for key, value in parameters.items()}
        codes = methods.quantize(self.method, self.original, on_device)
        self.packed_shape = codes.shape
        self.register_buffer("codes", pack_codes(codes, methods.METHODS[self.method].bits))
        for name in methods.decoding_parameters(self.method):
            self.register_buffer(name, on_device[name])
        del self.weight
        del self.original

    @property
    def is_packed(self):
        return "codes" in self._buffers

    @property
    def weight_bytes(self):
        if not self.is_packed:
            return self.weight.nbytes
        return sum(self._buffers[name].nbytes for name in ("codes", *methods.decoding_parameters(self.method)))

    def effective_weight(self, dtype):
        """The weight to compute with: as it stands, or decoded from the packed codes."""
        if not self.is_packed:
            return self.weight
        codes = unpack_codes(self.codes, methods.METHODS[self.method].bits, self.packed_shape.numel())
        return methods.dequantize(self.method, codes.view(self.packed_shape), self._buffers).to(dtype)

    def _apply(self, fn, recurse=True):
        """Follow the layer to another device, but keep what weights are computed from through any cast."""
        names = methods.decoding_parameters(self.method) if self.is_packed else ()
        exact = {name: self._buffers[name] for name in names}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            self._buffers[name] = tensor.to(self.codes.device)
        if not self.is_packed:
            self.original = self.original.to(self.weight.device)
        return self


class QuantLinear(QuantLayer, nn.Linear):
    def forward(self, input):
        return F.linear(input, self.effective_weight(input.dtype), self.bias)


class QuantConv1d(QuantLayer, nn.Conv1d):
    def forward(self, input):
        return self._conv_forward(input, self.effective_weight(input.dtype), self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    def forward(self, input):
        return self._conv_forward(input, self.effective_weight(input.dtype), self.bias)


QUANT_CLASSES = {nn.Linear: QuantLinear, nn.Conv1d: QuantConv1d, nn.Conv2d: QuantConv2d}


def install(denoiser, family):
    """Replace every weight layer of the denoiser in place; returns the layers {key: layer}.

    The denoiser keeps its class and computes as before until a configuration is applied.
    """
    layers = {}
    for key, slot in find_slots(denoiser, family).items():
        layer = denoiser.get_submodule(slot.module_path)
        if not isinstance(layer, QuantLayer):
            layer = next(new for old, new in QUANT_CLASSES.items() if isinstance(layer, old)).wrap(layer, family.dtype)
            parent, _, name = slot.module_path.rpartition(".")
            setattr(denoiser.get_submodule(parent), name, layer)
        layers[key] = layer
    return layers


def weight_bytes(denoiser):
    """Bytes that the quantizable weights take now: codes and what decodes them once packed."""
    return sum(layer.weight_bytes for layer in denoiser.modules() if isinstance(layer, QuantLayer))
