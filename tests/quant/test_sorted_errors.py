import numpy as np
import pytest
import torch

from quant import registry, sorted_errors
from quant.power import sum_of_powers
from quant.registry import quantizer

WORDS = (
    *registry.SEARCH_SPACE,
    "mse-8",
    "kmeans-6",
    "kmeans_all-7",
    "mse-4-g64",
    "kmeans-3-g50",
    "mse-2-g500",
    "affine-4",
    "affine-8-g64",
)


def weights():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 3, 60, generator=generator) ** 3 * 0.02
    yield "heavy_tailed", weight
    yield "far_from_zero", weight + 3
    yield "one_sign", -weight.abs()
    yield "few_values", (weight * 20).round() / 20
    yield "tiny", weight * 1e-4
    yield "large", weight * 1e4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "weight"), weights())
def test_errors_are_those_of_the_quantized_weight(name, weight, dtype):
    """The fast route, code changes in sorted rows, against quantizing and subtracting, rounding for rounding."""
    weight = weight.to(dtype)
    parameters, errors = registry.fit_with_errors(weight, WORDS)
    for word, own in parameters.items():
        assert errors[word] == pytest.approx(quantizer(word).error(weight, own), rel=2e-6), word


def test_codes_at_every_half():
    """Codes of all finite halves under odd scales and zero points, as torch computes them in half precision."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    halves = halves[halves.isfinite()]
    for scale, zero_point in ((0.0123, 7), (0.5, 3), (3e-5, -4000), (1.7e-3, 2500)):
        scale = torch.tensor([scale]).half()
        expected = quantizer("mse-4").encode(halves[None], {"scale": scale, "zero_point": torch.tensor([zero_point])})
        half_scale, half_zero = np.float32(scale.item()), np.float32(torch.tensor(zero_point).half().item())
        codes = [sorted_errors._code(np.float32(w), half_scale, half_zero, np.uint32(13)) for w in halves[::7].tolist()]
        mine = [min(max(code, 0), 15) for code in codes]
        assert mine == expected[0, ::7].tolist()


def test_powers():
    errors = torch.cat([torch.zeros(1), torch.logspace(-16, 12, 3000)])
    for error in errors:
        assert sum_of_powers(error[None].numpy()) == pytest.approx(error.double().item() ** 2.4, rel=3e-7)
    assert sum_of_powers(errors[:2000].numpy()) == pytest.approx((errors[:2000].double() ** 2.4).sum().item(), rel=1e-6)
