"""Channels of all scales and shapes: every fit ends, is sound, and K-Means is the optimum."""

import math

import kmeans_reference as reference
import numpy as np
import pytest
import torch

from quant import kmeans_cpu, registry
from quant.registry import quantizer

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WORDS = (*registry.SEARCH_SPACE, "mse-8", "mse-2", "kmeans-5", "mse-4-g32")
SIZES = (16, 8)


def outliers(rng, n):
    values = rng.standard_normal(n)
    places = rng.integers(0, n, rng.integers(1, 4))
    values[places] *= 10.0 ** rng.uniform(2, 30, len(places))
    return values


def few_distinct(rng, n):
    return rng.choice(rng.standard_normal(rng.integers(1, 20)), n)


KINDS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy_tailed": lambda rng, n: rng.standard_t(1.2, n),
    "outliers": outliers,
    "constant": lambda rng, n: np.full(n, rng.standard_normal()),
    "few_distinct": few_distinct,
    "few_and_far": lambda rng, n: np.r_[few_distinct(rng, n), 10.0 ** rng.uniform(0, 30)],
    "close_together": lambda rng, n: 1 + 10.0 ** rng.uniform(-7, -1) * rng.standard_normal(n),
    "two_far_groups": lambda rng, n: rng.standard_normal(n) + 10.0 ** rng.uniform(1, 8) * rng.integers(0, 2, n),
    "all_scales": lambda rng, n: rng.choice([-1, 1], n) * 10.0 ** rng.uniform(-30, 30, n),
    "whole_numbers": lambda rng, n: rng.integers(-40, 40, n).astype(float),
}


def length(rng):
    """Mostly short, for the reference takes the square of it."""
    most = rng.choice([64, 400, 5000], p=[0.9, 0.09, 0.01])
    return int(np.exp(rng.uniform(0, math.log(most + 1))))


def channel(number):
    """A tensor [n], finite, of any of the kinds in any of the precisions."""
    rng = np.random.default_rng([20, number])
    dtype = DTYPES[rng.integers(len(DTYPES))]
    values = KINDS[rng.choice(list(KINDS))](rng, length(rng))
    limits = torch.finfo(dtype)
    reach = rng.random()
    if reach < 0.3:  # as large as the precision goes
        values = values * (limits.max / np.abs(values).max() if values.any() else 1)
    elif reach < 0.5:  # subnormal
        values = values * limits.smallest_normal * 0.1
    elif reach < 0.8:
        values = values * 10.0 ** rng.uniform(-6, 3)
    with np.errstate(over="ignore"):
        return torch.from_numpy(values.clip(-limits.max, limits.max)).to(dtype).clamp(-limits.max, limits.max)


def squared_error(values, centroids):
    limits = centroids[:-1] / 2 + centroids[1:] / 2
    return float(((values - centroids[np.searchsorted(limits, values)]) ** 2).sum())


def check_optimum(number):
    values = np.sort(channel(number).float().numpy())
    found = kmeans_cpu.fit_sorted(values[None], SIZES)
    best = reference.least_errors(values.astype(np.float64), max(SIZES))
    for k, centroids in zip(SIZES, found, strict=True):
        error = squared_error(values.astype(np.float64), centroids[0].numpy())
        assert error <= best[k] * (1 + 1e-9), (number, k, error, best[k])


def check_fits(number):
    weight = channel(number)[None]
    parameters, errors = registry.fit_with_errors(weight, WORDS)
    for word in WORDS:
        told = number, word
        assert quantizer(word).check(parameters[word], weight.shape), told
        assert math.isfinite(errors[word]), told
        assert quantizer(word).apply(weight, parameters[word]).isfinite().all(), told


def test_k_means_of_any_channel_is_the_optimum():
    for number in range(3000):
        check_optimum(number)


def test_any_channel_is_fitted():
    for number in range(300):
        check_fits(number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_a_hundred_thousand_channels(part):
    for number in range(5000 * part, 5000 * (part + 1)):
        check_optimum(number)
        check_fits(number)


def test_half_precision_in_one_codebook():
    """A whole weight of few distinct values, some a million times as far out as the rest: counts, and a long table."""
    rng = np.random.default_rng(0)
    for far in (1.0, 30_000.0, -65_504.0):
        weight = torch.from_numpy(rng.standard_normal((40, 50)) * 0.001).half()
        weight[3, 4] = far
        values, counts = kmeans_cpu.histogram(weight)
        best = reference.least_errors(np.repeat(values, counts), max(SIZES))
        for k, centroids in zip(SIZES, kmeans_cpu.fit_values(values, counts, SIZES), strict=True):
            error = squared_error(np.repeat(values, counts), centroids.numpy())
            assert best[k] * (1 - 1e-9) <= error <= best[k] * (1 + 1e-9)


def test_channels_that_could_not_be_fitted():
    """The first three ended in an error of the interpreter; of the fourth, no file could be read."""
    far = torch.tensor([[2147483648, -0.3, 0, 1.8, -0.1, 0.5, 0.1, -1.9, 0.7]])
    million = torch.cat([torch.randn(1, 359, generator=torch.Generator().manual_seed(0)), torch.tensor([[1e7]])], dim=1)
    half = (torch.randn(2, 99, generator=torch.Generator().manual_seed(0)) * 0.001).half()
    half[0, 0] = 30_000
    for weight in (far, million, half, torch.tensor([[65504.0, -1, 2], [-65504, 1, 3], [65504, 65504, 65504]]).half()):
        parameters, _ = registry.fit_with_errors(weight)
        assert all(quantizer(word).check(own, weight.shape) for word, own in parameters.items())
    assert kmeans_cpu.fit_sorted(far.sort().values.numpy(), [8])[0][0, -1] == 2147483648


def test_constant_channels_of_any_size_are_exact():
    for dtype in DTYPES:
        for value in (torch.finfo(dtype).max, 3.0, 0.7, torch.finfo(dtype).tiny):
            weight = torch.tensor([[value] * 5, [-value] * 5]).to(dtype)
            for word, own in registry.fit(weight, WORDS).items():
                assert torch.equal(quantizer(word).apply(weight, own), weight), (dtype, value, word)


def test_a_weight_whose_error_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"as large as 1e\+200"):
        registry.fit_with_errors(
            torch.tensor([[1e200, 1.0, -3e199, 2.0, 5e198, 7e198, 1e199, 0, 2e199, 9e199]], dtype=torch.float64)
        )
