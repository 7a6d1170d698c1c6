"""Layers whose state is the low-bit form: packed codes, what decodes them, and the bias. No float weight.

`QuantLinear` and `QuantConv1d/2d/3d` are subclasses of the float layers, so libraries that look for those find them.
Their state dictionary is the file format. For each part of the weight (one, but for weights that are split):

    codes   uint8 [C, row bytes]; a parameter, by which offloading finds what it is to move; see quant/packing.py
    table   scales [C] or [C, G] of UAQ, affine; centroids [k], [C, k] or [C, G, k] of K-Means; in the weights' precision
    zero    zero points of UAQ, integers, as the scales
    offset  offsets of affine quantization, as the scales
    values  in place of all these, the weights [C, ...] of a part that stays float while another does not

The names of a second part end in `_1`. A weight that stays float as a whole is a float layer's, not one of these. A weight
is decoded when the layer runs and let go after: by the operators of quant/kernels/products.py or, where those do not know
the form, as a tensor.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from quant.activations import quantize_channels, quantize_tokens
from quant.kernels import products
from quant.kernels.decode import decode
from quant.lazy_weight import LazyWeight, read_only
from quant.packing import pack_rows, row_bytes
from quant.quantizer import FLOAT
from quant.registry import quantizer

STATE_NAMES = {"scale": "table", "centroids": "table", "zero_point": "zero", "offset": "offset"}  # of parameters
HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


@dataclass(frozen=True)
class PackedPart:
    """How a part of a layer's weight is packed."""

    method: str  # the quantizer's word
    shape: tuple[int, ...]  # [C, ...] of the part
    suffix: str = ""  # of the names of its tensors

    @property
    def names(self):
        """Names in the layer of the codes and of the tables that decode them."""
        return ["values" + self.suffix] if self.is_float else ["codes" + self.suffix, *self.tables]

    @property
    def is_float(self):
        """Whether the part is held as it is."""
        return self.method == FLOAT

    @property
    def tables(self):
        """{name in the layer: name among a quantizer's parameters}."""
        return {STATE_NAMES[parameter] + self.suffix: parameter for parameter in self.quantizer.tables}

    @property
    def quantizer(self):
        """The quantizer that the part's method names."""
        return quantizer(self.method)

    @property
    def count(self):
        """Weights per output channel."""
        return torch.Size(self.shape).numel() // self.shape[0]


def packed_parts(shape, methods, inputs=(None,)):
    """The parts of a weight [C, ...] under one method each; `inputs` are their input channels, None the whole weight."""
    parts = []
    for number, (method, channels) in enumerate(zip(methods, inputs, strict=True)):
        width = shape[1] if channels is None else channels[1] - channels[0]
        parts.append(PackedPart(method, (shape[0], width, *shape[2:]), f"_{number}" if number else ""))
    return tuple(parts)


