"""From a module to its weight slots: every quantizable weight, its key, its parts and its tie.

What is particular to a model is data, in `SlotRules`; the rules' defaults suit any module.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from errors import InputError
from quant.file_keys import file_key

WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class SlotRules:
    """Which weights of a module are quantized, in which parts, and by which names. Patterns match whole module paths."""

    include: tuple[str, ...] | None = None  # patterns of the weight layers to take; None: all
    exclude: tuple[str, ...] = ()  # patterns of those to leave out
    # (pattern, boundary): weights with two quantizers; the boundary is the first part's input channels, a number or
    # what a function (module, path, layer) gives.
    splits: tuple[tuple[str, int | Callable], ...] = ()
    ties: tuple[tuple[str, str], ...] = ()  # (pattern, path of the layer whose weights it shares, with its groups)
    file_names: Callable = lambda module: {}  # module -> {module path: its name in the keys of files}

    def takes(self, path):
        """Whether the weight layer at `path` is quantized."""
        included = self.include is None or any(re.fullmatch(pattern, path) for pattern in self.include)
        return included and not any(re.fullmatch(pattern, path) for pattern in self.exclude)

    def shared_path(self, path):
        """Path of the layer whose weights the one at `path` shares; its own if none."""
        for pattern, replacement in self.ties:
            if re.fullmatch(pattern, path):
                return re.sub(pattern, replacement, path)
        return path


ANY_MODULE = SlotRules()


class WeightKey(NamedTuple):
    """Which weight it is: the path of its layer and, where the weight is split, the number of the part."""

    path: str  # of the module
    part: int = 0

    def __str__(self):
        return f"{self.path} (part {self.part})" if self.part else self.path


@dataclass(frozen=True)
class WeightSlot:
    """One weight, or part of one, that takes one quantizer."""

    key: WeightKey
    shape: torch.Size  # [C, ...], C output channels
    tie: WeightKey  # of the slot whose weights this one shares; its own key if none
    file_key: str  # what files name it by; see quant/file_keys.py
    inputs: tuple[int, int] | None = None  # the part's input channels, first to before last; None: the whole weight

    @property
    def module_path(self):
        """Path of the layer in the module."""
        return self.key.path

    def part_of(self, weight):
        """The slot's part of its layer's weight [C, ...], a view."""
        return weight if self.inputs is None else weight[:, slice(*self.inputs)]


def find_slots(module, rules=ANY_MODULE):
    """The slots {key: WeightSlot} of a module's weights, in module order. Works on the meta device."""
    names = rules.file_names(module)
    slots = {}
    for path, layer in weight_layers(module, rules):
        check_weight(path, layer)
        for part, inputs in enumerate(_parts(module, path, layer, rules)):
            key, tie = WeightKey(path, part), WeightKey(rules.shared_path(path), part)
            shape = torch.Size(_part_shape(layer.weight.shape, inputs))
            slots[key] = WeightSlot(key, shape, tie, file_key(names.get(path, path), part), inputs)
    return slots


def weight_layers(module, rules=ANY_MODULE):
    """(path, layer) of every layer whose weight is quantized, in module order."""
    for path, layer in module.named_modules():
        if is_weight_layer(layer) and rules.takes(path):
            yield path, layer


def is_weight_layer(module):
    """Whether a module is a Linear or a convolution that computes as PyTorch's, or one of quant's in its place.

    A subclass with a forward of its own may do more with its weight than multiply.
    """
    kind = next((kind for kind in WEIGHT_LAYERS if isinstance(module, kind)), None)
    return kind is not None and (type(module).forward is kind.forward or hasattr(module, "act_bits"))


def check_weight(path, layer):
    """InputError for a weight layer whose weight is not there yet, or that a hook replaces before every call."""
    if isinstance(layer.weight, nn.UninitializedParameter):
        raise InputError(f"{path}: has no weight yet; call the module once")
    computed = [name for name in layer._parameters if name.startswith("weight_")]
    if "weight" not in layer._parameters and computed:
        raise InputError(
            f"{path}: a hook makes its weight of {' and '.join(computed)} at every call (weight_norm, pruning); make it "
            "a plain one (remove_weight_norm, prune.remove), or leave it out"
        )


def ties_of(slots):
    """{key: key of the weight that it shares, its own if none}."""
    return {key: slot.tie for key, slot in slots.items()}


def free_keys(slots):
    """The keys that a configuration may choose: one of each tie."""
    return [key for key, slot in slots.items() if slot.tie == key]


def move_boundaries(slots, shapes):
    """The slots, each split weight cut where the `shapes` {key: shape} of its parts say.

    Published files cut some weights elsewhere; shapes that make no sense leave a weight as it is.
    """
    moved = dict(slots)
    for key, slot in slots.items():
        rest = slots.get(key._replace(part=1))
        shape = shapes.get(key, ())
        if key.part or rest is None or len(shape) != len(slot.shape) or not 0 < shape[1] < rest.inputs[1]:
            continue
        for part, inputs in ((slot, (0, shape[1])), (rest, (shape[1], rest.inputs[1]))):
            moved[part.key] = replace(part, inputs=inputs, shape=torch.Size(_part_shape(part.shape, inputs)))
    return moved


def in_part(slot, prefix):
    """Whether the slot's module is `prefix`, or in it; every module is in ""."""
    return not prefix or f"{slot.module_path}.".startswith(f"{prefix}.")


def _parts(module, path, layer, rules):
    """Input channels (first, before last) of the layer's parts; [None] if it is whole."""
    for pattern, boundary in rules.splits:
        if re.fullmatch(pattern, path):
            count = boundary if isinstance(boundary, int) else boundary(module, path, layer)
            return [(0, count), (count, layer.weight.shape[1])]
    return [None]


def _part_shape(shape, inputs):
    return shape if inputs is None else (shape[0], inputs[1] - inputs[0], *shape[2:])
