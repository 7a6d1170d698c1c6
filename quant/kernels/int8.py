"""Linear layers by integer products on the CPU: inputs quantized by token, weights by their codes.

With x = s (q + z) for a token and w = t (p + u) for an output channel, q and p in int8, an output is

    y = s t (sum q p + u (sum q + n z) + z sum p) + bias

where only sum q p is a product of matrices. For UAQ and affine quantization p are the codes, shifted. For codebooks p are
the centroids, rounded to 255 levels between the smallest and the largest of them: steps that are small beside the distances
of up to 2^6 centroids; wider codebooks are not taken.
"""

import functools
import math

import numpy as np
import torch
from numba import prange

from quant.compiled import kernel
from quant.doors import expect
from quant.kernels.decode import check_shapes, look_up
from quant.rows import run

MAX_CODEBOOK_BITS = 6
ROWS = 1024  # multiplied at a time, for each thread: with fewer, calls cost more than what the cache saves
MIN_COLUMNS, CACHED_BYTES = 256, 2**21
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
F32 = np.float32


@functools.cache
def has_units():
    """Whether this processor multiplies int8 faster than floats."""
    return torch.backends.mkldnn.is_available() and getattr(torch.cpu, "_is_vnni_supported", bool)()


def takes(input, zero, bits):
    """Whether `linear` is to be had for this input, with scales (`zero` not None) or a codebook of so many bits."""
    return has_units() and input.dtype in DTYPES and input.numel() > 0 and (zero is not None or bits <= MAX_CODEBOOK_BITS)


def linear(input, room, codes, table, zero, bits, act_bits, bias):
    """`input` [..., n], quantized by token to `act_bits`, times the packed weight [C, n], plus `bias` [C]: [..., C].

    What activations.quantize_tokens and a float product give, up to rounding and, for codebooks, to the rounded
    centroids. `room(shape, dtype)` lends memory. The weight is decoded some output channels at a time, and multiplied
    some tokens at a time: what is decoded and the products stay in the processor's cache until they are used.
    """
    count, channels, is_narrow = input.shape[-1], len(codes), input.dtype == torch.bfloat16
    check_shapes(codes, table, zero, bits, count, 0)
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"a bias of shape {list(bias.shape)} is not of {channels} output channels")
    values = input.reshape(-1, count)
    q, *of_tokens = quantize_rows(values, act_bits, room(values.shape, torch.int8, "input"))
    of_tokens[2] += count * of_tokens[1]
    levels, scale, shift = _integer_levels(table, zero, bits, channels)
    sums, bias = torch.empty(channels), torch.zeros(channels) if bias is None else bias.float()
    numbers = [each.numpy() for each in (*of_tokens, scale, shift, sums, bias)]
    out = torch.empty(len(q), channels, dtype=torch.bfloat16 if is_narrow else torch.float32)
    target, scale_back = (_bits(out) if is_narrow else out.numpy()), _scaling(is_narrow)
    rows, columns = min(ROWS * torch.get_num_threads(), len(q)), _columns(channels, count)
    for column in range(0, channels, columns):
        some = slice(column, column + columns)
        packed = codes[some]
        weight = look_up(room((len(packed), count), torch.int8), packed, levels if len(levels) == 1 else levels[some], bits)
        run(_sum_rows, weight.numpy(), sums[some].numpy())
        for row in range(0, len(q), rows):
            tokens = q[row : row + rows]
            products = room((len(tokens), len(weight)), torch.int32, "products")
            torch._int_mm(tokens, weight.t(), out=products)
            run(scale_back, products.numpy(), *numbers, target, row, column)
    return out.to(input.dtype).view(*input.shape[:-1], channels)


