"""Packed denoisers that several tests share: those of the zoo and the six families' tiny ones."""

import functools
import math

import torch
from conftest import TINY, tiny, tiny_inputs, tiny_model
from safetensors.torch import load_file, save_file
from zoo import ZOO, denoisers

from quant.digests import NAME, with_digests
from quant.model import QuantizedModel
from quant.registry import SEARCH_SPACE

OTHERS = list(denoisers.CONFIGS)
NAMES = [*OTHERS, *(f"tiny_{name}" for name in TINY)]


def build(name):
    """The float denoiser by name, in float32."""
    return tiny(name.removeprefix("tiny_")) if name.startswith("tiny_") else ZOO[name].build_denoiser()


def inputs(name, denoiser):
    """Keyword arguments of one call of the denoiser."""
    if name.startswith("tiny_"):
        return tiny_inputs(name.removeprefix("tiny_"), denoiser)
    return ZOO[name].inputs(denoiser)


@torch.no_grad()
def predict(denoiser, arguments):
    """What one call of the denoiser gives, all samples in one tensor."""
    dtype = denoiser.dtype
    arguments = {name: _cast(value, dtype) for name, value in arguments.items()}
    sample = denoiser(**arguments, return_dict=False)[0]
    return torch.cat([part.flatten() for part in sample])


def _cast(value, dtype):
    if isinstance(value, list):
        return [_cast(each, dtype) for each in value]
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value


def quantized_model(name, denoiser):
    """The `QuantizedModel` of a denoiser: its family's, with splits and ties, or that of any."""
    if not name.startswith("tiny_"):
        return QuantizedModel(denoiser)
    return tiny_model(name.removeprefix("tiny_"), denoiser)


def mixed(model):
    """A configuration in which neighbouring weights have different methods, all six in turn, tied ones the same."""
    words = list(SEARCH_SPACE)
    turn = {key: words[number % len(words)] for number, key in enumerate(model.slots)}
    return {key: turn[slot.tie] for key, slot in model.slots.items()}


@functools.cache
def _packed(name):
    denoiser = build(name)
    arguments = inputs(name, denoiser)
    model = quantized_model(name, denoiser)
    return model.pack(mixed(model), show=False), arguments


def packed(name):
    """(packed denoiser, arguments of a call, what it then gives); the first is shared: not to be changed."""
    denoiser, arguments = _packed(name)
    output = predict(denoiser, arguments)
    assert output.isfinite().all() and math.isfinite(output.std()) and output.std() > 0
    return denoiser, arguments, output


def change_tensors(path, change):
    """Let `change` alter the tensors {name: tensor} in a safetensors file; digests in it are then of what is there."""
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    has_digests = tensors.pop(NAME, None) is not None
    change(tensors)
    save_file(with_digests(tensors) if has_digests else tensors, path)
