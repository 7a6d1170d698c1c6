"""What a packed model says of itself (which layers, which methods, which ties), and taking its tensors back, checked.

The words of it, as a configuration file holds them:

    weights: {module path: method, or [[method, input channels], ...] of a split weight, of which a part may be `float`}
    ties: {module path: path of the layer with the same weights, which alone is in the file}

Every error here is an InputError that names the module or the tensor.
"""

import re

import torch
from torch import nn

from errors import InputError
from quant.affine_quantizers import ZERO_DTYPES
from quant.layers import PackedLayer, module_places, packed_form, packed_layers, packed_parts, replace_module
from quant.offload import put_hook, take_hook
from quant.quantizer import FLOAT, TABLE_DTYPES
from quant.registry import quantizer
from quant.slots import check_weight, is_weight_layer

DAMAGED = "the file is damaged or of another model"


def weights_of(model):
    """{module path: method, or [[method, input channels], ...]} of the packed layers."""
    told = {}
    for path, layer in packed_layers(model):
        parts = [[part.method, part.shape[1]] for part in layer.parts]
        told[path] = parts if len(parts) > 1 else parts[0][0]
    return told


def check_words(weights, ties):
    """Refuse what is not a dictionary of the kinds above, and methods that are unknown; None is nothing told."""
    for name, told in (("weights", weights), ("ties", ties)):
        if not isinstance(told, dict | None):
            raise InputError(f"quantization_config: {name} is {_shown(told)}, not names with what belongs to them")
    for path, told in (weights or {}).items():
        methods = [quantizer(method).name for method, _ in _method_pairs(path, told)]
        if set(methods) == {FLOAT}:
            raise InputError(f"quantization_config: {path} stays float, so is not to be packed; get the folder again")
    for path, shared in (ties or {}).items():
        if not isinstance(shared, str) or path not in (weights or {}) or shared not in weights or shared in ties:
            raise InputError(f"quantization_config: {path} cannot share the weights of {_shown(shared)}")


def _method_pairs(path, told):
    """[(method, input channels or None)] of what is told of a weight."""
    if isinstance(told, str):
        return [(told, None)]
    is_list = isinstance(told, list | tuple) and told
    if not is_list or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in told):
        raise InputError(f"quantization_config: {path} has {_shown(told)}, not a method")
    for method, width in told:
        if not isinstance(method, str) or not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise InputError(f"quantization_config: {path} has {_shown([method, width])}, not a method and channels")
    return told


def _shown(value):
    return repr(value)[:60]


def empty_layers(model, weights, ties):
    """{float layer of `model`: empty packed layer for its place}, of checked words; the model is left as it is.

    InputError, naming it, for a module that the model has not or that is no such layer, and for ties between layers
    that do not fit.
    """
    made, at = {}, {}
    for path, told in weights.items():
        layer = _float_layer(model, path)
        parts = _parts_told(path, told, layer.weight.shape)
        at[path] = made.setdefault(layer, packed_form(layer, parts))
        if at[path].parts != parts:
            raise InputError(f"quantization_config: {path} is one module with another that has another method")
    for path, shared in (ties or {}).items():
        if at[path].parts != at[shared].parts:
            raise InputError(f"quantization_config: {path} cannot share the weights of {shared}, which are of another kind")
    return made


def _float_layer(model, path):
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise InputError(f"quantization_config: {_shown(path)} is not in a {type(model).__name__}") from None
    if isinstance(layer, PackedLayer) or not is_weight_layer(layer):
        raise InputError(f"quantization_config: {_shown(path)} is a {type(layer).__name__}, which is not to be packed")
    check_weight(path, layer)
    return layer


def _parts_told(path, told, shape):
    pairs = _method_pairs(path, told)
    if len(pairs) == 1 and pairs[0][1] in (None, shape[1]):
        return packed_parts(shape, [pairs[0][0]])
    methods, widths = zip(*pairs, strict=True)
    if sum(widths) != shape[1]:
        raise InputError(f"quantization_config: {path} is split into {list(widths)} of its {shape[1]} input channels")
    ends = [sum(widths[: number + 1]) for number in range(len(widths))]
    return packed_parts(shape, methods, [(end - width, end) for width, end in zip(widths, ends, strict=True)])


