import numpy as np
import pytest
import torch

from quant import uaq
from quant.rows import sorted_rows


def published_search(channel, bits):
    """The published procedure for one channel, step by step, in float32: (scale, zero point, error)."""
    best = (None, None, 1e10)
    for percent in np.linspace(0, 90, 10):
        high, low = channel.max() * (1.0 - percent * 0.01), channel.min() * (1.0 - percent * 0.01)
        scale = (high - low) / (2**bits - 1)
        zero_point = (-low / scale).round()
        codes = torch.clamp(torch.round(channel / scale) + zero_point, 0, 2**bits - 1)
        error = ((codes - zero_point) * scale - channel).abs().pow(2.4).mean()
        if error < best[2]:
            best = (scale, zero_point, error)
    return best


@pytest.mark.parametrize("bits", [4, 3])
def test_equals_published_search(bits):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(bits)) ** 3
    weight[:5] = weight[:5].abs()  # channels that do not straddle zero
    scale, zero_point = uaq.fit(weight, bits)
    for channel, s, z in zip(weight, scale, zero_point, strict=True):
        expected_scale, expected_zero, _ = published_search(channel, bits)
        assert s.item() == pytest.approx(expected_scale.item(), rel=1e-6)
        assert z == expected_zero


@pytest.mark.parametrize("bits", [4, 3])
def test_outliers_are_cut_off(bits):
    """One far weight among many: the search goes down to its small shrinks, as the published one does."""
    weight = torch.randn(1, 40_000, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 40
    scale, zero_point = uaq.fit(weight, bits)
    expected_scale, expected_zero, _ = published_search(weight[0], bits)
    assert scale.item() == pytest.approx(expected_scale.item(), rel=1e-6) and zero_point.item() == expected_zero
    assert scale * (2**bits - 1) < 0.45 * (weight.max() - weight.min())


def test_by_hand():
    weight = torch.tensor([[-1.0, 0.0, 1.0, 6.0]])
    scale, zero_point = uaq.fit(weight, 3)  # a grid of step 1 from -1 to 6 holds every weight
    assert scale.tolist() == [1.0] and zero_point.tolist() == [1.0]
    codes = uaq.quantize(weight, scale, zero_point, 3)
    assert codes.tolist() == [[0, 1, 2, 7]]
    assert torch.equal(uaq.dequantize(codes, scale, zero_point), weight)


def test_constant_channels_are_exact():
    weight = torch.tensor([[0.7] * 5, [-0.3] * 5, [0.0] * 5])
    scale, zero_point = uaq.fit(weight, 4)
    codes = uaq.quantize(weight, scale, zero_point, 4)
    assert torch.equal(uaq.dequantize(codes, scale, zero_point), weight)


@pytest.mark.parametrize("shape", [(6, 30), (6, 10, 3), (6, 5, 3, 2)])
def test_any_shape(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale, zero_point = uaq.fit(weight, 4)
    flat_scale, flat_zero = uaq.fit(weight.reshape(6, -1), 4)
    assert torch.equal(scale, flat_scale) and torch.equal(zero_point, flat_zero)
    restored = uaq.dequantize(uaq.quantize(weight, scale, zero_point, 4), scale, zero_point)
    assert restored.shape == weight.shape and (restored - weight).abs().mean() < 0.2


@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e17])
def test_any_magnitude(factor):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * factor
    scale, zero_point = uaq.fit(weight, 4)
    restored = uaq.dequantize(uaq.quantize(weight, scale, zero_point, 4), scale, zero_point)
    assert (restored / factor - weight / factor).abs().mean() < 0.15


def test_error_by_hand():
    weight, quantized = torch.zeros(2, 4), torch.tensor([[1.0, 0, 0, 0], [2.0, 2.0, 0, 0]])
    assert uaq.mean_error(weight, quantized).tolist() == pytest.approx([1 / 4, 2 * 2**2.4 / 4])


@pytest.mark.parametrize("factor", [1e-20, 0.03, 1e17])
def test_fast_search_picks_the_same(factor):
    """The CPU's search against torch's: the same shrink, so the same scale and zero point, in every channel."""
    weight = torch.randn(300, 130, generator=torch.Generator().manual_seed(0)) ** 3 * factor
    weight[:50] = weight[:50].abs()
    weight[0], weight[1], weight[2] = 0.7 * factor, -0.3 * factor, 0
    fast = uaq.fit_rows(sorted_rows(weight), (4, 3))
    for bits, (scale, zero_point) in fast.items():
        expected_scale, expected_zero = uaq.fit(weight, bits)
        assert torch.equal(scale, expected_scale) and torch.equal(zero_point, expected_zero)