class PackedLayer:
    """What the packed layers share.

    Made from a float layer, whose geometry, bias and hooks it takes, its packed tensors on the meta device until
    `fill`ed or loaded. Called with a float layer's own arguments the class makes a float layer, as PEFT expects of
    `type(layer)(...)`.
    """

    float_class: type[nn.Module]
    geometry: tuple[str, ...]

    def __new__(cls, *args, **kwargs):
        if (args or kwargs) and not (args and isinstance(args[0], nn.Module)):
            return cls.float_class(*args, **kwargs)
        return super().__new__(cls)

    def __init__(self, layer, parts):
        nn.Module.__init__(self)
        for name in self.geometry:
            setattr(self, name, getattr(layer, name))
        for name in HOOKS:
            setattr(self, name, getattr(layer, name))
        self.register_parameter("bias", layer.bias)  # first: models ask for the dtype of their first parameter
        self.train(layer.training)
        self.parts = parts
        self.act_bits, self.simulated = getattr(layer, "act_bits", None), getattr(layer, "simulated", False)
        self.compute_dtype = layer.weight.dtype
        # Looked up once, not at each call, where a compiled graph would have to look into the registry.
        self._decoders = tuple((p.suffix, p.quantizer.bits, p.count, p.quantizer.group or 0, p.shape) for p in parts)
        for part in parts:
            self._register_empty(part)

    def _register_empty(self, part):
        if part.is_float:
            values = torch.empty(part.shape, dtype=self.compute_dtype, device="meta")
            self.register_parameter("values" + part.suffix, nn.Parameter(values, requires_grad=False))
            return
        packed = torch.empty(part.shape[0], row_bytes(part.count, part.quantizer.bits), dtype=torch.uint8, device="meta")
        self.register_parameter("codes" + part.suffix, nn.Parameter(packed, requires_grad=False))
        for name in part.tables:
            dtype = torch.int8 if name.startswith("zero") else self.compute_dtype
            self.register_buffer(name, torch.empty(part.quantizer.table_shape(part.shape), dtype=dtype, device="meta"))

    @torch.no_grad()
    def fill(self, part, weight, parameters):
        """Pack `weight` [C, ...], the part's float weight, under `parameters` {name: tensor} of its method."""
        if part.is_float:
            values = nn.Parameter(weight.to(self.compute_dtype, copy=True), requires_grad=False)
            setattr(self, "values" + part.suffix, values)
            return
        codes = part.quantizer.encode(weight, parameters)
        packed = pack_rows(codes.reshape(len(codes), -1), part.quantizer.bits)
        setattr(self, "codes" + part.suffix, nn.Parameter(packed, requires_grad=False))
        for name, parameter in part.tables.items():
            setattr(self, name, parameters[parameter].to(weight.device))

    def decoded(self, dtype=None):
        """The weight [C, ...] that the codes stand for, in the tables' precision or in `dtype`."""
        parts = [self._decoded_part(*decoder) for decoder in self._decoders]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return weight if dtype is None else weight.to(dtype)

    def _decoded_part(self, suffix, bits, count, group, shape):
        if not bits:
            return getattr(self, "values" + suffix)
        return decode(*self._packed(suffix), bits, count, group).view(shape)

    def _packed(self, suffix=""):
        """Codes, table and zero points or offsets (None for codebooks) of a part."""
        codes, table, zero, offset = (getattr(self, name + suffix, None) for name in ("codes", "table", "zero", "offset"))
        return codes, table, offset if zero is None else zero

    @property
    def weight(self):
        """The weight as a tensor that is decoded only if an operation asks for its values, and cannot be written to.

        In a graph being compiled it is decoded: what asks for its dtype alone leaves nothing of that in the graph.
        """
        return self.decoded(self.compute_dtype) if torch.compiler.is_compiling() else LazyWeight(self)

    @property
    def weight_shape(self):
        """Shape [C, ...] of the decoded weight, all parts together."""
        width = sum(part.shape[1] for part in self.parts)
        return torch.Size((self.parts[0].shape[0], width, *self.parts[0].shape[2:]))

    def __setattr__(self, name, value):
        if name == "weight":
            raise read_only()
        super().__setattr__(name, value)

    def __delattr__(self, name):
        if name == "weight":
            raise read_only()
        super().__delattr__(name)

    def register_parameter(self, name, param):
        """As PyTorch's; RuntimeError for a weight, which is decoded and cannot be replaced."""
        if name == "weight":
            raise read_only()
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Take tables in the precision that the state dictionary has them in, whatever this layer's are."""
        for name, table in self._buffers.items():
            given = state_dict.get(prefix + name)
            if torch.is_tensor(given) and given.is_floating_point() == table.is_floating_point():
                self._buffers[name] = table.to(given.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def tensors(self, part):
        """The codes and tables of a part, or its values."""
        return [getattr(self, name) for name in part.names]

    def forward(self, input):
        """With `act_bits`, of an input quantized to them if `simulated`, or else where products are of integers."""
        if self.act_bits is not None and self.simulated:
            input = self.quantize_input(input, self.act_bits)
        return self.compute(input)

    def _apply(self, fn, recurse=True):
        """Follow `.to` and the like; the tables keep their own precision through any cast."""
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, table in exact.items():
            if self._buffers[name].dtype != table.dtype:
                self._buffers[name] = table.to(self._buffers[name].device)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return self

    @torch.no_grad()
    def dequantized(self):
        """The float layer with the decoded weight, and this one's bias and hooks."""
        layer = self.float_class.__new__(self.float_class)
        nn.Module.__init__(layer)
        for name in (*self.geometry, *HOOKS):
            setattr(layer, name, getattr(self, name))
        layer.weight = nn.Parameter(self.decoded(self.compute_dtype), requires_grad=False)
        layer.register_parameter("bias", self.bias)
        return layer.train(self.training)


CONVOLUTION = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "transposed",
    "output_padding",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)


