"""Weights to fit: random ones in the real denoisers' own shapes, and the embedded models' trained ones.

Trained weights have heavy tails and scales that differ from channel to channel. The random ones are
Student-t with 5 degrees of freedom, each output channel times 0.03 x a log-normal factor (sigma 0.4).
"""

import numpy as np
import torch

from models import geometry
from models.components import quiet_loading
from models.families import FAMILIES
from models.pipelines import load_denoiser
from quant.model import QuantizedModel
from quant.slots import find_slots, free_keys, weight_layers

POOL = 2**24


def heavy_tailed(channels, width, seed=0, dtype=torch.float16):
    """Random weights [channels, width] with the tails and channel spread of trained ones."""
    rng = np.random.default_rng(seed)
    scale = 0.03 * rng.lognormal(0, 0.4, size=(channels, 1))
    return torch.from_numpy(rng.standard_t(5, size=(channels, width)) * scale).to(dtype)


def random_denoiser(name, **changes):
    """The family's own denoiser in its own precision, heavy-tailed random weights in every weight layer, all else zero.

    Layers are cut from one pool of 16.8 M draws, each from its own place, so that making them takes seconds.
    """
    family = FAMILIES[name]
    with torch.device("meta"):
        denoiser = geometry.build(name, **changes)
    with quiet_loading():
        denoiser = denoiser.to(family.dtype).to_empty(device="cpu")
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        tensor.data.zero_()
    rng = np.random.default_rng(0)
    pool = torch.from_numpy(rng.standard_t(5, size=POOL).astype(np.float32)).to(family.dtype)
    for _, layer in weight_layers(denoiser, family.slot_rules):
        weight, begin = layer.weight.data, int(rng.integers(POOL))
        flat = weight.view(-1)
        for start in range(0, len(flat), POOL):
            part = flat[start : start + POOL]
            first = min(POOL - begin, len(part))
            part[:first] = pool[begin : begin + first]
            part[first:] = pool[: len(part) - first]
        scale = torch.from_numpy(0.03 * rng.lognormal(0, 0.4, size=len(weight))).to(family.dtype)
        weight.mul_(scale.view(-1, *[1] * (weight.ndim - 1)))
    slots = find_slots(denoiser, family.slot_rules)
    for slot in slots.values():
        shared = denoiser.get_submodule(slots[slot.tie].module_path).weight
        denoiser.get_submodule(slot.module_path).weight.data.copy_(shared.data)
    return denoiser


def embedded_weights(name):
    """All fitted weights of the family's embedded model: {key: [C, ...]}."""
    family = FAMILIES[name]
    denoiser = load_denoiser(family, "embedded", torch.device("cpu"))
    model = QuantizedModel(denoiser, **family.quantization)
    return {key: model.weight(key) for key in free_keys(model.slots)}
