"""Other programs' quantized weights, for benchmarks/quality.py: SDNQ, optimum-quanto, bitsandbytes and GGUF.

    pip install -e '.[peers]'

Each takes a float denoiser and gives, for the layers that it quantizes, the weights that its tensors stand for and what it
stores of them; a denoiser with those weights computes what the program's own layers would, up to rounding of sums. Bytes
are those of the program's tensors. Scales are in the weights' precision where a program lets one choose, which is smaller
and changes no image. What is left out, and why, is in LEFT_OUT.
"""

import copy
import math
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.stored_size import Stored, in_full_precision
from quant.slots import weight_layers

LEFT_OUT = {
    "torchao int4": "its int4 weights need the package mslk and a GPU; what runs on a CPU keeps 4-bit codes in 8 bits",
    "GGUF Q3_K and Q4_K": "the gguf package reads K types and does not quantize to them; their blocks are of 256 inputs",
}
SDNQ_TENSORS = ("weight", "scale", "zero_point", "svd_up", "svd_down")
NF4_BLOCK = 64  # weights that share a scale


class Held(NamedTuple):
    """A layer's weight as a program holds it."""

    weight: torch.Tensor  # [C, ...], what its tensors stand for
    tensors: tuple[torch.Tensor, ...]  # that it keeps
    stored: object  # from a shape to bytes


def of_peer(quantize, **options):
    """The arm of a program: `quantize(denoiser, paths, **options)` gives {path: Held} of layers that it quantizes."""

    def build(denoiser, sampler):
        family = sampler.family
        layers = dict(weight_layers(denoiser, family.slot_rules))
        torch.manual_seed(0)  # of randomized singular value decompositions
        half = nn.Module.to(copy.deepcopy(denoiser), family.dtype)
        held = quantize(half, list(layers), **options)
        for path, each in held.items():
            check_bytes(path, each)
            layers[path].weight.data.copy_(each.weight)
        left = in_full_precision(family.precision_bits)
        return denoiser, {path: held[path].stored if path in held else left for path in layers}

    return build


def check_bytes(path, held):
    """RuntimeError unless what is said to be stored of a layer is what its tensors take."""
    actual = sum(tensor.numel() * tensor.element_size() for tensor in held.tensors)
    told = held.stored(held.weight.shape)
    if abs(actual - told) >= 1:
        raise RuntimeError(f"{path}: its tensors take {actual} bytes, and {told:g} were reckoned")


def code_bits(codes, weight):
    return 8 * codes.numel() * codes.element_size() / weight.numel()


@torch.no_grad()
def sdnq(denoiser, paths, rank=0, hadamard=False, dynamic=False, codebook=False, **options):
    """SDNQ (options are its own), tables by output channel, convolutions too and layers however small.

    It leaves alone the layers that it names itself for the model's class.
    """
    from sdnq.quantizer import sdnq_post_load_quant

    quantized = sdnq_post_load_quant(
        denoiser,
        group_size=-1,
        use_svd=rank > 0,
        svd_rank=rank,
        use_hadamard=hadamard,
        use_dynamic_quantization=dynamic,
        use_codebook=codebook,
        dequantize_fp32=False,
        quant_conv=True,
        minimum_allowed_numel=0,
        minimum_allowed_channel_size=0,
        torch_dtype=next(denoiser.parameters()).dtype,
        **options,
    )
    layers = {path: quantized.get_submodule(path) for path in paths}
    return {path: _of_sdnq(layer) for path, layer in layers.items() if hasattr(layer, "sdnq_dequantizer")}


def _of_sdnq(layer):
    named = {name: getattr(layer, name) for name in SDNQ_TENSORS if getattr(layer, name, None) is not None}
    weight = layer.sdnq_dequantizer(**named, skip_compile=True, dtype=torch.float32)
    tables = [named[name] for name in ("scale", "zero_point") if name in named]
    stored = Stored(
        code_bits(named["weight"], weight),
        # A convolution has tables at each place of its window.
        sum(8 * table.numel() * table.element_size() for table in tables) / len(weight),
        rank=named["svd_down"].shape[0] if "svd_down" in named else 0,
        rank_bits=8 * weight.new_empty(0, dtype=tables[0].dtype).element_size(),
    )
    return Held(weight, tuple(named.values()), stored)


@torch.no_grad()
def quanto(denoiser, paths):
    """optimum-quanto's qint4: a scale and a shift for up to 128 inputs of an output channel."""
    from optimum.quanto import freeze, qint4, quantize

    quantize(denoiser, weights=qint4)
    freeze(denoiser)
    return {path: _of_quanto(denoiser.get_submodule(path).weight) for path in paths}


def _of_quanto(weight):
    codes, tables = weight._data._data, (weight._scale, weight._shift)
    values = weight.dequantize().float()
    groups = quanto_groups(math.prod(values.shape[1:]))
    table_bits = sum(8 * table.numel() * table.element_size() for table in tables) / len(values) / groups
    return Held(values, (codes, *tables), Stored(code_bits(codes, values), table_bits, quanto_groups))


def quanto_groups(width):
    """Groups of a channel of so many inputs: of 128, 96, 64 or 32 where that divides it, else one."""
    return next((width // size for size in (128, 96, 64, 32) if width > 128 and width % size == 0), 1)


@torch.no_grad()
def nf4(denoiser, paths):
    """bitsandbytes' NF4: a scale in single precision for every 64 weights.

    Weights are given as one row, since 0.50 reads the scales of shorter rows than 64 from wrong places on a CPU.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    held = {}
    for path in paths:
        weight = denoiser.get_submodule(path).weight.detach().float()
        codes, state = quantize_4bit(weight.reshape(1, -1), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False)
        held[path] = Held(dequantize_4bit(codes, state).reshape(weight.shape), (codes, state.absmax), _nf4_bytes)
    return held


def _nf4_bytes(shape):
    count = math.prod(shape)
    return math.ceil(count / 2) + 4 * math.ceil(count / NF4_BLOCK)


@torch.no_grad()
def gguf(denoiser, paths, kind, padded=False):
    """A type of GGUF on the Linear layers whose rows are whole blocks, as programs that read GGUF have it.

    `padded`: on all weights, rows filled up with zeros to whole blocks.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind = GGMLQuantizationType[kind]
    block, block_bytes = GGML_QUANT_SIZES[kind]

    def stored(shape):
        return shape[0] * math.ceil(math.prod(shape[1:]) / block) * block_bytes

    held = {}
    for path in paths:
        layer = denoiser.get_submodule(path)
        rows = layer.weight.detach().float().flatten(1)  # [C, n]
        missing = -rows.shape[1] % block
        if padded or (type(layer) is nn.Linear and not missing):
            codes = quantize(nn.functional.pad(rows, (0, missing)).numpy(), kind)
            values = torch.from_numpy(dequantize(codes, kind).copy())[:, : rows.shape[1]]
            held[path] = Held(values.reshape(layer.weight.shape), (torch.from_numpy(codes),), stored)
    return held