def put_layers(model, layers):
    """Put the packed layers of {float layer: packed layer} into the model's places."""
    places = module_places(model)
    for layer, packed in layers.items():
        replace_module(places[id(layer)], packed)


def put_tensor(layer, name, value, full_name, device):
    """Put a tensor of a file into a packed layer, if it is of the kind and shape that belongs there.

    On the CPU codes stay the file's own, which may be mapped; tables are copied.
    """
    expected = getattr(layer, name)
    stem = name.partition("_")[0]
    dtypes = {"codes": (torch.uint8,), "zero": ZERO_DTYPES}.get(stem, TABLE_DTYPES)
    if value.shape != expected.shape or value.dtype not in dtypes:
        found, wanted = f"{value.dtype} {list(value.shape)}", f"{dtypes[0]} {list(expected.shape)}"
        raise InputError(f"{full_name}: is {found}, not {wanted} or the like; {DAMAGED}")
    if stem == "codes":
        setattr(layer, name, nn.Parameter(value.to(device), requires_grad=False))
    elif stem == "values":
        setattr(layer, name, nn.Parameter(value.to(device, layer.compute_dtype, copy=True), requires_grad=False))
    else:
        setattr(layer, name, value.to(device, copy=True))


def packed_names(model):
    """Names in the state dictionary of all packed layers' codes and tables."""
    return [f"{path}.{name}" for path, layer in packed_layers(model) for part in layer.parts for name in part.names]


def is_packed_name(name):
    """Whether a name in a state dictionary can be that of a packed layer's codes, tables or values."""
    return re.fullmatch(r"(codes|table|zero|offset|values)(_\d+)?", name.rpartition(".")[2]) is not None


def is_codes_name(name):
    """Whether a name in a state dictionary can be that of codes, which every packed layer has."""
    return re.fullmatch(r"codes(_\d+)?", name.rpartition(".")[2]) is not None


def tied_names(model, ties):
    """Names in the state dictionary that a file has not: of tensors that are another layer's."""
    return {name for name in packed_names(model) if name.rpartition(".")[0] in (ties or {})}


def check_tables(layers):
    """Refuse tables of `layers`, pairs (path, packed layer), that no fit can have made."""
    for path, layer in layers:
        for part in layer.parts:
            parameters = {parameter: getattr(layer, name) for name, parameter in part.tables.items()}
            if any(tensor.is_meta for tensor in parameters.values()):
                raise InputError(f"{path}: its table is not in the files; get the whole folder")
            if not part.quantizer.check(parameters, torch.Size(part.shape)):
                raise InputError(f"{path}: its {part.method} table is damaged; get the folder again")


def dequantize(model):
    """Put float layers with the decoded weights in the place of the packed ones, under the same offloading hooks."""
    places = module_places(model)
    for layer in dict.fromkeys(layer for _, layer in packed_layers(model)):
        hook = take_hook(layer)
        new = layer.dequantized()
        put_hook(new, hook)
        replace_module(places[id(layer)], new)


def told_sizes(model, ties, precision_bits):
    """{precision_bits, avg_bits} of the packed weights, scales and codebooks counted, tied ones once."""
    avg_bits, _ = size_of((layer for path, layer in packed_layers(model) if path not in (ties or {})), precision_bits)
    return {"precision_bits": precision_bits, "avg_bits": round(avg_bits, 4)}


def size_of(layers, precision_bits):
    """(average bits, bytes) of packed layers' weights by their shapes, scales and codebooks counted in that precision."""
    parts = [part for layer in layers for part in layer.parts]
    size_bytes = sum(part.quantizer.size_bytes(torch.Size(part.shape), precision_bits) for part in parts)
    return 8 * size_bytes / sum(torch.Size(part.shape).numel() for part in parts), size_bytes
