"""Quantized denoisers as diffusers' artefacts: saved by `save_pretrained`, loaded by `from_pretrained`.

diffusers has no call by which a third party enters a quantizer, so `register` adds ours to its two tables; importing
`quant` does it. A saved denoiser has the state of its packed layers (see quant/layers.py) in its safetensors files and
this in its `config.json`:

    quantization_config: {quant_method: "qua2sedimo", version,
        weights: {module path: method, or [[method, input channels], ...] of a split weight},
        ties: {module path: path of the layer with the same weights, which alone is in the file},
        precision_bits, avg_bits, made_with}

Loading replaces the layers while the model is on the meta device, so float weights never stand. On the CPU codes stay
mapped from the file. With `from_pretrained(..., quantization_config=Qua2SeDiMoConfig("kmeans-4"))` a float model is
fitted and packed layer by layer as its files are read.
"""

import enum
import re
from collections import OrderedDict

import diffusers
import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from errors import InputError
from quant.layers import PackedLayer, module_places, packed_form, packed_layers, packed_parts, replace_module, share
from quant.registry import quantizer
from quant.slots import is_weight_layer

VERSION = 1


class QuantMethod(enum.StrEnum):  # diffusers asks for `.value`, JSON for a string
    QUA2SEDIMO = "qua2sedimo"


class Qua2SeDiMoConfig(QuantizationConfigMixin):
    """How a model of diffusers' is quantized, or was.

    `method`: the quantizer of every weight when a float model is quantized on loading. `modules_to_not_convert`: module
    paths, or the beginnings of such, to leave in float. The rest is of a saved model; see this module's text.
    """

    def __init__(
        self, method=None, modules_to_not_convert=None, weights=None, ties=None, version=VERSION, quant_method=None, **notes
    ):
        self.quant_method = QuantMethod.QUA2SEDIMO
        if version != VERSION:
            raise InputError(f"quantization_config: version {version}, this program reads {VERSION}")
        for word in [method] if method is not None else []:
            quantizer(word)  # refuses an unknown one
        self.method, self.modules_to_not_convert, self.version = method, modules_to_not_convert, version
        self.weights, self.ties = weights, ties
        self.notes = notes

    def to_dict(self):
        """The entries as JSON holds them, what is unset left out."""
        told = {name: value for name, value in self.__dict__.items() if value is not None and name != "notes"}
        return told | self.notes | {"quant_method": self.quant_method.value}

    def to_diff_dict(self):
        return self.to_dict()

    def leaves_out(self, path):
        """Whether the module at `path` is to stay float."""
        return any(f"{path}.".startswith(f"{left}.") for left in self.modules_to_not_convert or ())


