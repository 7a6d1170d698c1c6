"""Linear layers with quantized activations on a GPU: products of whole numbers, in Triton.

A token is x = s q + l and an output channel's weights are w = a c + m, with q and c in int8, so that

    sum over k of x w  =  s (a sum(q c) + m sum(q)) + l (a sum(c) + m K)

where only sum(q c), exact in int32, takes a product of matrices. l and m lie within the values' range, so no term is
much larger than the result may be; with zero points in place of them, whose products with the sums may overflow int32,
it would be otherwise.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from quant.activations import quantize_tokens
from quant.kernels import shapes
from quant.kernels.triton_decode import (
    check_bias,
    decode_int8,
    int8_codes,
    int8_form,
    is_supported,
    nearest,
    packed_arguments,
)
from quant.kernels.triton_fused import decoded, tile_for

MAX_CODEBOOK_BITS = 6  # of which levels lie far enough apart to be rounded to 255 steps
MOST_VALUES = 4096  # of a token taken at a time
FEW = {"ROWS": 16, "OUTPUTS": 16, "DEPTH": 256, "num_warps": 4, "num_stages": 4}
TILES = {  # by the most tokens
    64: {"ROWS": 64, "OUTPUTS": 64, "DEPTH": 128, "num_warps": 4, "num_stages": 3},
    None: {"ROWS": 128, "OUTPUTS": 128, "DEPTH": 128, "num_warps": 8, "num_stages": 3},
}
BAND = tl.constexpr(8)  # tiles of rows that are computed side by side, so that weights stay in the cache


@triton.jit
def quantize(
    x, out, form, tokens, count, TOP: tl.constexpr, LIMIT: tl.constexpr, CODES: tl.constexpr, COLUMNS: tl.constexpr
):
    """One token of x [tokens, count], as `quant.activations.quantize_tokens` with 2^b - 1 = TOP.

    CODES: to out [tokens, count], int8, its q, and to form [3, tokens] its s, l and sum of q. Otherwise: to out its
    quantized values, of which LIMIT is the largest.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * count
    out += row * count
    column = tl.arange(0, COLUMNS)
    lows, highs = tl.full((COLUMNS,), float("inf"), tl.float32), tl.full((COLUMNS,), float("-inf"), tl.float32)
    undefined = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, count, COLUMNS):
        inside = first + column < count
        values = tl.load(x + first + column, inside, 0).to(tl.float32)
        undefined |= (values != values).to(tl.int32)
        lows, highs = tl.minimum(lows, tl.where(inside, values, lows)), tl.maximum(highs, tl.where(inside, values, highs))
    low, high = tl.min(lows), tl.max(highs)
    scale = tl.div_rn(high * 0.5 - low * 0.5, tl.full([], TOP / 2, tl.float32))
    smallest = tl.full([], 1, tl.int32).to(tl.float32, bitcast=True)  # 2^-149, which written as a number is float64
    scale = tl.maximum(tl.where(low == high, tl.abs(low), scale), smallest)
    zero = nearest(tl.div_rn(-low, scale))
    scale = tl.where((tl.max(undefined) > 0) | (scale == float("inf")), float("nan"), scale)
    CENTER: tl.constexpr = (TOP + 1) // 2
    # A constant token's zero point is a step away from it, and its l would be the difference of two large numbers.
    offset = tl.where(low == high, low, scale * (CENTER - zero))
    total = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, count, COLUMNS):
        inside = first + column < count
        values = tl.load(x + first + column, inside, 0).to(tl.float32)
        codes = nearest(tl.div_rn(values, scale)) + zero
        codes = tl.minimum(tl.maximum(codes, 0), TOP)
        if CODES:
            codes = tl.where(low < high, tl.where(inside, codes - CENTER, 0), 0).to(tl.int8)
            tl.store(out + first + column, codes, inside)
            total += codes.to(tl.int32)
        else:
            values = (codes - zero) * scale
            values = tl.minimum(values, LIMIT, tl.PropagateNan.ALL)
            values = tl.maximum(values, -LIMIT, tl.PropagateNan.ALL)
            tl.store(out + first + column, values.to(out.dtype.element_ty), inside)
    if CODES:
        tl.store(form + row, scale)
        tl.store(form + tokens + row, offset)
        tl.store(form + 2 * tokens + row, tl.sum(total).to(tl.float32))


