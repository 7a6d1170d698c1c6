import itertools
import os
import subprocess
import sys

import kmeans_reference as reference
import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from sklearn.cluster import KMeans

from quant import kmeans, kmeans_cpu


def squared_error(weight, centroids):
    quantized = kmeans.dequantize(kmeans.assign(weight, centroids), centroids)
    return ((weight.double() - quantized.double()) ** 2).reshape(len(weight), -1).sum(1)


def brute_force(values, k):
    """Least squared error over all partitions of the sorted values into k intervals."""
    values = np.sort(values)
    cuts = itertools.combinations(range(1, len(values)), k - 1)
    bounds = ([0, *cut, len(values)] for cut in cuts)
    return min(sum(np.var(values[a:b]) * (b - a) for a, b in itertools.pairwise(bound)) for bound in bounds)


def groups(rng, count):
    """Tight groups far apart: whole ranges of penalties give the same number of clusters."""
    return np.repeat(rng.standard_normal(count // 8 + 1) * 100, 8)[:count] + rng.standard_normal(count) * 0.01


# Ties of many kinds: paths of fewer and of more steps are best at the same penalty, none of k steps is found.
DRAWS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy_tailed": lambda rng, n: rng.standard_t(2, size=n),
    "whole_numbers": lambda rng, n: rng.integers(-20, 20, n),
    "evenly_spaced": lambda rng, n: np.arange(n),
    "symmetric": lambda rng, n: np.resize(np.outer([1, -1], rng.standard_normal(n // 2 + 1)).ravel(), n),
    "two_ranges": lambda rng, n: np.r_[np.arange(n // 2), 1000 + np.arange(n - n // 2)],
    "exponential": lambda rng, n: np.exp(rng.uniform(-8, 8, n)),
    "groups": groups,
}


@pytest.mark.parametrize("draw", DRAWS)
def test_equals_the_table(draw):
    """The optimum by an independent route, on rows of all widths and both grains."""
    rng = np.random.default_rng(0)
    for count in (2, 3, 9, 16, 17, 18, 40, 77, 150, 216):
        values = np.asarray(DRAWS[draw](rng, count), np.float64)
        weight = torch.from_numpy(values)[None]
        for bits in (4, 3, 1):
            best = reference.least_squared_error(values, 2**bits)
            for centroids in (kmeans.fit_per_channel(weight, (bits,))[bits], kmeans.fit_whole(weight, (bits,))[bits]):
                error = squared_error(weight, centroids).item()
                assert error == pytest.approx(best, rel=1e-9, abs=1e-12 * np.var(values) * count), (count, bits)


@pytest.mark.parametrize("draw", DRAWS)
def test_many_centroids_equal_the_table(draw):
    """Up to 256 of few more values than that, where clusters are single values for the most part, as well as of many."""
    rng = np.random.default_rng(0)
    for count in (33, 130, 257, 300, 420):
        values = np.asarray(DRAWS[draw](rng, count), np.float64)
        weight = torch.from_numpy(values)[None]
        for bits in (5, 7, 8):
            best = reference.least_squared_error(values, 2**bits)
            error = squared_error(weight, kmeans.fit_per_channel(weight, (bits,))[bits]).item()
            assert error == pytest.approx(best, rel=1e-9, abs=1e-12 * np.var(values) * count), (count, bits)


def test_values_that_sums_do_not_tell_apart():
    """Beside 1, a double's sums of squares leave nothing of these: the clusters of all but the outlier are still many."""
    weight = torch.cat([torch.arange(100) * 1e-10, torch.ones(1)]).double()[None]
    centroids = kmeans.fit_per_channel(weight, (4,))[4]
    assert centroids.unique().numel() == 16 and centroids[0, -1] == 1
    assert squared_error(weight, centroids) < squared_error(weight, kmeans.fit_per_channel(weight, (3,))[3])
    assert squared_error(weight, kmeans.fit_per_channel(weight, (7,))[7]) < 1e-30


def test_a_path_is_spliced_where_none_is_best():
    """At one penalty paths of one and of three steps over 0, 1 ... 5 are best: the one of two is made of both."""
    few, many = np.array([0, 6]), np.array([0, 2, 4, 6])
    assert kmeans_cpu._splice(few, many, 2).tolist() == [0, 4, 6]


def test_by_hand():
    weight = torch.tensor([[0.0, 1.0, 10.0, 12.0, 30.0]])
    assert kmeans.fit_per_channel(weight, (1,))[1].tolist() == [[5.75, 30.0]]
    assert kmeans.fit_whole(weight, (2,))[2].tolist() == [0.5, 10.0, 12.0, 30.0]


@pytest.mark.parametrize(("count", "bits"), [(9, 1), (9, 2), (10, 3), (13, 2)])
def test_equals_brute_force(count, bits):
    weight = torch.randn(6, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64) ** 3
    error = squared_error(weight, kmeans.fit_per_channel(weight, (bits,))[bits])
    best = [brute_force(row.numpy(), 2**bits) for row in weight]
    np.testing.assert_allclose(error.numpy(), best, rtol=1e-9, atol=1e-12)


def test_whole_equals_brute_force():
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centroids = kmeans.fit_whole(weight, (2,))[2]
    assert squared_error(weight.view(1, -1), centroids).item() == pytest.approx(brute_force(weight.numpy().ravel(), 4))


def trained_weight(layer):
    """The weight of a layer of the embedded model, [C, n]."""
    weights = load_file(ROOT / "models/embedded/dit/transformer/diffusion_pytorch_model.safetensors")
    return weights[f"{layer}.weight"].float().flatten(1)


NORMAL = torch.randn(12, 96, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "weight",
    [NORMAL, NORMAL**3, trained_weight("transformer_blocks.9.attn1.to_q"), trained_weight("pos_embed.proj")],
    ids=["normal", "heavy_tailed", "attention", "patches"],
)
def test_never_worse_than_sklearn(weight):
    for bits, centroids in kmeans.fit_per_channel(weight).items():
        ours = squared_error(weight, centroids)
        theirs = [
            KMeans(min(2**bits, weight.shape[1]), max_iter=100, random_state=0).fit(row[:, None]).inertia_
            for row in weight.double().numpy()
        ]
        assert (ours.numpy() <= np.array(theirs) * (1 + 1e-6)).all()


def test_one_table_serves_both_widths():
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = kmeans.fit_per_channel(weight, (4, 3))
    for bits in (4, 3):
        assert torch.equal(both[bits], kmeans.fit_per_channel(weight, (bits,))[bits])


@pytest.mark.parametrize("shape", [(6, 30), (6, 10, 3), (6, 5, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_shape_and_dtype(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    centroids = kmeans.fit_per_channel(weight)[3]
    assert centroids.shape == (6, 8)
    assert centroids.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    codes = kmeans.assign(weight, centroids)
    assert codes.shape == weight.shape and codes.dtype == torch.uint8 and codes.max() < 8
    flat = kmeans.fit_per_channel(weight.reshape(6, -1))[3]
    assert torch.equal(centroids, flat)


def test_constant_and_tiny_channels():
    weight = torch.tensor([[2.0] * 6, [1.0, 1.0, 1.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0, 0.0, -3.0]])
    for centroids in (kmeans.fit_per_channel(weight)[4], kmeans.fit_whole(weight)[4]):
        assert torch.isfinite(centroids).all()
        assert squared_error(weight, centroids).sum() == 0
    assert kmeans.fit_per_channel(weight)[4].shape == (3, 6)  # not more centroids than weights


def test_assigns_nearest():
    generator = torch.Generator().manual_seed(0)
    weight, centroids = torch.randn(4, 50, generator=generator), torch.randn(4, 8, generator=generator).sort(1)[0]
    nearest = (weight[:, :, None] - centroids[:, None, :]).abs().argmin(2)
    assert torch.equal(kmeans.assign(weight, centroids).long(), nearest)


def test_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        kmeans.fit_per_channel(torch.tensor([[1.0, float("nan")]]))


def test_fitting_leaves_torchs_threads_alone():
    """Numba and torch share OpenMP: a first fit must not change how many threads torch computes with."""
    code = "import torch; from quant import registry; torch.set_num_threads(1); registry.fit(torch.randn(8, 8)); "
    command = [sys.executable, "-c", code + "print(torch.get_num_threads())"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr


def test_ruled_out_boundaries_are_not_the_best_ones():
    """The best clusters of many values, found with the impossible boundaries ruled out first, and without."""
    rng = np.random.default_rng(0)
    for draw in (*DRAWS.values(), lambda rng, n: rng.standard_normal(40 * n)):
        values = np.unique(np.asarray(draw(rng, 150), np.float64))
        x = values - values.mean()
        mass, moment = np.arange(len(x) + 1.0), np.r_[0, np.cumsum(x)]
        for k in (2, 5, 8):
            merged = kmeans_cpu._possible_boundaries(x, mass, moment, k)
            best = [least_cost(*prefixes, k) for prefixes in (merged, (x, mass, moment))]
            assert best[0] == pytest.approx(best[1], rel=1e-12), k
    assert len(merged[0]) < len(x) / 4  # many values: few boundaries are possible


def least_cost(x, mass, moment, k):
    """Squared error, less the sum of squares, of the best k clusters."""
    cost, start = np.empty(len(x) + 1), np.empty(len(x) + 1, np.uint32)
    bounds, _ = kmeans_cpu._best_path(x, mass, moment, k, 1.0, cost, start)
    return -((np.diff(moment[bounds]) ** 2) / np.diff(mass[bounds])).sum()
