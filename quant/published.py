"""Multiquantizer files of the published system, read into this project's entries.

Per weight, `<key>` being its file key, they hold `<key>.quant_params.<method>`: for K-Means the quantized weight itself, for
UAQ the scales and zero points stacked as [2, C, 1 ...]; and `<key>.loss_dict.<method>`, which is recomputed.
"""

import torch

from errors import InputError
from quant import uaq
from quant.entries import make_entry
from quant.registry import SEARCH_SPACE, quantizer
from quant.slots import find_slots, free_keys, in_part


def is_published(content):
    """Whether a checkpoint's content is a multiquantizer in the published format."""
    return isinstance(content, dict) and any(isinstance(k, str) and ".quant_params." in k for k in content)


def shapes(content):
    """{file key: shape of its weight}, as the K-Means tensors have it."""
    ending = ".quant_params.kmeans-4"
    return {k.removesuffix(ending): tuple(v.shape) for k, v in content.items() if k.endswith(ending) and torch.is_tensor(v)}


def check_keys(content, path, model):
    """Raise InputError, naming the first, if the file has weights that this denoiser has not, or the other way round.

    Weights that it has but does not quantize are passed over.
    """
    keys = dict.fromkeys(key.partition(".quant_params.")[0] for key in content if ".quant_params." in key)
    known = {slot.file_key for slots in (model.slots, find_slots(model.module)) for slot in slots.values()}
    unknown = [key for key in keys if ".weight_quantizer" in key and key not in known]
    if unknown:
        raise InputError(f"{path}: {len(unknown)} keys are not of this denoiser, first {unknown[0]}")
    for key in (model.slots[key].file_key for key in free_keys(model.slots)):
        for name in SEARCH_SPACE:
            if f"{key}.quant_params.{name}" not in content:
                raise InputError(f"{path}: has no {name} for {key}")


def convert(content, path, model):
    """Entries {key: entry} for the model's weights, which the file was made from.

    K-Means weights come out bit for bit; UAQ codes are rounded in the precision of its scales.
    """
    keys = free_keys(model.slots)
    return {key: _convert_slot(content, path, model.slots[key].file_key, model.weight(key)) for key in keys}


def _convert_slot(content, path, key, weight):
    parameters = {}
    for name in SEARCH_SPACE:
        tensor, method = content[f"{key}.quant_params.{name}"], quantizer(name)
        try:
            if not torch.is_tensor(tensor) or not tensor.is_floating_point() or not tensor.ndim:
                raise ValueError("is not a tensor of weights")
            parameters[name] = READERS[method.algorithm](tensor.to(weight.device), weight, method)
            if not method.check(parameters[name], weight.shape):
                raise ValueError("does not stand for finite weights")
        except ValueError as reason:
            raise InputError(f"{path}: {name} of {key} {reason}") from None
    return make_entry(weight, parameters)


def _read_uaq(tensor, weight, method):
    if tensor.shape[0] != 2 or tensor.numel() != 2 * len(weight):
        raise ValueError(f"has shape {list(tensor.shape)}, not [2, {len(weight)}, 1 ...]")
    scale, zero_point = tensor.reshape(2, -1)
    return {
        "scale": uaq.storable_scale(scale, weight.dtype),
        "zero_point": uaq.whole_numbers(zero_point.nan_to_num(0)),
    }


def _read_kmeans(tensor, weight, method):
    """Centroids of the quantized weight, and the boundaries that send each float weight to its own."""
    if tensor.shape != weight.shape:
        raise ValueError(f"has shape {list(tensor.shape)}, the weight {list(weight.shape)}")
    rows = method.rows_of(weight)
    values, order = rows.sort(dim=1)  # [R, n]
    quantized = tensor.to(weight.dtype).reshape(rows.shape).gather(1, order)
    steps = quantized.diff(dim=1)
    codes = torch.nn.functional.pad((steps != 0).cumsum(dim=1), (1, 0))  # [R, n], which run of equal values
    count = method.levels(weight.shape)
    if (steps < 0).any() or codes.max() >= count:
        raise ValueError(f"is not a clustering of this model's weights into {count} values")
    last = torch.nn.functional.pad(steps != 0, (0, 1), value=True)  # last weight of its run
    centroids = quantized[:, -1:].repeat(1, count)
    boundaries = torch.full_like(centroids, torch.inf)
    row = torch.arange(len(rows), device=rows.device)[:, None].expand_as(codes)
    centroids[row[last], codes[last]] = quantized[last]
    boundaries[row[last], codes[last]] = values[last]
    used = codes[:, -1:]
    boundaries.scatter_(1, used, torch.inf)  # no boundary above the last run
    boundaries = boundaries[:, :-1].contiguous()
    lead = method.lead(weight.shape)
    return {"centroids": centroids.reshape(*lead, count), "boundaries": boundaries.reshape(*lead, count - 1)}


READERS = {"mse": _read_uaq, "kmeans": _read_kmeans, "kmeans_all": _read_kmeans}  # by algorithm


def file_bytes(model, prefix=""):
    """Bytes of the tensors in a published file of a QuantizedModel, or of its modules in `prefix`.

    Per slot: four quantized weights (two K-Means at two bit widths), a scale and a zero point per
    output channel at two bit widths, six half-precision errors; no file overhead, and not the
    float weights and biases, which published files also hold.
    """
    element = model.precision_bits // 8
    slots = (slot for slot in model.slots.values() if in_part(slot, prefix))
    return sum(element * (4 * slot.shape.numel() + 4 * slot.shape[0]) + 6 * 2 for slot in slots)
