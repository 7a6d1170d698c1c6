"""Linear layers on a GPU that decode their packed weights in registers, in Triton.

For a few rows of inputs the time goes into reading weights, of which packed ones are a quarter; for many rows decoding
once to a buffer and the vendor's product is faster. `quant/kernels/shapes.py` says which of the two is taken.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from quant.kernels import shapes
from quant.kernels.decode import decode
from quant.kernels.triton_decode import (
    check_bias,
    decode_into,
    is_supported,
    packed_arguments,
    row_tables,
    tables_group,
    weights,
)

HALVES = (torch.float16, torch.bfloat16)
TILES = {  # by the most rows of inputs
    16: {"ROWS": 16, "OUTPUTS": 16, "DEPTH": 256, "num_warps": 4, "num_stages": 4},  # narrow and deep: many, in few steps
    64: {"ROWS": 64, "OUTPUTS": 64, "DEPTH": 64, "num_warps": 4, "num_stages": 3},
    None: {"ROWS": 128, "OUTPUTS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3},
}


@triton.jit
def linear(
    x,
    packed,
    table,
    zero,
    bias,
    out,
    tokens,
    channels,
    count,
    row_bytes,
    last,
    BIASED: tl.constexpr,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    AFFINE: tl.constexpr,
    SHARED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of out [tokens, channels] = x [tokens, count] times the decoded weights [channels, count], and the bias."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    depth = tl.arange(0, DEPTH)
    place = x + rows.to(tl.int64)[:, None] * count + depth[None, :]
    scale, shift = row_tables(table, zero, outputs, channels, AFFINE, GROUP)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, count, DEPTH):
        inputs = tl.load(place + first, (rows < tokens)[:, None] & (first + depth < count)[None, :], 0)
        own = weights(
            *(packed, table, zero, scale, shift, outputs, first, channels, count, row_bytes, last),
            *(BITS, PER, AFFINE, SHARED, GROUP, DEPTH),
        )
        total = tl.dot(inputs, own.to(inputs.dtype).trans(), total)
    if BIASED:
        total += tl.load(bias + outputs, outputs < channels, 0).to(tl.float32)[None, :]
    place = out + rows.to(tl.int64)[:, None] * channels + outputs[None, :]
    tl.store(place, total.to(out.dtype.element_ty), (rows < tokens)[:, None] & (outputs < channels)[None, :])


def tile_for(tiles, rows):
    """The tile for so many rows of inputs, of tiles by the most rows that each is for."""
    return next(tile for most, tile in tiles.items() if most is None or rows <= most)


def fused(x, codes, table, zero, bits, group, bias):
    """F.linear of x [M, K], float16 or bfloat16, and packed weights, in one launch."""
    count = x.shape[1]
    check_bias(bias, codes)
    tensors, arguments = packed_arguments(codes, table, zero, bits, count, group)
    out = x.new_empty(len(x), len(codes))
    tile = tile_for(TILES, len(x))
    grid = (triton.cdiv(len(x), tile["ROWS"]), triton.cdiv(len(codes), tile["OUTPUTS"]))
    with torch.cuda.device_of(x):
        linear[grid](
            *(x.contiguous(), *tensors, table if bias is None else bias, out, len(x)),
            count=count,
            BIASED=bias is not None,
            GROUP=tables_group(group, count),
            **arguments,
            **tile,
        )
    return out


def linear_cuda(x, codes, table, zero, bits, group, bias):
    """F.linear(x, decoded weights, bias) for x [..., K] and packed rows `codes`; see quant/kernels/decode.py.

    One launch, or one more than F.linear takes. The weights are rounded to the table's dtype and then to that of x.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    if rows and x.dtype in HALVES and is_supported(table) and shapes.chosen("linear", x, rows, len(codes)) == "fused":
        return fused(x.reshape(rows, -1), codes, table, zero, bits, group, bias).view(*x.shape[:-1], -1)
    return F.linear(x, decoded(x, codes, table, zero, bits, group), bias)


def decoded(x, codes, table, zero, bits, group):
    """The weights in the dtype of x, their inputs [..., K]: in one launch where there is a kernel for it."""
    count = x.shape[-1]
    if is_supported(x, table):
        return decode_into(x.new_empty(len(codes), count), codes, table, zero, bits, group)
    return decode(codes, table, zero, bits, count, group).to(x.dtype)