@triton.jit
def dequantized(total, x_form, a, m, w_sum, bias, rows, outputs, tokens, channels, count, BIASED: tl.constexpr):
    """Float32 outputs [R, N] of sums of q c (int32 [R, N]): see the head of this file."""
    s = tl.load(x_form + rows, rows < tokens, 0)
    offset = tl.load(x_form + tokens + rows, rows < tokens, 0)
    q = tl.load(x_form + 2 * tokens + rows, rows < tokens, 0)
    varying = s[:, None] * (total.to(tl.float32) * a[None, :] + q[:, None] * m[None, :])
    values = varying + offset[:, None] * (a * w_sum + m * count)[None, :]
    if BIASED:
        values += tl.load(bias + outputs, outputs < channels, 0).to(tl.float32)[None, :]
    return values


@triton.jit
def product(
    x,
    x_form,
    w,
    w_form,
    bias,
    out,
    tokens,
    channels,
    count,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of out [tokens, channels] from q = x [tokens, count] and c = w [channels, count], both int8."""
    row_tiles, output_tiles = tl.cdiv(tokens, ROWS), tl.cdiv(channels, OUTPUTS)
    band = tl.program_id(0) // (BAND * output_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * output_tiles)
    rows = (band * BAND + within % height) * ROWS + tl.arange(0, ROWS)
    outputs = within // height * OUTPUTS + tl.arange(0, OUTPUTS)
    depth = tl.arange(0, DEPTH)
    x_place = x + rows.to(tl.int64)[:, None] * count + depth[None, :]
    w_place = w + outputs.to(tl.int64)[:, None] * count + depth[None, :]
    total = tl.zeros((ROWS, OUTPUTS), tl.int32)
    for first in range(0, count, DEPTH):
        inside = (first + depth < count)[None, :]
        q = tl.load(x_place + first, (rows < tokens)[:, None] & inside, 0)
        c = tl.load(w_place + first, (outputs < channels)[:, None] & inside, 0)
        total = tl.dot(q, c.trans(), total)
    a = tl.load(w_form + outputs, outputs < channels, 0)
    m = tl.load(w_form + channels + outputs, outputs < channels, 0)
    w_sum = tl.load(w_form + 2 * channels + outputs, outputs < channels, 0)
    values = dequantized(total, x_form, a, m, w_sum, bias, rows, outputs, tokens, channels, count, BIASED)
    place = out + rows.to(tl.int64)[:, None] * channels + outputs[None, :]
    tl.store(place, values.to(out.dtype.element_ty), (rows < tokens)[:, None] & (outputs < channels)[None, :])


@triton.jit
def packed_product(
    x,
    x_form,
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
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`product` with weights that are decoded from packed rows in registers."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    depth = tl.arange(0, DEPTH)
    x_place = x + rows.to(tl.int64)[:, None] * count + depth[None, :]
    a, m = int8_form(table, zero, outputs, channels, last, BITS, AFFINE, SHARED)
    total = tl.zeros((ROWS, OUTPUTS), tl.int32)
    w_sum = tl.zeros((OUTPUTS,), tl.int32)
    for first in range(0, count, DEPTH):
        q = tl.load(x_place + first, (rows < tokens)[:, None] & (first + depth < count)[None, :], 0)
        c = int8_codes(
            packed, table, a, m, outputs, first, channels, count, row_bytes, last, BITS, PER, AFFINE, SHARED, DEPTH
        )
        total = tl.dot(q, c.trans(), total)
        w_sum += tl.sum(c.to(tl.int32), axis=1)
    values = dequantized(total, x_form, a, m, w_sum.to(tl.float32), bias, rows, outputs, tokens, channels, count, BIASED)
    place = out + rows.to(tl.int64)[:, None] * channels + outputs[None, :]
    tl.store(place, values.to(out.dtype.element_ty), (rows < tokens)[:, None] & (outputs < channels)[None, :])


def token_codes(x, act_bits):
    """Codes q (int8 [M, K]) of the tokens x [M, K], and each token's s, l and sum of q (float32 [3, M]): x = s q + l.

    q is the code that `quantize_tokens` rounds to less 2^(act_bits - 1); a constant token has q = 0 and l its value.
    """
    form = torch.empty(3, len(x), device=x.device)
    return _quantize(x, torch.empty(x.shape, dtype=torch.int8, device=x.device), form, act_bits), form


def token_values(x, act_bits):
    """The tokens x [M, K] quantized, in their own dtype: `quantize_tokens` in one launch."""
    return _quantize(x, torch.empty(x.shape, dtype=x.dtype, device=x.device), None, act_bits)


def _quantize(x, out, form, act_bits):
    columns = min(MOST_VALUES, max(128, triton.next_power_of_2(x.shape[1])))
    settings = {"TOP": 2**act_bits - 1, "LIMIT": torch.finfo(x.dtype).max, "CODES": form is not None}
    if out.numel():
        with torch.cuda.device_of(x):
            quantize[(len(x),)](x.contiguous(), out, form, *x.shape, COLUMNS=columns, **settings)
    return out


def int8_linear(x, codes, table, zero, bits, act_bits, bias):
    """Outputs [M, C] in the dtype of x [M, K]: quantized tokens times packed weights, in two launches or three."""
    (tokens, count), channels = x.shape, len(codes)
    check_bias(bias, codes)
    q, x_form = token_codes(x, act_bits)
    out = x.new_empty(tokens, channels)
    shared = {"BIASED": bias is not None}
    bias = x_form if bias is None else bias  # a pointer that is not read
    if tokens <= FEW["ROWS"]:
        tensors, arguments = packed_arguments(codes, table, zero, bits, count, 0)
        grid = (triton.cdiv(tokens, FEW["ROWS"]), triton.cdiv(channels, FEW["OUTPUTS"]))
        with torch.cuda.device_of(x):
            packed_product[grid](q, x_form, *tensors, bias, out, tokens, count=count, **arguments, **shared, **FEW)
        return out
    c, w_form = decode_int8(codes, table, zero, bits, count)
    tile = tile_for(TILES, tokens)
    grid = (triton.cdiv(tokens, tile["ROWS"]) * triton.cdiv(channels, tile["OUTPUTS"]),)
    with torch.cuda.device_of(x):
        product[grid](q, x_form, c, w_form, bias, out, tokens, channels, count, **shared, **tile)
    return out


def linear_a8_cuda(x, codes, table, zero, bits, act_bits, bias):
    """A linear layer of x [..., K], quantized per token to `act_bits`, and packed rows `codes` without groups.

    Three launches at most: the tokens, the weights, the product. As whole numbers ("int8") a codebook's levels are
    rounded to 255 steps, if it has no more than 2^6; else ("half") the product is F.linear's.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    tokens, supported = x.reshape(rows, x.shape[-1]), is_supported(x, table)
    whole = supported and rows and (zero is not None or bits <= MAX_CODEBOOK_BITS)
    if whole and shapes.chosen("linear_a8", x, rows, len(codes)) == "int8":
        out = int8_linear(tokens, codes, table, zero, bits, act_bits, bias)
    else:
        values = token_values(tokens, act_bits) if supported else quantize_tokens(tokens, act_bits)
        out = F.linear(values, decoded(x, codes, table, zero, bits, 0), bias)
    return out.view(*x.shape[:-1], len(codes))
