"""What stands in the denoiser in place of a float layer: the same layer, its weight quantized.

Each part of a layer's weight has a method in force, and a new one is always computed from the float original, in the
family's precision, so any number of changes leaves no drift. A weight that is at full precision is its own original;
while it is not, the original waits in the host's memory, once, whatever device the weight is on. Where no method is
going to be changed, no original is kept. `pack` turns a layer into its low-bit form: packed codes and their scales or
centroids, decoded when it runs, and no float weight.
"""

import torch
import torch.nn.functional as F
from torch import nn

from quant.activations import quantize_channels, quantize_tokens
from quant.offload import at_home, put_hook, take_hook
from quant.packing import pack_codes, unpack_codes
from quant.registry import quantizer
from quant.slots import find_slots


class WeightPart:
    """A slot's share of a layer's weight, all of it for most layers, and the method that it is under."""

    def __init__(self, layer, slot):
        self.layer, self.slot = layer, slot
        self.method = None  # full precision
        self.suffix = f"_{len(layer.parts)}" if layer.parts else ""  # of the names of its packed tensors

    @torch.no_grad()
    def set_method(self, name, parameters=None):
        """Put the weight under the method `name`; None puts the float weight back."""
        with at_home(self.layer):
            original, weight = self.original, self.slot.part_of(self.layer.weight)
            if name is None:
                weight.copy_(original)
            else:
                quantized = quantizer(name).apply(original, _on(original.device, parameters))
                self.layer.keep_original()
                weight.copy_(quantized)
            self.method = name
            self.layer.drop_original()

    @property
    def original(self):
        """The float weight, contiguous, in the family's precision, on the device of the layer's weight."""
        layer = self.layer
        if layer.is_packed or self.has_codes:
            raise RuntimeError("this layer is packed: its float weight is gone; load the model again")
        if layer.original is None and self.method is not None:
            raise RuntimeError("this layer was quantized for good: its float weight is gone; load the model again")
        float_weight = layer.weight.detach() if layer.original is None else layer.original
        return self.slot.part_of(float_weight).to(layer.weight.device, layer.precision).contiguous()

    @torch.no_grad()
    def pack(self, name, parameters):
        """Keep only packed codes of the method `name` and what decodes them; there is no way back."""
        with at_home(self.layer):
            original = self.original
            parameters = _on(original.device, parameters)
            codes = quantizer(name).encode(original, parameters)
            packed = pack_codes(codes, quantizer(name).bits)
            # A parameter, unlike the tables: by parameters offloading finds what it is to move.
            self.layer.register_parameter("codes" + self.suffix, nn.Parameter(packed, requires_grad=False))
            for table in quantizer(name).tables:
                self.layer.register_buffer(table + self.suffix, parameters[table])
            self.method = name
            if all(part.has_codes for part in self.layer.parts):
                del self.layer.weight
                self.layer.original = None

    @property
    def has_codes(self):
        return f"codes{self.suffix}" in self.layer._parameters

    def decoded(self):
        """The weight that the packed codes stand for, in the parameters' precision."""
        packed, *tables = (getattr(self.layer, name) for name in self.packed_names())
        codes = unpack_codes(packed, quantizer(self.method).bits, self.slot.shape.numel())
        names = quantizer(self.method).tables
        return quantizer(self.method).decode(codes.view(self.slot.shape), dict(zip(names, tables, strict=True)))

    def packed_names(self):
        """Names in the layer of the packed codes and of the tables that decode them."""
        return [name + self.suffix for name in ("codes", *quantizer(self.method).tables)]


def _on(device, parameters):
    return {name: value.to(device) for name, value in parameters.items()}


class QuantLayer:
    """What QuantLinear, QuantConv1d and QuantConv2d share; `wrap` makes one from a float layer."""

    precision: torch.dtype  # the family's, of originals
    keeps_original: bool  # whether a method may be changed for another
    original: torch.Tensor | None  # float weight on the host; None: the weight is it, or no one has it
    parts: list[WeightPart]
    act_bits: int | None  # None: inputs are taken as they are

    @classmethod
    def wrap(cls, layer, precision, keep_originals=True):
        """The quantizable form of `layer`, which shares its parameters, hooks and settings."""
        hook = take_hook(layer)
        replaced = layer.__dict__.pop("forward", None)  # hooks leave the class's own behind
        if replaced is not None and getattr(replaced, "__func__", None) is not type(layer).forward:
            raise RuntimeError(f"the forward of a {type(layer).__name__} is replaced: quantize the model before that")
        wrapped = cls.__new__(cls)
        wrapped.__dict__ = layer.__dict__
        wrapped.precision, wrapped.keeps_original = precision, keep_originals
        wrapped.original, wrapped.parts, wrapped.act_bits = None, [], None
        put_hook(wrapped, hook)
        return wrapped

    @property
    def is_packed(self):
        return "weight" not in self._parameters

    @property
    def is_float(self):
        return all(part.method is None for part in self.parts)

    @property
    def weight_bytes(self):
        if not self.is_packed:
            return self.weight.nbytes
        return sum(getattr(self, name).nbytes for part in self.parts for name in part.packed_names())

    def keep_original(self):
        """Put the float weight aside before a part of it is overwritten, where another method may come."""
        if self.keeps_original and self.original is None:
            self.original = self.weight.detach().to("cpu", self.precision, copy=True)

    def drop_original(self):
        """Let the float weight put aside go where the weight is at full precision again and can hold it."""
        if self.is_float and _holds(self.weight, self.precision):
            self.original = None

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
        exact, before = dict(self._buffers), self._parameters.get("weight")
        before = before if before is None else before.detach()
        super()._apply(fn, recurse)
        for name, table in exact.items():  # of a packed layer
            self._buffers[name] = table.to(self._buffers[name].device)
        lossy = before is not None and _holds(before, self.precision) and not _holds(self.weight, self.precision)
        if lossy and self.is_float:
            self.original = before.to("cpu", self.precision)
        return self


def _holds(weight, precision):
    """Whether the weight's own precision has all numbers of `precision`."""
    return torch.promote_types(weight.dtype, precision) == weight.dtype


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


class QuantConv3d(QuantLayer, nn.Conv3d):
    quantize_input = staticmethod(quantize_channels)

    def compute(self, input, weight):
        return self._conv_forward(input, weight, self.bias)


QUANT_CLASSES = {nn.Linear: QuantLinear, nn.Conv1d: QuantConv1d, nn.Conv2d: QuantConv2d, nn.Conv3d: QuantConv3d}


def install(denoiser, family, slots=None, keep_originals=True):
    """Replace every weight layer of the denoiser in place; returns the weights {key: WeightPart} of the slots.

    `slots` are the denoiser's, as a multiquantizer splits them. The denoiser keeps its class and computes as before
    until a configuration is applied. Without `keep_originals` each weight takes one method, for good. Its parameters
    need no gradients from now on: PyTorch multiplies by a weight that needs one in another order, so a packed layer,
    whose weight is decoded and needs none, would round differently.
    """
    denoiser.requires_grad_(False)
    slots = slots or find_slots(denoiser, family.slot_rules)
    wrapped = set()
    for slot in slots.values():
        path = slot.module_path
        layer = denoiser.get_submodule(path)
        if not isinstance(layer, QuantLayer):
            quantizable = next(new for old, new in QUANT_CLASSES.items() if isinstance(layer, old))
            layer = quantizable.wrap(layer, family.dtype, keep_originals)
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
