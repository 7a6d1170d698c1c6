"""Bit operations: multiply-accumulates x weight bits x activation bits (PTQD, He et al., 2023, Section 5.1)."""

from collections import Counter

from quant.quantizer import FLOAT
from quant.registry import quantizer

FLOAT_BITS = 16  # full-precision weights and activations
OTHER_BITS = 16  # per MAC of a layer outside the configuration, as published
NORM_BITS = 32  # per MAC of a normalisation, as published: they compute in 32 bits
TERA = 1e12


def weight_bits(method):
    """Bits that a weight enters its product with: K-Means weights, once decoded, and float ones are 16-bit numbers."""
    is_affine = method is not None and quantizer(method).is_affine
    return quantizer(method).bits if is_affine else FLOAT_BITS


def tera_bops(macs, slots, method_by_key, act_bits=FLOAT_BITS):
    """Tera-BOPs of one denoiser call for one image.

    `method_by_key` is {key of a slot: method name, or None for full precision}; the slots' layers have
    inputs of `act_bits`, and so have the attention's queries, keys and probabilities; products that no one quantizes
    take FLOAT_BITS on both sides. Inputs of layers that a configuration leaves float are not quantized.
    """
    total = macs.products * FLOAT_BITS * FLOAT_BITS
    total += macs.norms * NORM_BITS + macs.attention_qk * act_bits * act_bits + macs.attention_av * act_bits * FLOAT_BITS
    weights = Counter()  # module path -> weights in slots
    for slot in slots.values():
        weights[slot.module_path] += slot.shape.numel()
    quantized = {slot.module_path for key, slot in slots.items() if method_by_key[key] != FLOAT}
    for key, slot in slots.items():
        share = macs.layers[slot.module_path] * slot.shape.numel() // weights[slot.module_path]
        input_bits = act_bits if slot.module_path in quantized else FLOAT_BITS
        total += share * weight_bits(method_by_key[key]) * input_bits
    total += sum(count * OTHER_BITS for path, count in macs.layers.items() if path not in weights)
    return total / TERA
