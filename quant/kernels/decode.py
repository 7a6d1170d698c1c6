"""Packed codes to weights: the one decoding, an operator of PyTorch's (`torch.ops.qua2sedimo.decode`).

Being an operator, it is one node of a compiled graph. On the CPU a kernel looks a row's levels up, eight codes at a time;
on an NVIDIA GPU one of Triton's does (quant/kernels/triton_decode.py). Elsewhere, and for tables of float64 there,
PyTorch's own operations do.
"""

import functools
import importlib.util

import numpy as np
import torch
import torch.nn.functional as F
from numba import prange

from quant.compiled import kernel
from quant.doors import expect
from quant.packing import row_bytes, unpack_rows
from quant.rows import run

LIBRARY = torch.library.Library("qua2sedimo", "DEF")
LIBRARY.define("decode(Tensor codes, Tensor table, Tensor? zero, int bits, int count, int group) -> Tensor")
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes: a look-up moves values, whatever they are
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ZERO_DTYPES = (torch.int8, torch.int16, torch.int32)
CHUNK = 2**18  # numbers computed together, which stay in the processor's cache


def decode(codes, table, zero, bits, count, group=0):
    """Weights [C, count], in the table's dtype, of packed rows `codes` (uint8 [C, B], see quant/packing.py).

    `table`: with `zero`, the scales of UAQ or of affine quantization, [C] or [C, G]; without, centroids, [k] for all rows,
    [C, k] for each or [C, G, k] for each group of `group` weights along a row (0: the row is one group). `zero`, as the
    scales: zero points of an integer dtype, weights being (code - zero) x scale; or of the table's, offsets: code x scale
    + zero.
    """
    return torch.ops.qua2sedimo.decode(codes, table, zero, bits, count, group)


def levels_of(table, zero, bits, rows):
    """The values [C, G, 2^bits or k] that codes stand for; the first dimension is 1 where all rows share them."""
    if zero is not None:
        steps = torch.arange(2**bits, device=table.device, dtype=torch.promote_types(table.dtype, torch.float32))
        return _uniform(steps, bits, table.reshape(rows, -1, 1), zero.reshape(rows, -1, 1))
    return table.view(1, 1, -1) if table.ndim == 1 else table.reshape(rows, -1, table.shape[-1])


def _uniform(codes, bits, scale, zero):
    """(codes - zero) x scale, each step rounded to the dtype of `scale`; computed wider, where processors are faster.

    With offsets codes x scale + zero, rounded once.
    """
    dtype, wide = scale.dtype, codes.dtype
    if zero.is_floating_point():
        return (codes * scale.to(wide)).add_(zero.to(wide)).to(dtype)
    if zero.dtype == torch.int8 and bits < 8:  # differences of at most 8 bits and a sign, which every dtype holds
        differences = codes - zero.to(wide)
    else:
        differences = (codes - zero.to(dtype).to(wide)).to(dtype).to(wide)
    return differences.mul_(scale.to(wide)).to(dtype)


def check_shapes(codes, table, zero, bits, count, group):
    """ValueError unless the tensors are those of `count` codes a row: the compiled look-up reads where it is told to."""
    if codes.ndim == 2 and 1 <= bits <= 8 and group >= 0 and _belong(codes, table, zero, bits, count, group):
        return
    found = [f"{each.dtype} {list(each.shape)}" for each in (codes, table, zero) if each is not None]
    raise ValueError(f"packed codes and tables {', '.join(found)} are not of {count} codes of {bits} bits a row")


