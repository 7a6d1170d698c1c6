"""The least-squares affine quantizer: against all assignments of codes, UAQ, plain grids, and itself by other routes."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from quant import affine, uaq
from quant.affine import SortedRows
from quant.kernels import int8, products
from quant.kernels.decode import _decode_anywhere, decode
from quant.packing import pack_rows
from quant.registry import quantizer
from quant.rows import sorted_rows


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared_errors(weight, scale, offset, bits):
    quantized = affine.dequantize(affine.quantize(weight, scale, offset, bits), scale, offset)
    return (weight.double() - quantized.double()).square().flatten(1).sum(dim=1)


def least_error(row, levels):
    """The least squared error of any scale and offset: regression on every ascending assignment of codes."""
    row, best = row.double().sort().values, float("inf")
    for codes in itertools.combinations_with_replacement(range(levels), len(row)):
        x = torch.tensor([[code, 1] for code in codes], dtype=torch.float64)
        if codes[0] < codes[-1]:
            best = min(best, (row - x @ torch.linalg.lstsq(x, row[:, None]).solution[:, 0]).square().sum().item())
    return best


def test_close_to_the_best_of_all_assignments():
    weight = random(12, 6) ** 3
    errors = squared_errors(weight, *affine.fit(weight, [2], sorted_rows(weight))[2], 2)
    least = torch.tensor([least_error(row, 4) for row in weight])
    assert bool((errors >= least * (1 - 1e-5)).all())
    assert (errors / least).median() < 1.001 and errors.sum() < 1.02 * least.sum()


def weights():
    yield "normal", random(40, 160)
    yield "heavy_tailed", random(40, 160) ** 3
    yield "one_sign", random(40, 160).abs() + 0.3
    yield "far_from_zero", random(40, 160) + 50
    yield "an_outlier", torch.cat([random(40, 159), torch.full((40, 1), 40.0)], dim=1)


@pytest.mark.parametrize(("name", "weight"), weights())
def test_never_worse_than_uaq_and_the_plain_grid(name, weight):
    weight = weight * 0.02
    for bits, (scale, offset) in affine.fit(weight, range(2, 9), sorted_rows(weight)).items():
        errors = squared_errors(weight, scale, offset, bits)
        low, high = weight.aminmax(dim=1)
        assert bool((errors <= squared_errors(weight, (high - low) / (2**bits - 1), low, bits) * 1.0001).all()), bits
        tables = uaq.fit(weight, bits)
        published = (uaq.dequantize(uaq.quantize(weight, *tables, bits), *tables) - weight).square().sum(dim=1)
        assert bool((errors <= published * 1.0001).all()), bits
        if bits <= 4:
            assert errors.sum() < 0.99 * published.sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_the_tables_costs_little(dtype):
    """A plainly rounded scale of bfloat16 moves the last of 2^8 levels by up to half a step."""
    weight = (random(64, 200) * 0.02).to(dtype)
    for bits in (3, 8):
        scale, offset = affine.fit(weight, [bits], sorted_rows(weight))[bits]
        assert scale.dtype == offset.dtype == dtype
        exact = affine.fit(weight.float(), [bits])[bits]
        errors = squared_errors(weight.float(), scale.float(), offset.float(), bits).sum()
        plain = squared_errors(weight.float(), *(each.to(dtype).float() for each in exact), bits).sum()
        assert errors <= plain and errors <= 1.06 * squared_errors(weight.float(), *exact, bits).sum()


def test_constant_channels_are_exact():
    weight = torch.tensor([[0.7] * 5, [-0.3] * 5, [0.0] * 5, [1000.0] * 5])
    for dtype in (torch.float16, torch.float32, torch.float64):
        own = weight.to(dtype)
        parameters = quantizer("affine-4").fit(own)
        assert torch.equal(quantizer("affine-4").apply(own, parameters), own)


@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e17])
def test_any_device_finds_the_same(factor):
    """The compiled search beside torch's."""
    weight = random(50, 90) ** 3 * factor
    for bits in (2, 4, 6):
        scale, offset = affine.fit(weight, [bits], sorted_rows(weight))[bits]
        rows = SortedRows(weight.sort(dim=1).values)
        tables = rows.search(affine.starts(rows.low, rows.high, rows.mean, bits), bits)
        torch.testing.assert_close(
            rows.errors(*tables, bits), rows.errors(scale.double(), offset.double(), bits), rtol=1e-4, atol=0
        )
        own = squared_errors(weight.double(), scale.double(), offset.double(), bits)
        torch.testing.assert_close(own, rows.errors(scale.double(), offset.double(), bits), rtol=1e-9, atol=0)


def test_weights_of_inputs_are_like_repeated_columns():
    weight, counts = random(8, 20), torch.arange(20) % 4 + 1
    repeated = weight.repeat_interleave(counts, dim=1)
    fitted = quantizer("affine-3").fit(weight, SimpleNamespace(diagonal=counts.float()))
    plain = quantizer("affine-3").fit(repeated)
    for name, table in fitted.items():
        torch.testing.assert_close(table, plain[name], rtol=1e-4, atol=1e-5)


def test_weighted_errors_are_lower_where_inputs_count():
    weight, diagonal = random(16, 4, 3, 3).half(), random(36, seed=1).exp() ** 3
    diagonal[:5] = 0
    for word in ("affine-3", "affine-3-g16"):
        own, plain = quantizer(word).fit(weight, SimpleNamespace(diagonal=diagonal)), quantizer(word).fit(weight)
        errors = [
            ((quantizer(word).apply(weight, each) - weight).flatten(1).double() ** 2 * diagonal).sum()
            for each in (own, plain)
        ]
        assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("bits", "group"), [(2, 0), (3, 0), (4, 4), (5, 16), (8, 4)])
def test_decoding_packed_rows(bits, group, dtype):
    codes = torch.randint(0, 2**bits, (5, 37), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    lead = (5, -(-37 // group)) if group else (5, 1)
    scale, offset = (random(*lead).abs() + 0.01).to(dtype), random(*lead, seed=1).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    by_hand = [each.to(wide).repeat_interleave(group or 37, dim=1)[:, :37] for each in (scale, offset)]
    expected = (codes.to(wide) * by_hand[0] + by_hand[1]).to(dtype)
    tables = (scale, offset) if group else (scale[:, 0], offset[:, 0])
    for decoding in (decode, _decode_anywhere):
        assert torch.equal(decoding(pack_rows(codes, bits), *tables, bits, 37, group), expected)


@pytest.mark.skipif(not int8.has_units(), reason="this processor multiplies int8 no faster than floats")
@pytest.mark.parametrize("far", [0, 30])
def test_products_of_whole_numbers(far):
    weight, tokens, bias = random(40, 70) * 0.1 + far, random(9, 70, seed=1) + 1, random(40, seed=2)
    for bits in (3, 4, 8):
        word = quantizer(f"affine-{bits}")
        parameters = word.fit(weight)
        packed = pack_rows(word.encode(weight, parameters), bits), parameters["scale"], parameters["offset"]
        expected = F.linear(
            products.quantize_tokens(tokens, 8).double(), word.apply(weight, parameters).double(), bias.double()
        )
        given = products.linear_a8(tokens, *packed, bits, 8, bias)
        assert (given - expected).norm() < 2e-6 * expected.norm()
