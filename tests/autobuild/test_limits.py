"""What a search keeps beside the size, and how far from the optimum it can be: against all configurations of tiny spaces."""

import dataclasses
import itertools

import numpy as np
import pytest
from small_space import small_space

from autobuild import exchanges, limits, search
from errors import InputError

WEIGHTS = 5  # that are searched; the others' shifts are nothing


def few_weights(seed):
    """A space of which all but a few weights have one method, its shifts [W, M, 60], and all configurations' codes."""
    space = small_space(seed)
    errors = space.errors.copy()
    errors[WEIGHTS:, 1:] = np.nan
    space = dataclasses.replace(space, errors=errors)
    shifts = np.random.default_rng(seed).normal(size=(*errors.shape, 60)) * np.sqrt(space.errors)[..., None]
    shifts[WEIGHTS:] = 0
    codes = np.array(list(itertools.product(range(6), repeat=WEIGHTS)))
    return space, shifts, np.pad(codes, ((0, 0), (0, len(errors) - WEIGHTS)))


def lengths_of(shifts, codes):
    return (shifts[np.arange(len(shifts)), codes].sum(axis=1) ** 2).sum(axis=1)


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_lies_between_the_bound_and_what_is_found(seed):
    space, shifts, codes = few_weights(seed)
    bits, lengths = space.avg_bits(codes), lengths_of(shifts, codes)
    tight = 0
    for avg_bits in np.quantile(bits, [0.02, 0.3, 0.9]):
        found = exchanges.shortest_sum(space, shifts, avg_bits)
        least = lengths[bits <= avg_bits + 1e-12].min()
        assert space.avg_bits(found.codes) <= avg_bits + 1e-12
        assert found.length == pytest.approx(lengths_of(shifts, found.codes[None])[0], rel=1e-4)
        assert found.bound <= least * (1 + 1e-6) and found.length >= least * (1 - 1e-5)
        assert found.length <= 1.05 * least
        tight += found.bound / least
    assert tight > 0.9  # of 3: a bound that says something


def test_shifts_at_right_angles_are_bounded_exactly():
    """Squared lengths add up then: the bound is that of a linear knapsack."""
    space, shifts, codes = few_weights(0)
    apart = np.zeros((*shifts.shape[:2], WEIGHTS * 6))
    for weight, method in itertools.product(range(WEIGHTS), range(6)):
        apart[weight, method, 6 * weight + method] = np.linalg.norm(shifts[weight, method])
    lengths, bits = lengths_of(apart, codes), space.avg_bits(codes)
    found = exchanges.shortest_sum(space, apart, np.median(bits))
    least = lengths[bits <= np.median(bits)].min()
    assert found.length == pytest.approx(least, rel=1e-5) and 0.9 * least < found.bound <= least * (1 + 1e-6)
    free = exchanges.shortest_sum(space, apart, 16)
    assert free.excess == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("shrinkage", [0.0, 0.5, 1.0])
def test_shrunk_products(shrinkage):
    shifts = np.random.default_rng(0).normal(size=(3, 2, 8))
    products = exchanges.products_of(shifts, shrinkage)
    own = np.einsum("amk,ank->amn", shifts, shifts)
    other = np.einsum("amk,bnk->ambn", shifts, shifts)
    for a, b in itertools.product(range(3), repeat=2):
        expected = own[a] if a == b else (1 - shrinkage) * other[a, :, b]
        np.testing.assert_allclose(products[a, :, b], expected, rtol=1e-4, atol=1e-5)


