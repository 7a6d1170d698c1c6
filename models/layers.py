"""From a denoiser to its weight slots: every quantizable weight, its configuration key and its tie."""

import re
from dataclasses import dataclass

import torch
from torch import nn

WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class WeightSlot:
    """One weight that takes one quantizer."""

    key: str  # in configurations: model.<module path>.weight_quantizer
    module_path: str  # in the denoiser, diffusers' own name
    shape: torch.Size  # [C, ...], C output channels
    tie: str  # key of the slot whose weights this one shares; its own key if none


def key_of(module_path):
    return f"model.{module_path}.weight_quantizer"


def find_slots(denoiser, family):
    """The denoiser's slots {key: WeightSlot}, in module order. Works on the meta device."""
    return {
        key_of(path): WeightSlot(key_of(path), path, module.weight.shape, key_of(_shared_path(path, family)))
        for path, module in denoiser.named_modules()
        if isinstance(module, WEIGHT_LAYERS)
    }


def free_keys(slots):
    """The keys that a configuration may choose: one of each tie."""
    return [key for key, slot in slots.items() if slot.tie == key]


def _shared_path(path, family):
    for pattern, replacement in family.ties:
        if re.fullmatch(pattern, path):
            return re.sub(pattern, replacement, path)
    return path