def _columns(channels, count):
    """Output channels of `count` weights that are decoded at a time: as many in each part, a multiple of 64."""
    parts = math.ceil(channels / max(MIN_COLUMNS, CACHED_BYTES // count))
    return math.ceil(channels / parts / 64) * 64


def quantize_rows(rows, bits, q):
    """Fill q (int8 [M, n]) with codes of rows [M, n]; returns it, scales, shifts and sums of q (float32 [M]).

    A row is scale (q + shift).

    Scales and codes are those of activations.quantize_tokens, q = code - 2^(bits - 1). The scale of a row with NaN or
    infinite values is NaN.
    """
    expect("q", q, (*rows.shape,), torch.int8)
    is_narrow = rows.dtype == torch.bfloat16
    numbers = _bits(rows.contiguous() if is_narrow else rows.float().contiguous())
    told = torch.empty(3, len(rows))
    run(_quantize(is_narrow), numbers, F32(2**bits - 1), F32(2 ** (bits - 1)), q.numpy(), told.numpy())
    return q, *told


def _bits(tensor):
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy()


def _integer_levels(table, zero, bits, channels):
    """What codes stand for as p (int8 [C or 1, 1, k]), with scale t and shift u of each output channel (float32 [C])."""
    if zero is not None:
        half = 2 ** (bits - 1)
        levels = torch.arange(-half, half).to(torch.int8).view(1, 1, -1)
        scale, zero_or_offset = table.float().view(-1).contiguous(), zero.float().view(-1)
        return levels, scale, half + zero_or_offset / scale if zero.is_floating_point() else half - zero_or_offset
    levels, scale, shift = round_codebooks(table.float().view(-1, table.shape[-1]))
    return levels[:, None], scale.expand(channels).contiguous(), shift.expand(channels).contiguous()


def round_codebooks(centroids):
    """Codebooks [R, k] as int8 [R, k], scale and shift [R]: centroid = scale (int8 + shift), both ends exact."""
    levels = torch.empty(centroids.shape, dtype=torch.int8)
    scale, shift = torch.empty(2, len(centroids))
    run(_round_codebooks, centroids.contiguous().numpy(), levels.numpy(), scale.numpy(), shift.numpy())
    return levels, scale, shift


@kernel(parallel=True, nogil=True, error_model="numpy")
def _round_codebooks(centroids, levels, scales, shifts):
    for r in prange(len(centroids)):
        low, high = centroids[r].min(), centroids[r].max()
        scale = (high - low) / F32(254)
        if not scale > 0:  # a codebook of one number is one whole step away from zero
            scale = abs(low)
        scale = max(scale, F32(2.0**-126))
        middle = (high + low) / F32(2)
        for i in range(centroids.shape[1]):
            levels[r, i] = np.int8(np.int32(np.rint((centroids[r, i] - middle) / scale)))
        scales[r], shifts[r] = scale, middle / scale


@functools.cache
def _quantize(is_narrow):
    """The kernel of `quantize_rows` for float32, or for bfloat16."""
    integer, low_bits = (np.int16, 0x7FFF) if is_narrow else (np.int32, 0x7FFFFFFF)
    sign = 15 if is_narrow else 31

    @kernel()
    def number(bits):
        return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32) if is_narrow else np.int32(bits).view(np.float32)

    @kernel()
    def ends(row):
        """The smallest and the largest number, NaN if there is one: floats as integers of the same order."""
        low, high = integer(low_bits), integer(-low_bits - 1)
        for i in range(len(row)):
            key = integer(row[i] ^ ((row[i] >> integer(sign)) & integer(low_bits)))
            low, high = min(low, key), max(high, key)
        low = integer(low ^ ((low >> integer(sign)) & integer(low_bits)))
        high = integer(high ^ ((high >> integer(sign)) & integer(low_bits)))
        return number(low), number(high)

    @kernel(fastmath={"reassoc"}, error_model="numpy")
    def codes_of(row, scale, zero, top, half, q):
        total = F32(0)
        for i in range(len(row)):
            code = min(max(np.rint(number(row[i]) / scale) + zero, F32(0)), top) - half
            total += code
            q[i] = np.int8(np.int32(code))
        return total

    @kernel(parallel=True, nogil=True, error_model="numpy")
    def quantize(rows, top, half, q, told):
        for r in prange(len(rows)):
            low, high = ends(rows[r])
            scale = (high / F32(2) - low / F32(2)) / (top / F32(2))
            if low == high:
                scale = abs(low)
            scale = max(scale, F32(2.0**-149))
            zero = F32(np.rint(-low / scale))
            if not (abs(low) < np.inf and abs(high) < np.inf):
                told[0, r] = told[1, r] = told[2, r] = np.nan
                q[r] = 0
            else:
                told[0, r], told[1, r] = scale, half - zero
                told[2, r] = codes_of(rows[r], scale, zero, top, half, q[r])

    return quantize


@kernel(parallel=True, nogil=True)
def _sum_rows(rows, out):
    for r in prange(len(rows)):
        total = np.int32(0)
        for i in range(rows.shape[1]):
            total = np.int32(total + np.int32(rows[r, i]))
        out[r] = total


@functools.cache
def _scaling(is_narrow):
    @kernel()
    def stored(value):
        """The bits of the nearest bfloat16, or the float32 itself."""
        if is_narrow:
            bits = np.float32(value).view(np.uint32)
            return np.int16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
        return value

    @kernel(nogil=True)
    def scale_row(products, scale, shift, total, channel_scale, channel_shift, channel_sums, bias, out):
        for c in range(len(products)):
            whole = F32(products[c]) + channel_shift[c] * total + shift * channel_sums[c]
            out[c] = stored(scale * (channel_scale[c] * whole) + bias[c])

    @kernel(parallel=True, nogil=True)
    def scale_back(products, scale, shift, sums, channel_scale, channel_shift, channel_sums, bias, out, row, column):
        """Fill the tile of out [M, C] that starts at (row, column) with y of its int32 `products`, sum q p.

        Of all tokens s, z and sum of q + z; of all output channels t, u and sum of p, and the bias.
        """
        stop = column + products.shape[1]
        for i in prange(len(products)):
            m = row + i
            scale_row(
                products[i],
                scale[m],
                shift[m],
                sums[m],
                channel_scale[column:stop],
                channel_shift[column:stop],
                channel_sums[column:stop],
                bias[column:stop],
                out[m, column:stop],
            )

    return scale_back