def _belong(codes, table, zero, bits, count, group):
    groups = -(-count // group) if group else 1
    if codes.dtype != torch.uint8 or not table.is_floating_point() or codes.shape[1] != row_bytes(count, bits):
        return False
    if zero is not None:
        return (zero.dtype in ZERO_DTYPES or zero.dtype == table.dtype) and zero.numel() == table.numel() == codes.shape[
            0
        ] * groups
    levels = table.shape[-1] if table.ndim else 0
    return levels > 0 and (table.ndim == 1 or table.numel() == levels * codes.shape[0] * groups)


def _decode_anywhere(codes, table, zero, bits, count, group):
    levels = levels_of(table, zero, bits, len(codes))
    groups, last = levels.shape[1], levels.shape[2] - 1
    indices = unpack_rows(codes, bits, count).long().clamp_(max=last)
    if groups > 1:
        indices += levels.shape[2] * (torch.arange(count, device=codes.device) // group)
    return levels.reshape(len(levels), -1).expand(len(codes), -1).gather(1, indices)


def _decode_cpu(codes, table, zero, bits, count, group):
    return decode_into(torch.empty(len(codes), count, dtype=table.dtype), codes, table, zero, bits, group)


def decode_into(out, codes, table, zero, bits, group=0):
    """`decode` on the CPU into `out`, a contiguous tensor [C, count] of any floating dtype."""
    count = out.shape[1]
    check_shapes(codes, table, zero, bits, count, group)
    expect("out", out, (len(codes), count), out.dtype)
    if zero is None:
        return look_up(out, codes, levels_of(table, zero, bits, len(codes)).to(out.dtype), bits, group)
    # A look-up among about as many levels as there are weights would cost more than the arithmetic does.
    by_arithmetic = group and 2**bits > group / 2
    numbers = count if by_arithmetic else 2**bits * (-(-count // group) if group else 1)
    rows = max(16, CHUNK // max(numbers, 1))
    for part, packed, scale, shift in zip(*(each.split(rows) for each in (out, codes, table, zero)), strict=True):
        if by_arithmetic:
            part.copy_(_compute(packed, scale, shift, bits, count, group))
        else:
            look_up(part, packed, levels_of(scale, shift, bits, len(packed)).to(out.dtype), bits, group)
    return out


def _decode_cuda(codes, table, zero, bits, count, group):
    from quant.kernels import triton_decode

    if not triton_decode.is_supported(table):
        return _decode_anywhere(codes, table, zero, bits, count, group)
    return triton_decode.decode_into(table.new_empty(len(codes), count), codes, table, zero, bits, group)


def _compute(codes, scale, zero, bits, count, group):
    """Weights [C, count] of UAQ or affine in groups, in the dtype of the scales [C, G]."""
    identity = torch.arange(2**bits).to(torch.uint8).view(1, 1, -1)
    numbers = look_up(torch.empty(len(codes), count, dtype=torch.uint8), codes, identity, bits)
    numbers = F.pad(numbers, (0, -count % group)).unflatten(1, (-1, group))
    numbers = numbers.to(torch.promote_types(scale.dtype, torch.float32))
    return _uniform(numbers, bits, scale[:, :, None], zero[:, :, None]).flatten(1)[:, :count]


def look_up(out, codes, levels, bits, group=0):
    """Fill `out` [C, count], contiguous, with those of `levels` [C or 1, G, k], of its dtype, that packed codes name.

    Codes beyond the last level, as of a damaged file, count as it.
    """
    unsigned, count = UNSIGNED[out.itemsize], out.shape[1]
    expect("out", out, (len(codes), count), levels.dtype)
    groups = -(-count // group) if group else 1
    sound = levels.ndim == 3 and levels.shape[0] in (1, len(codes)) and levels.shape[1] == groups and levels.shape[2]
    if not sound or codes.dtype != torch.uint8 or codes.shape[1] != row_bytes(count, bits):
        raise ValueError(f"codes {list(codes.shape)} and levels {list(levels.shape)} are not of {count} codes a row")
    as_pairs = bits <= 4 and not group and count % 2 == 0 and out.itemsize < 8
    packed, values, chosen = codes.contiguous().numpy(), _integers(levels.contiguous()), _integers(out)
    if as_pairs:
        chosen = chosen.view(UNSIGNED[2 * out.itemsize])
    run(_kernel(bits, as_pairs, unsigned), packed, values, (group or count) // (1 + as_pairs), chosen)
    return out


def _integers(tensor):
    return tensor.view(INTEGERS[tensor.itemsize]).numpy().view(UNSIGNED[tensor.itemsize])


@torch.library.register_fake("qua2sedimo::decode", lib=LIBRARY)
def _decode_fake(codes, table, zero, bits, count, group):
    return table.new_empty(codes.shape[0], count)


LIBRARY.impl("decode", _decode_anywhere, "CompositeExplicitAutograd")
LIBRARY.impl("decode", _decode_cpu, "CPU")
if importlib.util.find_spec("triton"):  # which torch brings, but not on all systems
    LIBRARY.impl("decode", _decode_cuda, "CUDA")


@functools.cache
def _kernel(bits, as_pairs, unsigned):
    """The look-up of codes of so many bits among levels of a type, in which all of these are constants.

    `as_pairs`: two codes at a time, as one of twice the bits, among all pairs of levels.
    """
    width, per_word = (2 * bits, 4) if as_pairs else (bits, 8)  # of codes; a word holds as many bytes as codes have bits
    shift, mask, byte = np.uint64(width), np.uint64(2**width - 1), np.uint64(8)
    wide = UNSIGNED[2 * np.dtype(unsigned).itemsize] if as_pairs else unsigned
    high = wide(8 * np.dtype(unsigned).itemsize % 64)

    @kernel(nogil=True)
    def fill(table, own, levels):
        """table [2^width]: the levels, or their pairs, the first in the low half; `own` [2^bits] is room for levels."""
        last = len(levels) - 1
        if not as_pairs:
            for code in range(2**bits):
                table[code] = levels[min(code, last)]
            return
        for code in range(2**bits):
            own[code] = levels[min(code, last)]
        for second in range(2**bits):
            upper = wide(own[second]) << high
            part = table[second * 2**bits : (second + 1) * 2**bits]
            for first in range(2**bits):
                part[first] = wide(own[first]) | upper

    @kernel(nogil=True)
    def look_up_words(row, table, out):
        for number in range(len(out) // per_word):
            word = np.uint64(0)
            for i in range(bits):
                word |= np.uint64(row[bits * number + i]) << (byte * np.uint64(i))
            for i in range(per_word):
                out[per_word * number + i] = table[(word >> (shift * np.uint64(i))) & mask]

    @kernel(nogil=True)
    def look_up_rows(packed, levels, group, out):
        """Of levels [1, G, k] that all rows share, or [C, G, k]."""
        own, table = np.empty(2**bits, unsigned), np.empty(2**width, wide)
        is_shared = len(levels) == 1 and levels.shape[1] == 1
        for channel in range(len(out)):
            for g in range(levels.shape[1]):
                if channel == 0 or not is_shared:
                    fill(table, own, levels[min(channel, len(levels) - 1), g])
                begin = g * group
                chosen = out[channel, begin : begin + group]
                whole = len(chosen) // per_word * per_word if begin * width % 8 == 0 else 0
                look_up_words(packed[channel, begin * width // 8 :], table, chosen[:whole])
                for i in range(whole, len(chosen)):
                    chosen[i] = table[_code(packed[channel], begin + i, width)]

    @kernel(parallel=True, nogil=True)
    def look_up_all(packed, levels, group, out):
        """out [C, n]: of each row's `levels` [C or 1, G, k] those that its packed codes [C, B] name."""
        step = max(16, -(-len(out) // 64))
        for part in prange(-(-len(out) // step)):
            start, stop = part * step, min((part + 1) * step, len(out))
            own = levels if len(levels) == 1 else levels[start:stop]
            look_up_rows(packed[start:stop], own, group, out[start:stop])

    return look_up_all


@kernel()
def _code(row, i, bits):
    """Code number i of a row: at most two bytes hold it."""
    first = i * bits
    byte, shift = first >> 3, first & 7
    word = int(row[byte])
    if shift + bits > 8:
        word |= int(row[byte + 1]) << 8
    return (word >> shift) & ((1 << bits) - 1)
