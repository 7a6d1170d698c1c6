"""Levels by weighted errors: by hand, by brute force, and without weights those of always."""

import itertools

import numpy as np
import pytest
import torch

from quant.calibration import Moments
from quant.registry import SEARCH_SPACE, quantizer


def moments(diagonal):
    diagonal = torch.tensor(diagonal, dtype=torch.float32)
    return Moments(diagonal.diag(), torch.zeros(len(diagonal)), 1)


def error(weight, quantized, diagonal):
    return ((weight.double() - quantized.double()) ** 2 * torch.tensor(diagonal).double()).sum(dim=1)


def least_error(values, masses, k):
    """Weighted squared error of the best split of sorted values into k runs, all of them tried."""
    order = np.argsort(values)
    values, masses = values[order], masses[order]
    best = np.inf
    for cuts in itertools.combinations(range(1, len(values)), k - 1):
        total = 0.0
        for v, m in zip(np.split(values, cuts), np.split(masses, cuts), strict=True):
            total += (m * (v - (m * v).sum() / m.sum()) ** 2).sum()
        best = min(best, total)
    return best


def test_centroids_by_hand():
    """Of 0, 1, 4, 6, 10 four levels must share one pair: 0 and 1 cost least unless inputs weigh them."""
    weight = torch.tensor([[0.0, 1.0, 4.0, 6.0, 10.0]])
    tables = quantizer("kmeans-2").fit(weight, moments([1.0, 3.0, 1.0, 1.0, 1.0]))
    assert tables["centroids"].tolist() == [[0.75, 4.0, 6.0, 10.0]]
    tables = quantizer("kmeans-2").fit(weight, moments([100.0, 100.0, 1.0, 1.0, 1.0]))
    assert tables["centroids"].tolist() == [[0.0, 1.0, 5.0, 10.0]]


@pytest.mark.parametrize("word", ["kmeans-2", "kmeans_all-2", "kmeans-2-g6"])
def test_weighted_k_means_is_the_best_of_all_splits(word):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 12 if word != "kmeans_all-2" else 6, generator=generator).double()
    diagonal = (torch.rand(weight.shape[1], generator=generator).double() ** 4 + 1e-3).tolist()
    quantized = quantizer(word).apply(weight, quantizer(word).fit(weight, moments(diagonal)))
    found = float(error(weight, quantized, diagonal).sum())
    masses = np.array(diagonal, dtype=np.float32)
    if word == "kmeans_all-2":
        best = least_error(weight.flatten().numpy(), np.tile(masses, 2), 4)
    else:
        groups = (slice(0, 6), slice(6, 12)) if "g6" in word else (slice(0, 12),)
        best = sum(least_error(row[g], masses[g], 4) for row in weight.numpy() for g in groups)
    assert found == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("word", SEARCH_SPACE)
def test_no_levels_without_weights_have_a_lower_weighted_error(word):
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(16, 300, generator=generator) * 0.05).half()
    diagonal = (torch.rand(300, generator=generator) ** 6 + 1e-4).tolist()
    own = quantizer(word)
    errors = [error(weight, own.apply(weight, t), diagonal) for t in (own.fit(weight, moments(diagonal)), own.fit(weight))]
    assert errors[0].sum() < errors[1].sum()


@pytest.mark.parametrize("word", ["kmeans-3", "kmeans_all-4"])
def test_equal_weights_are_none(word):
    weight = torch.randn(4, 200, generator=torch.Generator().manual_seed(2)).double()
    equal, plain = (quantizer(word).fit(weight, each)["centroids"] for each in (moments([3.0] * 200), None))
    torch.testing.assert_close(equal, plain, rtol=1e-9, atol=1e-9)


def test_inputs_that_are_always_zero_and_moments_of_other_weights():
    weight = torch.randn(2, 8)
    for word in SEARCH_SPACE:
        for diagonal in ([0.0] * 8, [0.0] * 7 + [1.0]):
            own = quantizer(word)
            assert own.check(own.fit(weight, moments(diagonal)), weight.shape)
    with pytest.raises(ValueError, match="of 7 inputs, and the weight has 8"):
        quantizer("mse-4").fit(weight, moments([1.0] * 7))
