"""Bit operations: multiply-accumulates x weight bits x activation bits (PTQD, He et al., 2023, Section 5.1)."""

from quant.methods import METHODS

FLOAT_BITS = 16  # full-precision weights and activations
OTHER_BITS = 16  # per MAC of a layer outside the configuration, as published
NORM_BITS = 32  # per MAC of a normalisation, as published: they compute in 32 bits
TERA = 1e12


def weight_bits(method):
    """Bits that a weight enters its product with: K-Means weights are 16-bit numbers once decoded."""
    is_affine = method is not None and METHODS[method].algorithm == "mse"
    return METHODS[method].bits if is_affine else FLOAT_BITS


def tera_bops(macs, method_by_path, act_bits=FLOAT_BITS):
    """Tera-BOPs of one denoiser call for one image.

    `method_by_path` is {module path: method name, or None for full precision} of the layers in the
    configuration; their inputs have `act_bits`, and so have the attention's queries, keys and
    probabilities.
    """
    total = macs.norms * NORM_BITS
    for path, count in macs.layers.items():
        if path in method_by_path:
            total += count * weight_bits(method_by_path[path]) * act_bits
        else:
            total += count * OTHER_BITS
    total += macs.attention_qk * act_bits * act_bits + macs.attention_av * act_bits * FLOAT_BITS
    return total / TERA