class _PackedConvolution(PackedLayer):
    geometry = CONVOLUTION
    quantize_input = staticmethod(quantize_channels)

    def compute(self, input):
        if len(self._decoders) > 1 or isinstance(self.padding, str):
            return self._conv_forward(input, self.decoded(input.dtype), self.bias)
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, self.padding_mode), (0,) * len(padding)
        ((_, bits, _, group, shape),) = self._decoders
        how = shape, self.stride, padding, self.dilation, self.groups
        return products.convolution(input, *self._packed(), bits, group, self.bias, *how)


class QuantLinear(PackedLayer, nn.Linear):
    """A linear layer whose weight [C, n] is held as codes; activations are quantized per token."""

    float_class, geometry = nn.Linear, ("in_features", "out_features")
    quantize_input = staticmethod(quantize_tokens)

    def compute(self, input):
        """input [..., n] times the decoded weight [C, n], plus the bias: [..., C], in the input's dtype."""
        in_integers = self.act_bits is not None and not self.simulated
        if len(self._decoders) > 1:
            input = quantize_tokens(input, self.act_bits) if in_integers else input
            return F.linear(input, self.decoded(input.dtype), self.bias)
        ((_, bits, _, group, _),) = self._decoders
        if in_integers and not group:
            return products.linear_a8(input, *self._packed(), bits, self.act_bits, self.bias)
        input = quantize_tokens(input, self.act_bits) if in_integers else input
        return products.linear(input, *self._packed(), bits, group, self.bias)


class QuantConv1d(_PackedConvolution, nn.Conv1d):
    """A convolution over [N, C, L] whose weight is held as codes."""

    float_class = nn.Conv1d


class QuantConv2d(_PackedConvolution, nn.Conv2d):
    """A convolution over [N, C, H, W] whose weight is held as codes."""

    float_class = nn.Conv2d


class QuantConv3d(_PackedConvolution, nn.Conv3d):
    """A convolution over [N, C, T, H, W] whose weight is held as codes."""

    float_class = nn.Conv3d


PACKED_CLASSES = (QuantLinear, QuantConv1d, QuantConv2d, QuantConv3d)


def packed_form(layer, parts):
    """The packed layer, still empty, that takes the place of a float one."""
    return next(packed for packed in PACKED_CLASSES if isinstance(layer, packed.float_class))(layer, parts)


def module_places(model):
    """{id of a module: [(parent, name)]}: every place in `model` where it stands; by id, so that it can be let go."""
    places = {}
    for parent in model.modules():
        for name, module in parent._modules.items():  # `named_children` tells one of a module's names
            if module is not None:
                places.setdefault(id(module), []).append((parent, name))
    return places


def replace_module(places, module):
    """Put `module` at all of `places`, a list of (parent, name)."""
    for parent, name in places:
        setattr(parent, name, module)


def share(model, ties):
    """Let each packed layer of `ties` {path: path of the layer with the same weights} hold that layer's tensors."""
    for path, shared in ties.items():
        layer, original = model.get_submodule(path), model.get_submodule(shared)
        for name in [name for part in layer.parts for name in part.names]:
            setattr(layer, name, getattr(original, name))


def weight_bytes(model):
    """Bytes that the packed weights take: codes and what decodes them, once where layers share them."""
    tensors = {id(t): t for _, layer in packed_layers(model) for part in layer.parts for t in layer.tensors(part)}
    return sum(tensor.nbytes for tensor in tensors.values())


def packed_layers(model):
    """(path, layer) of the packed layers; one that stands at several places comes once for each."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedLayer):
            yield path, module
