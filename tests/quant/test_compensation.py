"""Error-compensated rounding: by hand, and never worse than nearest rounding."""

import pytest
import torch
from torch import nn

from quant import QuantizedModel
from quant.calibration import Moments, collect
from quant.compensation import compensated_codes, output_errors
from quant.registry import SEARCH_SPACE, quantizer
from quant.slots import WeightKey


def moments_of(rows):
    return Moments(rows.T @ rows / len(rows), rows.mean(dim=0), len(rows))


def correlated(n, seed=0):
    """Inputs [r, n] that a few directions have the most of."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator) * torch.logspace(0, -2, n)[:, None]
    return torch.randn(4 * n, n, generator=generator) @ mixing


def test_an_error_is_made_up_for_by_the_next_column_by_hand():
    """Levels 0 and 1, both inputs always alike: 0.4 + 0.4 is 1 of them and 0 of the other, not 0 and 0."""
    own, tables = quantizer("kmeans_all-2"), {"centroids": torch.tensor([0.0, 1.0, 8.0, 9.0])}
    moments = Moments(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.ones(2), 1)
    weight = torch.tensor([[0.4, 0.4], [0.6, 0.3], [9.0, 8.0]])
    assert own.encode(weight, tables).tolist() == [[0, 0], [1, 0], [3, 2]]
    assert compensated_codes(weight, own, tables, moments).tolist() == [[0, 1], [1, 0], [3, 2]]


def test_uncorrelated_inputs_leave_the_nearest_levels():
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    moments = Moments(torch.rand(20).diag(), torch.zeros(20), 1)
    for word in SEARCH_SPACE:
        own = quantizer(word)
        tables = own.fit(weight)
        assert torch.equal(compensated_codes(weight, own, tables, moments), own.encode(weight, tables))


@pytest.mark.parametrize("word", [*SEARCH_SPACE, "mse-3-g40", "kmeans-2-g64"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_output_errors_are_lower_in_every_channel(word, dtype):
    """More columns than a block has; the reference is a sum over inputs, not moments."""
    rows, own = correlated(200), quantizer(word)
    weight = (torch.randn(24, 200, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)
    tables = own.fit(weight)
    codes = compensated_codes(weight, own, tables, moments_of(rows))
    assert own.check(tables | {"codes": codes}, weight.shape)
    found, nearest = (
        ((weight.float() - own.apply(weight, each).float()) @ rows.T).square().mean(dim=1)
        for each in (tables | {"codes": codes}, tables)
    )
    assert (found <= nearest * (1 + 1e-5)).all() and found.sum() < 0.6 * nearest.sum()


def test_a_convolutions_output_error_is_lower():
    module, own = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, bias=False)), quantizer("mse-3")
    image = nn.functional.interpolate(torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0)), scale_factor=3.0)
    model, weight = QuantizedModel(module), module[0].weight.detach()
    moments = collect(module, model.slots, [lambda: module(image)])[WeightKey("0")]
    tables = own.fit(weight)
    codes = compensated_codes(weight, own, tables, moments)
    assert codes.shape == weight.shape

    def error(parameters):
        return nn.functional.conv2d(image, weight - own.apply(weight, parameters), padding=1).square().mean()

    assert error(tables | {"codes": codes}) < 0.7 * error(tables)
    expected = output_errors(weight, own.apply(weight, tables), moments.second).mean()
    torch.testing.assert_close(error(tables), expected, rtol=1e-4, atol=0)


def test_inputs_of_low_rank_that_are_always_zero_or_not_there():
    weight, own = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)), quantizer("mse-4")
    tables = own.fit(weight)
    nearest = own.encode(weight, tables)
    rows = torch.randn(3, 30)
    rows[:, 5:9] = 0
    codes = compensated_codes(weight, own, tables, moments_of(rows), damping=0)
    assert torch.equal(codes[:, 5:9], nearest[:, 5:9]) and not torch.equal(codes, nearest)
    assert torch.equal(compensated_codes(weight, own, tables, moments_of(0 * rows)), nearest)
