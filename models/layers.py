"""From a denoiser to its weight slots: every quantizable weight, its configuration key, its part and its tie."""

import re
from dataclasses import dataclass, replace

import torch
from torch import nn

from models.compvis import compvis_names

WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class WeightSlot:
    """One weight, or part of one, that takes one quantizer."""

    key: str  # in configurations: model.<module path>.weight_quantizer, or ..._0 of a split weight's second part
    module_path: str  # in the denoiser, diffusers' own name
    shape: torch.Size  # [C, ...], C output channels
    tie: str  # key of the slot whose weights this one shares; its own key if none
    inputs: tuple[int, int] | None = None  # the part's input channels, first to before last; None: the whole weight

    def part_of(self, weight):
        """The slot's part of its layer's weight [C, ...], a view."""
        return weight if self.inputs is None else weight[:, slice(*self.inputs)]


def key_of(name, part=0):
    """The configuration key of a module by its name in keys, and of its first or second part."""
    return f"model.{name}.weight_quantizer" + ("_0" if part else "")


def tied_key(key, family):
    """Key of the slot whose weights the slot of `key` shares; its own if none."""
    path = key.removeprefix("model.").removesuffix(".weight_quantizer")
    shared = _shared_path(path, family)
    return key if shared == path else key_of(shared)


def find_slots(denoiser, family):
    """The denoiser's slots {key: WeightSlot}, in module order. Works on the meta device."""
    names = KEY_NAMES[family.key_names](denoiser)
    slots = {}
    for path, layer in weight_layers(denoiser, family):
        for part, inputs in enumerate(_parts(denoiser, path, layer, family)):
            key, tie = (key_of(names.get(p, p), part) for p in (path, _shared_path(path, family)))
            shape = torch.Size(_part_shape(layer.weight.shape, inputs))
            slots[key] = WeightSlot(key, path, shape, tie, inputs)
    return slots


def weight_layers(denoiser, family):
    """(module path, layer) of every layer that is quantized, in module order."""
    for path, module in denoiser.named_modules():
        if isinstance(module, WEIGHT_LAYERS) and not any(re.fullmatch(skip, path) for skip in family.skips):
            yield path, module


def free_keys(slots):
    """The keys that a configuration may choose: one of each tie."""
    return [key for key, slot in slots.items() if slot.tie == key]


def move_boundaries(slots, shapes):
    """The slots, each split weight cut where the `shapes` {key: shape} of its parts say.

    Published files cut some weights elsewhere; shapes that make no sense leave a weight as it is.
    """
    moved = dict(slots)
    for key, slot in slots.items():
        rest = slots.get(f"{key}_0")
        shape = shapes.get(key, ())
        if rest is None or len(shape) != len(slot.shape) or not 0 < shape[1] < rest.inputs[1]:
            continue
        for part, inputs in ((slot, (0, shape[1])), (rest, (shape[1], rest.inputs[1]))):
            moved[part.key] = replace(part, inputs=inputs, shape=torch.Size(_part_shape(part.shape, inputs)))
    return moved


def in_part(slot, prefix):
    """Whether the slot's module is `prefix`, or in it; every module is in ""."""
    return not prefix or f"{slot.module_path}.".startswith(f"{prefix}.")


def _shared_path(path, family):
    for pattern, replacement in family.ties:
        if re.fullmatch(pattern, path):
            return re.sub(pattern, replacement, path)
    return path


def _parts(denoiser, path, layer, family):
    """Input channels (first, before last) of the layer's parts; [None] if it is whole."""
    for split in family.splits:
        if re.fullmatch(split.pattern, path):
            boundary = BOUNDARIES[split.boundary](denoiser, path, layer)
            return [(0, boundary), (boundary, layer.weight.shape[1])]
    return [None]


def _part_shape(shape, inputs):
    return shape if inputs is None else (shape[0], inputs[1] - inputs[0], *shape[2:])


def _half(_denoiser, _path, layer):
    return layer.weight.shape[1] // 2


def _hidden_channels(denoiser, path, _layer):
    """Channels of the hidden state that reaches a U-Net's up-block resnet, before a skip is concatenated."""
    below = denoiser.down_blocks[-1] if denoiser.mid_block is None else denoiser.mid_block
    resnets = [below.resnets[-1], *(resnet for block in denoiser.up_blocks for resnet in block.resnets)]
    before = resnets.index(denoiser.get_submodule(path.rpartition(".")[0])) - 1
    return resnets[before].conv1.weight.shape[0]


BOUNDARIES = {"half": _half, "hidden": _hidden_channels}
KEY_NAMES = {"diffusers": lambda denoiser: {}, "compvis": compvis_names}
