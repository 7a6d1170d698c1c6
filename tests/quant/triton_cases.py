"""What the Triton kernels are to compute, case by case: run by test_triton_numbers.py, in Triton's interpreter or on a GPU.

As a program: `triton_cases.py DEVICE CASE...` prints {case: what went wrong, or ""} as JSON.
"""

import contextlib
import itertools
import json
import sys
import traceback
from unittest import mock

import torch
import torch.nn.functional as F

from quant.activations import _token_range, quantize_tokens
from quant.kernels import shapes, triton_decode, triton_fused, triton_int8
from quant.kernels.decode import _decode_anywhere, _decode_cuda, decode
from quant.packing import pack_rows, unpack_rows

UAQ, AFFINE, CHANNEL, WHOLE = "UAQ", "affine", "K-Means-C", "K-Means-A"
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
CASES = {}


def case(*arguments):
    """Register what is decorated with each of the tuples of arguments."""

    def register(function):
        for each in arguments:
            name = " ".join(map(str, (function.__name__, *each)))
            CASES[name] = (function, each)
        return function

    return register


def packed_weight(kind, bits, channels, count, group=0, dtype=HALF):
    """Packed rows, table and zero points of random weights [channels, count]; a few zero points are no codes."""
    generator = torch.Generator().manual_seed(bits + count)
    lead = (channels, -(-count // group)) if group else (channels,)
    levels = 2**bits - (kind == CHANNEL)  # a codebook may be shorter than its codes reach
    codes = torch.randint(0, levels, (channels, count), dtype=torch.uint8, generator=generator)
    zero = None
    if kind == AFFINE:
        table = (torch.rand(lead, generator=generator) * 0.01 + 0.01).frexp().exponent.float().exp2()
        # Multiples of the scale that any table holds: nothing is rounded, see `decodes_exactly`; FMA or not.
        zero = (torch.randint(-5, 3, lead, generator=generator) * table / 2).to(dtype)
    elif kind == UAQ:
        table = torch.rand(lead, generator=generator) * 0.01 + 0.01
        table = table.frexp().exponent.float().exp2() if dtype == BFLOAT else table  # see `decodes_exactly`
        zero = torch.randint(-3, 2**bits + 3, lead, dtype=torch.int16, generator=generator)
    else:
        lead = lead if kind == CHANNEL else ()
        table = (torch.randn(*lead, levels, generator=generator) * 0.1).sort(dim=-1).values
    return pack_rows(codes, bits), table.to(dtype), zero


def decoded(codes, table, zero, bits, count, group=0):
    return _decode_anywhere(codes, table, zero, bits, count, group)


def on(device, *tensors):
    return [None if each is None else each.to(device) for each in tensors]


KINDS = (UAQ, CHANNEL, WHOLE)
OFFSETS = (
    (AFFINE, 4, HALF, 0),
    (AFFINE, 3, BFLOAT, 0),
    (AFFINE, 8, FLOAT, 0),
    (AFFINE, 3, HALF, 40),
    (AFFINE, 5, FLOAT, 32),
)


@case(*itertools.product(KINDS, (4, 3), (HALF, BFLOAT), (0,)), (UAQ, 2, HALF, 0), (WHOLE, 8, FLOAT, 0))
@case((UAQ, 4, HALF, 32), (UAQ, 3, HALF, 40), (CHANNEL, 4, FLOAT, 24), (CHANNEL, 3, HALF, 64))
@case((UAQ, 5, HALF, 0), (CHANNEL, 6, HALF, 0), (WHOLE, 7, FLOAT, 0))
@case(*OFFSETS)
@case(*itertools.product(KINDS, (2, 8), (HALF, BFLOAT), (0,)), *itertools.product(KINDS, (4, 3), (FLOAT,), (0,)))
def decodes_exactly(device, kind, bits, dtype, group):
    """To the last bit, at odd sizes and at whole tiles, also to another dtype.

    The interpreter truncates what a GPU rounds to bfloat16: UAQ's scales are powers of two there, and nothing is rounded.
    """
    for channels, count in ((3, 1), (33, 137), (2, 256)):
        weight = packed_weight(kind, bits, channels, count, group, dtype)
        expected = decoded(*weight, bits, count, group)
        others = {dtype, FLOAT} if dtype == BFLOAT else {dtype, FLOAT, HALF}
        for other in others:
            out = torch.full((channels, count), torch.nan, dtype=other, device=device)
            triton_decode.decode_into(out, *on(device, *weight), bits, group)
            assert torch.equal(out.cpu(), expected.to(other)), (channels, count, other)


@case(())
def rounds_as_the_tables_do(device):
    """Zero points that the tables' dtype cannot hold, and subnormal scales."""
    packed = pack_rows(torch.arange(16, dtype=torch.uint8).expand(4, 16).contiguous(), 4)
    zero = torch.tensor([2051, -4095, 30000, -70000], dtype=torch.int32)
    for dtype in (HALF, FLOAT):
        table = torch.tensor([0.1, 0.3, 6e-8, 1e-5]).to(dtype)
        out = torch.empty(4, 16, dtype=dtype, device=device)
        triton_decode.decode_into(out, *on(device, packed, table, zero), 4)
        assert torch.equal(out.cpu(), decoded(packed, table, zero, 4, 16))


@case(())
def codes_beyond_a_short_table_are_its_last(device):
    """A damaged file reads nothing outside its table."""
    packed = pack_rows(torch.tensor([[0, 2, 15], [15, 0, 1]], dtype=torch.uint8), 4)
    for table in (torch.tensor([-1.0, 2.0]), torch.tensor([[-1.0, 2.0], [-1.0, 2.0]])):
        out = torch.empty(2, 3, device=device)
        triton_decode.decode_into(out, *on(device, packed, table, None), 4)
        assert out.tolist() == [[-1, 2, 2], [2, -1, 2]]
        assert triton_decode.decode_int8(*on(device, packed, table, None), 4, 3)[0].tolist() == [
            [-127, 127, 127],
            [127, -127, 127],
        ]


@case(*itertools.product(KINDS, (4, 3), (HALF,)), (UAQ, 2, BFLOAT), (CHANNEL, 4, BFLOAT), (UAQ, 8, FLOAT))
@case(*itertools.product(KINDS, (4, 3), (FLOAT,)), (CHANNEL, 8, HALF), (AFFINE, 4, HALF), (AFFINE, 8, FLOAT))
def decodes_to_int8(device, kind, bits, dtype):
    for channels, count in ((3, 1), (5, 137), (2, 4100)):
        packed, table, zero = packed_weight(kind, bits, channels, count, dtype=dtype)
        c, (a, m, total) = (t.cpu() for t in triton_decode.decode_int8(*on(device, packed, table, zero), bits, count))
        weight = decoded(packed, table.double(), zero, bits, count)
        assert torch.equal(total, c.sum(dim=1).float())
        restored = a.double()[:, None] * c + m.double()[:, None]
        if kind in (UAQ, AFFINE):
            assert torch.equal(c, (unpack_rows(packed, bits, count).int() - 2 ** (bits - 1)).to(torch.int8))
            torch.testing.assert_close(restored, weight, rtol=0, atol=1e-6 * float(weight.abs().max()))
        else:
            ends = (table.double().expand(channels, -1).amax(dim=1) - table.double().expand(channels, -1).amin(dim=1))[
                :, None
            ]
            assert bool(((restored - weight).abs() <= ends / 254 * 0.501 + 1e-12).all())
            torch.testing.assert_close(a.double(), ends[:, 0] / 254, rtol=1e-6, atol=0)


def tokens_of_all_sorts(count, dtype):
    tokens = torch.randn(9, count, generator=torch.Generator().manual_seed(count))
    tokens[1] = tokens[1].abs() + 3
    tokens[2] = 1000 + tokens[2] * 0.3  # narrow, and far from zero
    tokens[3], tokens[4], tokens[5] = -2.75, 0, tokens[5] * 1e-7
    tokens[6] = tokens[6].sign() * 65504  # the largest of float16, which quantized values would pass
    tokens[7, 0], tokens[8, -1] = torch.nan, -torch.inf
    return tokens.to(dtype)


@case(*itertools.product((1, 77, 4200), (8, 6), (HALF, FLOAT)), (77, 8, BFLOAT))
def quantizes_tokens(device, count, bits, dtype):
    """The codes and the values of `quantize_tokens`, one by one."""
    tokens = tokens_of_all_sorts(count, dtype)
    q, form = triton_int8.token_codes(tokens.to(device), bits)
    scale, offset, total = form.cpu()
    expected_scale, zero = _token_range(tokens, 2**bits - 1)
    codes = (tokens / expected_scale).round().add(zero).clamp(0, 2**bits - 1)
    varying = (tokens.amin(dim=1) != tokens.amax(dim=1)) & tokens.isfinite().all(dim=1)
    assert torch.equal(scale[:7], expected_scale[:7, 0])
    assert torch.equal(q.cpu()[varying].float(), codes[varying] - 2 ** (bits - 1))
    assert torch.equal(total, q.cpu().sum(dim=1).float())
    restored = scale.double()[:, None] * q.cpu() + offset.double()[:, None]
    exact = (codes.double() - zero.double()) * expected_scale.double()
    size = tokens.double().abs().amax(dim=1, keepdim=True)
    assert bool(((restored - exact).abs() <= 1.2e-7 * size)[:7].all())
    assert torch.equal(restored[3], tokens[3].double()) and restored[7:].isnan().all()
    values = triton_int8.token_values(tokens.to(device), bits).cpu()
    if dtype != BFLOAT or device != "cpu":  # which the interpreter truncates
        torch.testing.assert_close(values, quantize_tokens(tokens, bits), rtol=0, atol=0, equal_nan=True)


def random_input(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).to(dtype)


ONE, FEW, ODD, MANY = (1, 300, 33), (17, 137, 70), (65, 256, 64), (130, 100, 130)  # rows, depth, outputs


@case(*itertools.product(KINDS, (4, 3), (ONE, FEW), (0,)), (UAQ, 4, FEW, 32), (CHANNEL, 3, FEW, 40))
@case((UAQ, 4, ODD, 0), (CHANNEL, 3, MANY, 0), (UAQ, 8, ONE, 0), (UAQ, 5, FEW, 0))
@case((AFFINE, 4, FEW, 0), (AFFINE, 3, ONE, 0), (AFFINE, 4, FEW, 32))
def fused_equals_the_decoded_layer(device, kind, bits, shape, group):
    rows, depth, outputs = shape
    x, weight = random_input(rows, depth, dtype=HALF), packed_weight(kind, bits, outputs, depth, group)
    for bias in (None, random_input(outputs, dtype=HALF)):
        out = triton_fused.fused(*on(device, x, *weight), bits, group, *on(device, bias)).cpu()
        exact = F.linear(x.double(), decoded(*weight, bits, depth, group).double())
        exact = exact if bias is None else exact + bias.double()
        assert out.dtype == HALF and out.shape == (rows, outputs)
        torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-5)


@case(*itertools.product(KINDS, (4, 3), (ONE,), (8,)), (CHANNEL, 3, ONE, 6), (CHANNEL, 8, ONE, 8))
@case((UAQ, 4, FEW, 8))
@case((UAQ, 4, MANY, 8), (WHOLE, 3, ODD, 8), (UAQ, 8, FEW, 8), (CHANNEL, 3, FEW, 6))
@case((AFFINE, 4, FEW, 8), (AFFINE, 3, ONE, 8), (AFFINE, 4, MANY, 8))
def whole_numbers_are_multiplied_exactly(device, kind, bits, shape, act_bits):
    """Float32 outputs are those of the quantized tokens and weights to some 1e-7 of the sum of the terms' sizes."""
    rows, depth, outputs = shape
    x = random_input(rows, depth, dtype=FLOAT)
    x[0] = 1000 + x[0] * 0.3
    x[-1] = x[-1] if rows == 1 else -2.75
    weight, bias = packed_weight(kind, bits, outputs, depth, dtype=FLOAT), random_input(outputs, dtype=FLOAT)
    if kind == UAQ:
        weight[2][1] = -2000  # a narrow channel, far from zero
    out = triton_int8.int8_linear(*on(device, x, *weight), bits, act_bits, *on(device, bias)).cpu()
    scale, zero = (t.double() for t in _token_range(x, 2**act_bits - 1))
    codes = (x / scale.float()).round().add(zero.float()).clamp(0, 2**act_bits - 1).double()
    values = (codes - zero) * scale
    c, (a, m, _) = (t.cpu().double() for t in triton_decode.decode_int8(*on(device, *weight), bits, depth))
    whole = a[:, None] * c + m[:, None]
    size = F.linear(values.abs(), whole.abs())
    assert bool(((out.double() - F.linear(values, whole) - bias.double()).abs() <= 3e-7 * size + 1e-6).all())
    without = triton_int8.int8_linear(*on(device, x, *weight), bits, act_bits, None).cpu()
    assert bool(((out - bias - without).abs() <= 3e-7 * size + 1e-6).all())


@case(("linear", "fused", 1, "linear"), ("linear", "fused", 40, "linear"))
@case(("linear", "scratch", 1, "decode_to_floats F.linear"), ("linear_a8", "half", 2, "quantize decode_to_floats F.linear"))
@case(("linear_a8", "int8", 2, "quantize packed_product"), ("linear_a8", "int8", 40, "quantize decode_to_int8 product"))
def operators_take_the_way_that_is_chosen(device, operator, way, rows, launches):
    """In as many launches as it may, for half-precision inputs [..., K] that are not contiguous."""
    depth, outputs = 72, 40
    x = random_input(2, depth, rows, dtype=HALF).mT
    weight, bias = packed_weight(UAQ, 4, outputs, depth), random_input(outputs, dtype=HALF)
    capability = torch.cuda.get_device_capability() if device == "cuda" else (9, 0)
    shapes.use({shapes.key(operator, capability, 2 * rows, depth, outputs): way})
    with counted() as counts:
        if operator == "linear":
            out = triton_fused.linear_cuda(*on(device, x, *weight), 4, 0, *on(device, bias))
        else:
            out = triton_int8.linear_a8_cuda(*on(device, x, *weight), 4, 8, *on(device, bias))
    assert " ".join(counts) == launches, counts
    values = quantize_tokens(x.float(), 8) if operator == "linear_a8" else x.float()
    expected = F.linear(values, decoded(*weight, 4, depth).float(), bias.float())
    assert out.shape == (2, rows, outputs) and out.dtype == HALF
    torch.testing.assert_close(out.cpu().float(), expected, rtol=5e-3, atol=5e-3)


@contextlib.contextmanager
def counted():
    """A list, to which the kernels and products that are run while it is entered add their names."""
    launches = []

    class Counting:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launches.append(self.name)
            return self.kernel[grid]

    kernels = {
        triton_decode: ("decode_to_floats", "decode_to_int8"),
        triton_fused: ("linear",),
        triton_int8: ("quantize", "product", "packed_product"),
    }
    with contextlib.ExitStack() as stack:
        real = F.linear
        stack.enter_context(mock.patch.object(F, "linear", lambda *each: launches.append("F.linear") or real(*each)))
        for module, names in kernels.items():
            for name in names:
                stack.enter_context(mock.patch.object(module, name, Counting(name, getattr(module, name))))
        yield launches


@case((HALF,), (torch.float64,))
def the_operator_decodes(device, dtype):
    weight = packed_weight(UAQ, 4, 5, 37, dtype=dtype)
    assert torch.equal(_decode_cuda(*on(device, *weight), 4, 37, 0).cpu(), decode(*weight, 4, 37))


@case(())
def what_kernels_do_not_take_is_left_to_pytorch(device):
    """Double precision, no rows."""
    weight = packed_weight(UAQ, 4, 5, 24)
    for x in (random_input(3, 24, dtype=torch.float64), random_input(0, 24, dtype=HALF)):
        out = triton_fused.linear_cuda(*on(device, x, *weight), 4, 0, None)
        expected = F.linear(x, decoded(*weight, 4, 24).to(x.dtype))
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-12, atol=1e-12)
        out = triton_int8.linear_a8_cuda(*on(device, x, *weight), 4, 8, None)
        assert out.shape == (len(x), 5) and out.dtype == x.dtype


def failure(device, name):
    function, arguments = CASES[name]
    try:
        function(device, *arguments)
    except Exception:
        return traceback.format_exc()
    finally:
        shapes.use({})
    return ""


if __name__ == "__main__":
    shapes.use({})
    print(json.dumps({name: failure(sys.argv[1], name) for name in sys.argv[2:] or CASES}))