def test_budgets_are_kept_by_both_searches():
    space, shifts, codes = few_weights(1)
    costs = np.random.default_rng(5).uniform(1, 5, space.size_bytes.shape)
    spent = costs[np.arange(len(costs)), codes].sum(axis=1)
    bits, lengths = space.avg_bits(codes), lengths_of(shifts, codes)
    limit, avg_bits = np.quantile(spent, 0.2), np.quantile(bits, 0.4)
    budget = limits.Budget(costs, limit, "--max_bops")
    inside = (spent <= limit) & (bits <= avg_bits)
    found = exchanges.shortest_sum(space, shifts, avg_bits, budgets=(budget,))
    assert costs[np.arange(len(costs)), found.codes].sum() <= limit and space.avg_bits(found.codes) <= avg_bits
    assert found.length <= 1.05 * lengths[inside].min() and found.bound <= lengths[inside].min()
    scores = np.random.default_rng(6).normal(size=costs.shape)
    best = search.best_within(space, search.decisions_of_weights(space, scores), avg_bits, (budget,))
    totals = scores[np.arange(len(costs)), codes].sum(axis=1)
    assert scores[np.arange(len(costs)), best].sum() == pytest.approx(totals[inside].max())
    with pytest.raises(InputError, match=r"^--max_bops: the smallest configuration of pixart_alpha has "):
        search.best_within(space, search.decisions_of_weights(space, scores), 16, (limits.Budget(costs, 1, "--max_bops"),))
    against = limits.Budget(-space.size_bytes, -np.quantile(space.size_bytes.max(axis=1).sum(), 0.9), "--max_bops")
    with pytest.raises(InputError, match=r"no configuration of pixart_alpha is within all of them|the smallest"):
        search.best_within(space, search.decisions_of_weights(space, scores), bits.min() + 1e-9, (against,))


def test_least_bits_and_given_methods():
    space = small_space()
    scores = -space.size_bytes  # the smallest are the best
    held = limits.restricted(
        space, [("transformer_blocks.0.attn1", 4)], [("proj", "kmeans-4"), ("model.*.1.ff.net.2.*", "mse-4")]
    )
    for choose in (
        lambda each: search.best_within(each, search.decisions_of_weights(each, scores), 6),
        lambda each: exchanges.shortest_sum(each, np.zeros((*scores.shape, 4)) + scores[..., None], 6).codes,
    ):
        chosen = held.configuration(choose(held))
        for key, method in chosen.items():
            if "blocks.0.attn1" in key:
                assert method.endswith("-4"), key
        assert chosen["model.proj.weight_quantizer"] == "kmeans-4"
        assert chosen["model.transformer_blocks.1.ff.net.2.weight_quantizer"] == "mse-4"
    assert np.isfinite(space.errors).all() and held.smallest_bytes > space.smallest_bytes


@pytest.mark.parametrize(
    ("min_bits", "fix", "message"),
    [
        ([("attn9", 4)], [], "--min_bits attn9=4: no weight of pixart_alpha is called so"),
        ([("proj", 5)], [], "--min_bits proj=5: leaves no method of mse-4, mse-3, .* for model.proj.weight_quantizer"),
        ([], [("proj", "affine-4")], "--fix proj=affine-4: the search space has only mse-4, mse-3, "),
        ([("proj", 4)], [("proj", "mse-3")], "--fix proj=mse-3: leaves no method"),
    ],
)
def test_what_cannot_be_kept_is_refused(min_bits, fix, message):
    with pytest.raises(InputError, match=f"^{message}"):
        limits.restricted(small_space(), min_bits, fix)


def test_bops_of_each_choice():
    """A sum over weights and a constant."""
    space = small_space()
    own = {"mse-4": 4.0, "mse-3": 3.0}

    def tera_bops(configuration):
        return 10 + sum(own.get(method, 16.0) * (1 + len(key)) for key, method in configuration.items())

    budget = limits.bops_budget(space, tera_bops, 5.0)
    codes = np.random.default_rng(0).integers(6, size=len(space.keys))
    spent = budget.costs[np.arange(len(codes)), codes].sum()
    assert spent == pytest.approx(tera_bops(space.configuration(codes)))


def test_any_methods_and_float():
    space = small_space()
    methods = ("affine-2", "kmeans-3", "float")
    sizes = space.fp_bytes[:, None] / 16 * np.array([2.1, 3.3, 16])
    space = dataclasses.replace(space, methods=methods, size_bytes=sizes, errors=np.zeros(sizes.shape))
    assert space.codes_of(dict.fromkeys([keys[0] for keys in space.keys], "float")).tolist() == [2] * len(space.keys)
    held = limits.restricted(space, [("proj", 9)])
    assert held.configuration(np.nanargmin(held.errors, axis=1))["model.proj.weight_quantizer"] == "float"
