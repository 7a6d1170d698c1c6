"""Linear layers by integer products on the CPU: inputs quantized by token, weights by their codes.

With x = s (q + z) for a token and w = t (p + u) for an output channel, q and p in int8, an output is

    y = s t (sum q p + u (sum q + n z) + z sum p) + bias

where only sum q p is a product of matrices. For UAQ p are the codes, shifted. For codebooks p are the centroids, rounded
to 255 levels between the smallest and the largest of them: steps that are small beside the distances of up to 2^6
centroids; wider codebooks are not taken.
"""

import functools

import numpy as np
import torch
from numba import prange

from quant.compiled import kernel
from quant.kernels.decode import look_up
from quant.rows import run

MAX_CODEBOOK_BITS = 6
ROWS, COLUMNS = 256, 576  # of a tile of products, by which they stay in a processor's cache until they are scaled
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
F32 = np.float32


@functools.cache
def has_units():
    """Whether this processor multiplies int8 faster than floats."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def takes(input, zero, bits):
    """Whether `linear` is to be had for this input, with UAQ (`zero` not None) or a codebook of so many bits."""
    return has_units() and input.dtype in DTYPES and input.numel() > 0 and (zero is not None or bits <= MAX_CODEBOOK_BITS)


def linear(input, room, codes, table, zero, bits, act_bits, bias):
    """`input` [..., n], quantized by token to `act_bits`, times the packed weight [C, n], plus `bias` [C]: [..., C].

    What activations.quantize_tokens and a float product give, up to rounding and, for codebooks, to the rounded
    centroids. `room` [C, n], int8, takes the weight.
    """
    count, channels, is_narrow = input.shape[-1], len(codes), input.dtype == torch.bfloat16
    of_weight = [each.numpy() for each in _weight_into(room, codes, table, zero, bits)]
    of_weight.append(np.zeros(channels, F32) if bias is None else bias.float().numpy())
    values = input.reshape(-1, count)
    out = torch.empty(len(values), channels, dtype=torch.bfloat16 if is_narrow else torch.float32)
    target, scaling = (_bits(out) if is_narrow else out.numpy()), _scaling(is_narrow)
    rows = min(ROWS * torch.get_num_threads(), len(values))
    memory = torch.empty(rows * min(COLUMNS, channels), dtype=torch.int32)
    for row in range(0, len(values), rows):
        q, *of_tokens = quantize_rows(values[row : row + rows], act_bits)
        of_tokens[2] += count * of_tokens[1]
        of_tokens = [each.numpy() for each in of_tokens]
        for column in range(0, channels, COLUMNS):
            weight = room[column : column + COLUMNS]
            products = memory[: len(q) * len(weight)].view(len(q), len(weight))
            torch._int_mm(q, weight.t(), out=products)
            run(scaling, products.numpy(), *of_tokens, *of_weight, target, row, column)
    return out.to(input.dtype).view(*input.shape[:-1], channels)


def quantize_rows(rows, bits):
    """Of rows [M, n] the codes q (int8 [M, n]) and scales, shifts and sums of q (float32 [M]), x = scale (q + shift).

    Scales and codes are those of activations.quantize_tokens, q = code - 2^(bits - 1). The scale of a row with NaN or
    infinite values is NaN.
    """
    is_narrow = rows.dtype == torch.bfloat16
    numbers = _bits(rows.contiguous() if is_narrow else rows.float().contiguous())
    q, told = torch.empty(rows.shape, dtype=torch.int8), torch.empty(3, len(rows))
    run(_quantize(is_narrow), numbers, F32(2**bits - 1), F32(2 ** (bits - 1)), q.numpy(), told.numpy())
    return q, *told


def _bits(tensor):
    return tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy()


def _weight_into(room, codes, table, zero, bits):
    """Fill `room` with p; returns scale t, shift u and sum of p of each output channel (float32 [C])."""
    if zero is not None:
        half = 2 ** (bits - 1)
        levels = torch.arange(-half, half).to(torch.int8).view(1, 1, -1)
        scale, shift = table.float().view(-1), half - zero.float().view(-1)
    else:
        levels, scale, shift = round_codebooks(table.float().view(-1, table.shape[-1]))
        levels, scale, shift = levels[:, None], scale.expand(len(codes)), shift.expand(len(codes))
    look_up(room, codes, levels, bits)
    sums = torch.empty(len(codes))
    run(_sum_rows, room.numpy(), sums.numpy())
    return scale.contiguous(), shift.contiguous(), sums


def round_codebooks(centroids):
    """Codebooks [R, k] as int8 [R, k], scale and shift [R]: centroid = scale (int8 + shift), both ends exact."""
    low, high = centroids.aminmax(dim=1, keepdim=True)
    scale = (high - low) / 254
    # A codebook of one number is one whole step away from zero.
    scale = torch.where(scale > 0, scale, low.abs()).clamp_(min=torch.finfo(torch.float32).tiny)
    middle = (high + low) / 2
    return ((centroids - middle) / scale).round_().to(torch.int8), scale.squeeze(1), (middle / scale).squeeze(1)


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

        Of the tile's tokens s, z and sum of q + z; of all output channels t, u and sum of p, and the bias.
        """
        stop = column + products.shape[1]
        for m in prange(len(products)):
            scale_row(
                products[m],
                scale[m],
                shift[m],
                sums[m],
                channel_scale[column:stop],
                channel_shift[column:stop],
                channel_sums[column:stop],
                bias[column:stop],
                out[row + m, column:stop],
            )

    return scale_back
