"""Average bits of a quantized denoiser by one rule: all bytes that stand for its weights, over all quantizable weights.

A way to quantize says what it stores of each weight as a function from a shape [C, ...] to bytes: codes, scales, zero
points, codebooks and low-rank corrections alike. So the same way can be counted at another model's shapes: the embedded
models' channels are narrow, and what is kept per channel weighs far more in them than in the real models. Quality is
still that of narrow channels: a codebook, or a correction of some rank, does more for 48 inputs than for 1,152, so that
bits at real size flatter both, and say nothing for certain of the real model.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from errors import InputError
from quant.quantizer import fp_size_bytes
from quant.registry import quantizer


class Stored(NamedTuple):
    """Codes, tables for each output channel and group of inputs, and a low-rank correction; gives bytes of a shape."""

    code_bits: float  # of a weight
    table_bits: float = 0  # of the tables of a group: scales, zero points, codebooks
    groups: Callable = lambda _width: 1  # of an output channel of so many weights
    rank: int = 0
    rank_bits: int = 16  # of a number of the correction

    def __call__(self, shape):
        width = math.prod(shape[1:])
        bits = shape[0] * width * self.code_bits
        bits += shape[0] * self.groups(width) * self.table_bits
        return (bits + self.rank * (shape[0] + width) * self.rank_bits) / 8


def in_full_precision(precision_bits):
    """What is stored of a weight that is left as it is."""
    return lambda shape: fp_size_bytes(shape, precision_bits)


def of_words(configuration, precision_bits):
    """{key: what is stored} of a configuration {key: quantizer's word}; None for full precision."""

    def of_word(word):
        return lambda shape: quantizer(word).size_bytes(shape, precision_bits)

    left = in_full_precision(precision_bits)
    return {key: left if word is None else of_word(word) for key, word in configuration.items()}


def average_bits(stored, shapes, counted_at=None):
    """Bits per weight of what is `stored` {key, or path of a whole layer: function from a shape to bytes}.

    `shapes` {key: shape} are the denoiser's weights, every one of which must be stored. With `counted_at` {key: shape} the
    bits of each weight are what they would be at that shape, and count as often as the weight itself has numbers: scales and
    codebooks weigh as in the other model, layers as in this one.
    """
    own, other = with_layers(shapes), with_layers(counted_at or shapes)
    total = sum(math.prod(shape) for shape in shapes.values())
    unknown = next((key for key in stored if key not in own or key not in other), None)
    if unknown is not None or sum(math.prod(own[key]) for key in stored) != total:
        raise InputError(f"{unknown or 'what is stored'}: is not of this denoiser's weights, all of them and each once")
    bits = {key: 8 * size(other[key]) / math.prod(other[key]) for key, size in stored.items()}
    return sum(bits[key] * math.prod(own[key]) for key in stored) / total


def with_layers(shapes):
    """The shapes {key: shape} and those of whole layers, {path: shape}: the parts of a split weight together."""
    whole = {}
    for key, shape in shapes.items():
        first = whole.get(key.path)
        whole[key.path] = shape if first is None else (shape[0], first[1] + shape[1], *shape[2:])
    return dict(shapes) | whole