class Qua2SeDiMoQuantizer(DiffusersQuantizer):
    """What diffusers' `from_pretrained` and `save_pretrained` call."""

    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False
    is_compileable = True

    @property
    def supports_parallel_loading(self):
        return self.pre_quantized

    def get_cuda_warm_up_factor(self):
        return 2 if self.pre_quantized else 8

    def update_missing_keys(self, model, missing_keys, prefix):
        """Tied tensors are in the file once; every other packed tensor has to be there."""
        tied = [f"{path}." for path in self.quantization_config.ties or {}]
        packed = set(_packed_names(model))
        lost = [key for key in missing_keys if key in packed and not key.startswith(tuple(tied))]
        if lost:
            raise InputError(f"the quantized model's files lack {len(lost)} tensors, first {lost[0]}; get the whole folder")
        return [key for key in missing_keys if key not in packed]

    def _process_model_before_weight_loading(self, model, keep_in_fp32_modules=(), **kwargs):
        self.kept = tuple(keep_in_fp32_modules or ())
        if not self.pre_quantized:
            self.places = module_places(model)
            return
        replace_by_empty(model, self.quantization_config)
        for path, layer in packed_layers(model):
            if set(self.kept) & set(path.split(".")):
                layer.compute_dtype = torch.float32

    def check_if_quantized_param(self, model, param_value, param_name, state_dict, **kwargs):
        path, _, name = param_name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, PackedLayer):
            return name != "bias"
        return not self.pre_quantized and name == "weight" and self._converts(path, module)

    def _converts(self, path, module):
        kept = set(self.kept) & set(path.split("."))
        return is_weight_layer(module) and not kept and not self.quantization_config.leaves_out(path)

    def check_quantized_param_shape(self, param_name, current_param, loaded_param):
        expected, found = list(current_param.shape), list(loaded_param.shape)
        raise InputError(f"{param_name}: has shape {found}, not {expected}; the file is damaged or of another model")

    def create_quantized_param(self, model, param_value, param_name, target_device, state_dict, *args, **kwargs):
        path, _, name = param_name.rpartition(".")
        value, module = state_dict[param_name], model.get_submodule(path)  # as the file has it: `param_value` is cast
        if isinstance(module, PackedLayer):
            _load_packed(module, name, value, param_name, target_device)
        else:
            packed = _fit_and_pack(path, module, value.to(target_device), param_value.dtype, self.quantization_config.method)
            replace_module(self.places[id(module)], packed)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            share(model, self.quantization_config.ties or {})
            _check_tables(model)
        else:
            self.quantization_config.weights = weights_of(model)
        finish(model, self.quantization_config)

    def get_state_dict_and_metadata(self, state_dict, safe_serialization=False):
        """Leave tied tensors out: the file has them once."""
        tied = tuple(f"{path}." for path in self.quantization_config.ties or {})
        kept = {name: v for name, v in state_dict.items() if not (name.startswith(tied) and _is_packed_name(name))}
        return kept, {}

    def _dequantize(self, model):
        dequantize(model)
        model.register_to_config(quantization_config=None)
        return model


def register():
    """Enter the quantizer in diffusers' tables, and the configuration in transformers', which pipelines ask too."""
    for table, entry in (
        ("AUTO_QUANTIZER_MAPPING", Qua2SeDiMoQuantizer),
        ("AUTO_QUANTIZATION_CONFIG_MAPPING", Qua2SeDiMoConfig),
    ):
        if not isinstance(getattr(auto, table, None), dict):
            raise ImportError(f"diffusers {diffusers.__version__} has no {table}; this program knows 0.36 to 0.42")
        getattr(auto, table)[QuantMethod.QUA2SEDIMO.value] = entry
    from transformers.quantizers import auto as transformers_auto

    transformers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QuantMethod.QUA2SEDIMO.value, Qua2SeDiMoConfig)


