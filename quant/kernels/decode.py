"""Packed codes to weights: the one decoding, an operator of PyTorch's (`torch.ops.qua2sedimo.decode`).

Being an operator, it is one node of a compiled graph. On the CPU a kernel unpacks a row at a time while it is in the
processor's cache and looks its levels up; on an NVIDIA GPU one of Triton's does (quant/kernels/triton_decode.py).
Elsewhere, and for tables of float64 there, PyTorch's own operations do.
"""

import importlib.util

import numpy as np
import torch
from numba import prange

from quant.compiled import kernel
from quant.packing import row_bytes, unpack_rows
from quant.rows import run

LIBRARY = torch.library.Library("qua2sedimo", "DEF")
LIBRARY.define("decode(Tensor codes, Tensor table, Tensor? zero, int bits, int count, int group) -> Tensor")
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes: a look-up moves values, whatever they are


def decode(codes, table, zero, bits, count, group=0):
    """Weights [C, count], in the table's dtype, of packed rows `codes` (uint8 [C, B], see quant/packing.py).

    `table`: with `zero`, the scales of UAQ, [C] or [C, G]; without, centroids, [k] for all rows, [C, k] for each or
    [C, G, k] for each group of `group` weights along a row (0: the row is one group). `zero`: zero points, as the
    scales, of an integer dtype.
    """
    return torch.ops.qua2sedimo.decode(codes, table, zero, bits, count, group)


def levels_of(table, zero, bits, rows):
    """The values [C, G, 2^bits or k] that codes stand for; the first dimension is 1 where all rows share them."""
    if zero is not None:
        steps = torch.arange(2**bits, device=table.device, dtype=table.dtype)
        scale, zero = table.reshape(rows, -1, 1), zero.reshape(rows, -1, 1)
        return (steps - zero.to(table.dtype)) * scale
    return table.view(1, 1, -1) if table.ndim == 1 else table.reshape(rows, -1, table.shape[-1])


def check_shapes(codes, table, zero, bits, count, group):
    """ValueError unless the tensors are those of `count` codes a row: the compiled look-up reads where it is told to."""
    rows, groups = codes.shape[0], -(-count // group) if group else 1
    numbers = zero.numel() == table.numel() == rows * groups if zero is not None else True
    own = zero is None and table.ndim > 1
    if codes.shape[1] != row_bytes(count, bits) or not numbers or (own and table[..., 0].numel() != rows * groups):
        shapes = [list(each.shape) for each in (codes, table, zero) if each is not None]
        raise ValueError(f"packed codes and tables of shapes {shapes} are not of {count} codes of {bits} bits a row")


def _decode_anywhere(codes, table, zero, bits, count, group):
    levels = levels_of(table, zero, bits, len(codes))
    groups, last = levels.shape[1], levels.shape[2] - 1
    indices = unpack_rows(codes, bits, count).long().clamp_(max=last)
    if groups > 1:
        indices += levels.shape[2] * (torch.arange(count, device=codes.device) // group)
    return levels.reshape(len(levels), -1).expand(len(codes), -1).gather(1, indices)


def _decode_cpu(codes, table, zero, bits, count, group):
    check_shapes(codes, table, zero, bits, count, group)
    levels = levels_of(table, zero, bits, len(codes)).contiguous()
    integer = INTEGERS[levels.itemsize]
    out = torch.empty(len(codes), count, dtype=levels.dtype)
    run(_look_up, codes.contiguous().numpy(), levels.view(integer).numpy(), bits, group or count, out.view(integer).numpy())
    return out


def _decode_cuda(codes, table, zero, bits, count, group):
    from quant.kernels import triton_decode

    if not triton_decode.is_supported(table):
        return _decode_anywhere(codes, table, zero, bits, count, group)
    return triton_decode.decode_into(table.new_empty(len(codes), count), codes, table, zero, bits, group)


@torch.library.register_fake("qua2sedimo::decode", lib=LIBRARY)
def _decode_fake(codes, table, zero, bits, count, group):
    return table.new_empty(codes.shape[0], count)


LIBRARY.impl("decode", _decode_anywhere, "CompositeExplicitAutograd")
LIBRARY.impl("decode", _decode_cpu, "CPU")
if importlib.util.find_spec("triton"):  # which torch brings, but not on all systems
    LIBRARY.impl("decode", _decode_cuda, "CUDA")


@kernel(parallel=True, nogil=True)
def _look_up(packed, levels, bits, group, out):
    """out [C, n]: of each row's `levels` [C or 1, G, k] those that its packed codes [C, B] name."""
    last = levels.shape[2] - 1
    for channel in prange(len(out)):
        row, chosen = packed[channel], out[channel]
        own = levels[min(np.int64(channel), np.int64(len(levels) - 1))]
        if bits == 4 and len(own) == 1 and last == 15:
            _look_up_4(row, own[0], chosen)
        elif bits == 3 and len(own) == 1 and last == 7:
            _look_up_3(row, own[0], chosen)
        else:
            for g in range(len(own)):
                for i in range(g * group, min((g + 1) * group, len(chosen))):
                    chosen[i] = own[g, min(_code(row, i, bits), last)]


@kernel()
def _code(row, i, bits):
    """Code number i of a row: at most two bytes hold it."""
    first = i * bits
    byte, shift = first >> 3, first & 7
    word = int(row[byte])
    if shift + bits > 8:
        word |= int(row[byte + 1]) << 8
    return (word >> shift) & ((1 << bits) - 1)


@kernel()
def _look_up_4(row, levels, out):
    for pair in range(len(out) // 2):
        out[2 * pair] = levels[row[pair] & 15]
        out[2 * pair + 1] = levels[row[pair] >> 4]
    if len(out) % 2:
        out[-1] = levels[row[len(out) // 2] & 15]


@kernel()
def _look_up_3(row, levels, out):
    whole = len(out) // 8
    for eight in range(whole):
        word = int(row[3 * eight]) | int(row[3 * eight + 1]) << 8 | int(row[3 * eight + 2]) << 16
        for i in range(8):
            out[8 * eight + i] = levels[(word >> 3 * i) & 7]
    for i in range(8 * whole, len(out)):
        out[i] = levels[_code(row, i, 3)]
