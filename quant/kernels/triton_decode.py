"""Packed codes to weights on a GPU, in Triton: to a buffer of floats, or to int8 for products of whole numbers.

A tile of codes is unpacked in registers: so many bytes as hold a whole number of codes (quant/packing.py) make a word,
which is shifted to each of its codes. What the codes stand for is computed or looked up with the roundings of
quant/kernels/decode.py, to the last bit.
"""

import functools

import torch
import triton
import triton.language as tl

from quant.doors import expect
from quant.kernels.decode import check_shapes
from quant.packing import group_of

ROWS, COLUMNS = 32, 128  # of a tile that is decoded to floats
MOST_COLUMNS = 2048  # of a row that is decoded to int8 at a time
ZEROS, OFFSETS = tl.constexpr(1), tl.constexpr(2)  # AFFINE, what there is beside scales; 0: there are codebooks
FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # of tables and of outputs


@triton.jit
def unpacked(packed, row_bytes, rows, first, channels, BITS: tl.constexpr, PER: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes [R, COLUMNS], int32, of the channels `rows` [R] from code `first` (a multiple of PER) on; 0 past the end.

    PER codes share PER x BITS / 8 bytes.
    """
    WIDTH: tl.constexpr = PER * BITS // 8
    byte = (first // PER + tl.arange(0, COLUMNS // PER))[None, :] * WIDTH
    inside = (rows < channels)[:, None] & (byte < row_bytes)
    place = packed + rows.to(tl.int64)[:, None] * row_bytes + byte
    word = tl.load(place, inside, 0).to(tl.int64 if WIDTH > 4 else tl.int32)
    for i in tl.static_range(1, WIDTH):
        word |= tl.load(place + i, inside, 0).to(word.dtype) << (8 * i)
    if PER == 1:
        codes = word
    else:
        shifts = (tl.arange(0, PER) * BITS).to(word.dtype)
        codes = (word[:, :, None] >> shifts[None, None, :]).to(tl.int32) & ((1 << BITS) - 1)
    return codes.reshape(rows.shape[0], COLUMNS)


@triton.jit
def rounded_zero(zero, dtype: tl.constexpr):
    """Zero points, or offsets, as the tables' dtype holds them, in float32."""
    return zero.to(tl.float32).to(dtype).to(tl.float32)


@triton.jit
def affine(codes, scale, zero, AFFINE: tl.constexpr):
    """(code - zero) x scale, both rounded to the scale's dtype; `zero` as `rounded_zero` gives it.

    With offsets code x scale + zero, which a GPU may round once where the CPU rounds float32 twice.
    """
    if AFFINE == OFFSETS:
        values = codes.to(tl.float32) * scale.to(tl.float32) + zero
    else:
        values = (codes.to(tl.float32) - zero).to(scale.dtype).to(tl.float32) * scale.to(tl.float32)
    return values.to(scale.dtype)


@triton.jit
def row_tables(table, zero, rows, channels, AFFINE: tl.constexpr, GROUP: tl.constexpr):
    """Scale and zero point [R] of each channel of `rows`, where these have one each; else nothing that is used."""
    if AFFINE and GROUP == 0:
        scale = tl.load(table + rows, rows < channels, 0)
        shift = rounded_zero(tl.load(zero + rows, rows < channels, 0), scale.dtype)
    else:
        scale, shift = rows, rows
    return scale, shift


@triton.jit
def weights(
    packed,
    table,
    zero,
    scale,
    shift,
    rows,
    first,
    channels,
    count,
    row_bytes,
    last,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    AFFINE: tl.constexpr,
    SHARED: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Weights [R, COLUMNS], in the table's dtype, of the channels `rows` [R] from code `first` on; 0 past the end.

    `scale` and `shift` are those of `row_tables`, `last` the last index of a codebook. AFFINE: scales and ZEROS or OFFSETS;
    SHARED: one codebook for all rows; GROUP weights of a row have a table of their own, 0: all.
    """
    codes = unpacked(packed, row_bytes, rows, first, channels, BITS, PER, COLUMNS)
    column = (first + tl.arange(0, COLUMNS))[None, :]
    row = rows[:, None]
    inside = (row < channels) & (column < count)
    own = row * tl.cdiv(count, GROUP) + column // GROUP if GROUP else row
    if AFFINE and GROUP:
        scales = tl.load(table + own, inside, 0)
        values = affine(codes, scales, rounded_zero(tl.load(zero + own, inside, 0), scales.dtype), AFFINE)
    elif AFFINE:
        values = tl.where(inside, affine(codes, scale[:, None], shift[:, None], AFFINE), 0)
    else:
        own = (0 if SHARED else own * (last + 1)) + tl.minimum(codes, last)
        values = tl.load(table + own, inside, 0)
    return values


@triton.jit
def decode_to_floats(
    packed,
    table,
    zero,
    out,
    channels,
    count,
    row_bytes,
    last,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    AFFINE: tl.constexpr,
    SHARED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out [channels, count]: a tile of it."""
    rows, first = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS
    scale, shift = row_tables(table, zero, rows, channels, AFFINE, GROUP)
    values = weights(
        *(packed, table, zero, scale, shift, rows, first, channels, count, row_bytes, last),
        *(BITS, PER, AFFINE, SHARED, GROUP, COLUMNS),
    )
    column = (first + tl.arange(0, COLUMNS))[None, :]
    place = out + rows.to(tl.int64)[:, None] * count + column
    tl.store(place, values.to(out.dtype.element_ty), (rows < channels)[:, None] & (column < count))


@triton.jit
def int8_form(table, zero, rows, channels, last, BITS: tl.constexpr, AFFINE: tl.constexpr, SHARED: tl.constexpr):
    """Float32 a and m [R] of w = a c + m for whole numbers c, -128 to 127, of each channel of `rows` [R].

    With scales c is the code less 2^(BITS - 1). A codebook's c is the nearest of 255 steps between its ends.
    """
    if AFFINE:
        scale, shift = row_tables(table, zero, rows, channels, AFFINE, 0)
        a = scale.to(tl.float32)
        half = 1 << (BITS - 1)
        m = a * half + shift if AFFINE == OFFSETS else a * (half - shift)
    else:
        level = tl.minimum(tl.arange(0, 1 << BITS), last)[None, :]
        own = rows[:, None] * (0 if SHARED else last + 1)
        levels = tl.load(table + own + level, (rows < channels)[:, None], 0).to(tl.float32)
        low, high = tl.min(levels, axis=1) * 0.5, tl.max(levels, axis=1) * 0.5  # halved, so that no sum overflows
        a = tl.maximum(tl.div_rn(high - low, tl.full(low.shape, 127, tl.float32)), 2.0**-126)
        m = high + low
    return a, m


@triton.jit
def nearest(values):
    """Float32 values rounded to whole numbers, halves to even ones."""
    # Beside 2^23 float32 holds whole numbers alone; beyond it all values are whole.
    size = tl.abs(values)
    whole = (size + 8388608.0) - 8388608.0
    return tl.where(size < 8388608.0, tl.where(values < 0, -whole, whole), values)


@triton.jit
def int8_codes(
    packed,
    table,
    a,
    m,
    rows,
    first,
    channels,
    count,
    row_bytes,
    last,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    AFFINE: tl.constexpr,
    SHARED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Whole numbers c [R, COLUMNS], int8, of `int8_form`: channels `rows` [R], code `first` and on; 0 past the end."""
    codes = unpacked(packed, row_bytes, rows, first, channels, BITS, PER, COLUMNS)
    inside = (rows < channels)[:, None] & (first + tl.arange(0, COLUMNS) < count)[None, :]
    if AFFINE:
        steps = codes - (1 << (BITS - 1))
    else:
        place = tl.minimum(codes, last) + rows[:, None] * (0 if SHARED else last + 1)
        inverse = tl.div_rn(tl.full(a.shape, 1, tl.float32), a)[:, None]
        steps = nearest((tl.load(table + place, inside, 0).to(tl.float32) - m[:, None]) * inverse)
    return tl.where(inside, steps, 0).to(tl.int8)


@triton.jit
def decode_to_int8(
    packed,
    table,
    zero,
    out,
    form,
    channels,
    count,
    row_bytes,
    last,
    BITS: tl.constexpr,
    PER: tl.constexpr,
    AFFINE: tl.constexpr,
    SHARED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One channel of out [channels, count], and its a, m and sum in form [3, channels]."""
    row = tl.program_id(0) + tl.arange(0, 1)
    a, m = int8_form(table, zero, row, channels, last, BITS, AFFINE, SHARED)
    total = tl.zeros((1, COLUMNS), tl.int32)
    for first in range(0, count, COLUMNS):
        codes = int8_codes(
            packed, table, a, m, row, first, channels, count, row_bytes, last, BITS, PER, AFFINE, SHARED, COLUMNS
        )
        column = (first + tl.arange(0, COLUMNS))[None, :]
        tl.store(out + row.to(tl.int64)[:, None] * count + column, codes, column < count)
        total += codes.to(tl.int32)
    tl.store(form + row, a)
    tl.store(form + channels + row, m)
    tl.store(form + 2 * channels + row, tl.sum(total, axis=1).to(tl.float32))


def is_supported(*tensors):
    """Whether the kernels take such floats where they are: not float64, and on no GPU but NVIDIA's from Ampere on.

    A CPU counts too: Triton's interpreter runs there.
    """
    return all(tensor.dtype in FLOATS and _is_supported_device(tensor.device) for tensor in tensors)


@functools.cache
def _is_supported_device(device):
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def packed_arguments(codes, table, zero, bits, count, group):
    """What all kernels take of packed rows: (tensors, {argument: number}); ValueError where they do not belong together."""
    check_shapes(codes, table, zero, bits, count, group)
    devices = {each.device for each in (codes, table, zero) if each is not None}
    if len(devices) > 1:
        raise ValueError(f"packed codes and tables are on {', '.join(sorted(map(str, devices)))}, not on one device")
    affine = 0 if zero is None else (OFFSETS if zero.is_floating_point() else ZEROS).value
    tensors = codes.contiguous(), table.contiguous(), zero.contiguous() if affine else table
    numbers = {"channels": len(codes), "row_bytes": codes.shape[1], "last": 0 if affine else table.shape[-1] - 1}
    constants = {"BITS": bits, "PER": group_of(bits)[0], "AFFINE": affine, "SHARED": not affine and table.ndim == 1}
    return tensors, numbers | constants


def check_bias(bias, codes):
    """ValueError unless `bias`, if any, is one number for each output channel of the packed rows, where these are."""
    if bias is not None:
        expect("bias", bias, (len(codes),), *FLOATS)
        if bias.device != codes.device:
            raise ValueError(f"the bias is on {bias.device}, the packed codes on {codes.device}")


def decode_into(out, codes, table, zero, bits, group=0):
    """Fill `out` [C, count] of float16, bfloat16 or float32 with decoded weights, as `decode` and `.to(out.dtype)` do."""
    count = out.shape[1]
    expect("out", out, (len(codes), count), *FLOATS)
    tensors, arguments = packed_arguments(codes, table, zero, bits, count, group)
    grid = (triton.cdiv(len(codes), ROWS), triton.cdiv(count, COLUMNS))
    if out.numel():
        with torch.cuda.device_of(out):
            decode_to_floats[grid](
                *tensors, out, count=count, GROUP=tables_group(group, count), ROWS=ROWS, COLUMNS=COLUMNS, **arguments
            )
    return out


def tables_group(group, count):
    """Weights of a row that have a table of their own; 0 where all have one."""
    return group if group and group < count else 0


def decode_int8(codes, table, zero, bits, count):
    """Whole numbers c (int8 [C, count]) and a, m and the sum of c of each channel (float32 [3, C]): w = a c + m.

    Of scales these are the weights but for the rounding to the tables' dtype. Of a codebook they are the nearest of 255
    steps between its least and its largest level.
    """
    tensors, arguments = packed_arguments(codes, table, zero, bits, count, 0)
    out = torch.empty(len(codes), count, dtype=torch.int8, device=codes.device)
    form = torch.empty(3, len(codes), device=codes.device)
    columns = min(MOST_COLUMNS, max(128, triton.next_power_of_2(count)))
    with torch.cuda.device_of(out):
        decode_to_int8[(len(codes),)](*tensors, out, form, count=count, COLUMNS=columns, **arguments)
    return out, form