def attach(model, ties, **notes):
    """Make a model of diffusers' whose layers were packed in place one that saves as if it were loaded packed."""
    configuration = Qua2SeDiMoConfig(weights=weights_of(model), ties=ties or None, **notes)
    model.hf_quantizer = Qua2SeDiMoQuantizer(configuration, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, configuration.quant_method
    finish(model, configuration)


def finish(model, configuration):
    """Give a packed model what it has beside its layers: configuration, no gradients, a state dictionary for PEFT."""
    model.requires_grad_(False)
    model.register_to_config(quantization_config=configuration)
    if _with_lazy_weights not in getattr(model, "_state_dict_hooks", {}).values():
        model._register_state_dict_hook(_with_lazy_weights)


def weights_of(model):
    """{module path: method, or [[method, input channels], ...]} of the packed layers."""
    told = {}
    for path, layer in packed_layers(model):
        parts = [[part.method, part.shape[1]] for part in layer.parts]
        told[path] = parts if len(parts) > 1 else parts[0][0]
    return told


def replace_by_empty(model, configuration):
    """Put empty packed layers in the place of the weight layers that a saved configuration names.

    InputError, naming it, for a module that the model has not or that is no such layer, and for an unknown method.
    """
    places = module_places(model)
    for path, told in (configuration.weights or {}).items():
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            raise InputError(f"quantization_config: {path} is not in a {type(model).__name__}") from None
        if isinstance(layer, PackedLayer):
            continue  # one that stands at several places
        if not is_weight_layer(layer):
            raise InputError(f"quantization_config: {path} is a {type(layer).__name__}, which has no weight to quantize")
        replace_module(places[id(layer)], packed_form(layer, _parts_told(path, told, layer.weight.shape)))


def _parts_told(path, told, shape):
    pairs = [[told, shape[1]]] if isinstance(told, str) else told
    try:
        methods, widths = [str(pair[0]) for pair in pairs], [int(pair[1]) for pair in pairs]
    except (TypeError, ValueError, IndexError, KeyError):
        raise InputError(f"quantization_config: {path} has {told!r}, not a method") from None
    if not widths or min(widths) < 1 or sum(widths) != shape[1]:
        raise InputError(f"quantization_config: {path} is split into {widths} of its {shape[1]} input channels")
    for method in methods:
        quantizer(method)
    if len(widths) == 1:
        return packed_parts(shape, methods)
    ends = [sum(widths[: number + 1]) for number in range(len(widths))]
    return packed_parts(shape, methods, [(end - width, end) for width, end in zip(widths, ends, strict=True)])


def _load_packed(layer, name, value, full_name, device):
    """Put a tensor of the file into a packed layer; InputError if it is not of the kind and shape that belongs there."""
    expected = getattr(layer, name)
    is_table = name.startswith("table")
    is_kind = value.is_floating_point() if is_table else not value.is_floating_point() and not value.is_complex()
    if value.shape != expected.shape or not is_kind or (name.startswith("codes") and value.dtype != torch.uint8):
        found, wanted = f"{value.dtype} {list(value.shape)}", list(expected.shape)
        raise InputError(f"{full_name}: is {found}, not of shape {wanted}; the file is damaged or of another model")
    if name.startswith("codes"):
        setattr(layer, name, nn.Parameter(value.to(device), requires_grad=False))  # on the CPU still the file's own
    else:
        setattr(layer, name, value.to(device, copy=True))


@torch.no_grad()
def _fit_and_pack(path, layer, weight, dtype, method):
    """The packed layer of a float layer on the meta device, whose weight has been read."""
    try:
        parameters = quantizer(method).fit(weight)
    except ValueError as reason:
        raise InputError(f"{path}: {reason}") from None
    packed = packed_form(layer, packed_parts(weight.shape, [method]))
    packed.compute_dtype = dtype
    packed.fill(packed.parts[0], weight, parameters)
    return packed


def _packed_names(model):
    return [f"{path}.{name}" for path, layer in packed_layers(model) for part in layer.parts for name in part.names]


def _is_packed_name(name):
    return re.fullmatch(r"(codes|table|zero)(_\d+)?", name.rpartition(".")[2]) is not None


def _check_tables(model):
    """InputError, naming the layer, unless every table can be what a fit has made."""
    for path, layer in packed_layers(model):
        for part in layer.parts:
            parameters = {parameter: getattr(layer, name) for name, parameter in part.tables.items()}
            if any(tensor.is_meta for tensor in parameters.values()):
                raise InputError(f"{path}: its table is not in the files; get the whole folder")
            if not part.quantizer.check(parameters, torch.Size(part.shape)):
                raise InputError(f"{path}: its {part.method} table is damaged; get the folder again")


def dequantize(model):
    """Put float layers with the decoded weights in the place of the packed ones."""
    places = module_places(model)
    for layer in {layer for _, layer in packed_layers(model)}:
        replace_module(places[id(layer)], layer.dequantized())


class _StateDict(OrderedDict):
    """A state dictionary that also answers for `X.weight` of a packed layer X, which is not listed, so is not saved."""

    def __init__(self, *args, model=None):
        super().__init__(*args)
        self.model = model

    def __missing__(self, name):
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and self.model is not None:
            try:
                return self.model.get_submodule(path).weight
            except AttributeError:
                pass
        raise KeyError(name)

    def __reduce__(self):
        return OrderedDict, (list(self.items()),)


def _with_lazy_weights(model, state_dict, prefix, _metadata):
    """Hook of `state_dict()`: diffusers' LoRA loaders look weights up in it to learn their shapes."""
    if prefix or any(value.is_meta for name, value in state_dict.items() if _is_packed_name(name)):
        return None
    answering = _StateDict(state_dict, model=model)
    answering._metadata = getattr(state_dict, "_metadata", None)
    return answering
