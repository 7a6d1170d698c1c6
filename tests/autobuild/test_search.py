"""Searches, against going through all configurations."""

import itertools
import re

import numpy as np
import pytest
from conftest import ROOT
from small_space import small_space

from autobuild import exchanges, search
from autobuild import space as spaces
from errors import InputError
from evaluation import quant_cache


@pytest.fixture(scope="module")
def space():
    return small_space()


def decisions_of(space, sets, seed):
    rng = np.random.default_rng(seed)
    for weights in sets:
        codes = search.variants(space, weights)
        yield search.make_decision(space, weights, codes, rng.normal(size=len(codes)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_the_best_within_a_size_is_the_best_of_all(space, seed, share):
    sets = [[0], [1, 2], [3, 4]]
    decisions = list(decisions_of(space, sets, seed))
    rest = [search.make_decision(space, [w], np.array([[5]]), [0.0]) for w in range(5, len(space.keys))]
    totals = [
        (
            sum(p.scores[i] for p, i in zip(decisions, each, strict=True)),
            sum(p.sizes[i] for p, i in zip(decisions, each, strict=True)),
        )
        for each in itertools.product(*(range(len(decision.codes)) for decision in decisions))
    ]
    fixed = sum(decision.sizes[0] for decision in rest)
    least, most = min(size for _, size in totals), max(size for _, size in totals)
    limit = least + share * (most - least)
    avg_bits = 16 * (limit + fixed) / space.fp_bytes.sum()
    codes = search.best_within(space, [*decisions, *rest], avg_bits)
    assert space.avg_bits(codes) <= avg_bits + 1e-9
    found = sum(p.scores[np.flatnonzero((p.codes == codes[p.weights]).all(axis=1))[0]] for p in decisions)
    assert found == pytest.approx(max(score for score, size in totals if size <= limit + 1e-6))


def test_nothing_is_small_enough(space):
    decisions = search.decisions_of_weights(space, -space.errors)
    with pytest.raises(InputError, match=r"--avg_bits 2: the smallest configuration of pixart_alpha has 3\.1"):
        search.best_within(space, decisions, 2)


def test_top_one_is_each_decisions_best_and_the_smaller_of_equals(space):
    decisions = list(decisions_of(space, [[w] for w in range(len(space.keys))], 0))
    decisions[0] = search.make_decision(space, [0], decisions[0].codes, [1, 1, 0, 0, 1, 0])
    codes = search.top_one(space, decisions)
    assert codes[0] == 1  # of 0, 1 and 4 it has the fewest bytes
    assert all(decision.scores[codes[w]] == decision.scores.max() for w, decision in enumerate(decisions))


def test_methods_that_labels_have_not_seen_are_not_chosen():
    space = small_space()
    space.errors[2, [0, 4]] = np.nan
    assert search.variants(space, [2]).tolist() == [[1], [2], [3], [5]]
    assert len(search.variants(space, [1, 2])) == 24


def test_undominated():
    decision = search.Decision(
        np.array([0]), np.arange(5)[:, None], np.array([3.0, 1, 2, 2, 3]), np.array([5.0, 1, 1, 4, 3])
    )
    assert search.undominated(decision).tolist() == [1, 3, 0]


def lengths_after(space, shifts, codes, count):
    """Squared length of the sum of shifts, and average bits, of all that differ from `codes` in up to `count` weights."""
    rows = np.arange(len(codes))
    for places in itertools.combinations(rows, count):
        for methods in itertools.product(range(6), repeat=count):
            other = codes.copy()
            other[list(places)] = methods
            yield (shifts[rows, other].sum(axis=0) ** 2).sum(), space.avg_bits(other)


@pytest.mark.parametrize("seed", range(3))
def test_no_exchange_of_two_weights_shortens_the_sum_of_shifts(space, seed):
    shifts = np.random.default_rng(seed).normal(size=(len(space.keys), 6, 20)) * np.sqrt(space.errors)[..., None]
    changes = (shifts**2).sum(axis=2)
    first = search.best_within(space, search.decisions_of_weights(space, -changes), 3.8)
    codes = exchanges.shortest_sum(space, shifts, 3.8).codes
    rows = np.arange(len(codes))
    length = (shifts[rows, codes].sum(axis=0) ** 2).sum()
    assert space.avg_bits(codes) <= 3.8
    assert length < (shifts[rows, first].sum(axis=0) ** 2).sum()
    least = min(each for each, avg_bits in lengths_after(space, shifts, codes, 2) if avg_bits <= 3.8)
    assert length == pytest.approx(least, rel=exchanges.LEAST_GAIN)


def test_shifts_that_cancel_are_found(space):
    """Alone each is worse than the others; together two of them leave nothing."""
    shifts = np.random.default_rng(0).normal(size=(len(space.keys), 6, 20))
    shifts[3, 1], shifts[7, 5] = 10 * shifts[3, 1], -10 * shifts[3, 1]
    shifts[[0, 1, 2, 4, 5, 6, 8, 9, 10]] *= 0.01
    first = search.best_within(space, search.decisions_of_weights(space, -(shifts**2).sum(axis=2)), 6)
    assert (first[3], first[7]) != (1, 5)
    codes = exchanges.shortest_sum(space, shifts, 6).codes
    assert (codes[3], codes[7]) == (1, 5)


def test_other_methods_are_not_of_the_space(space):
    configuration = space.configuration(np.zeros(len(space.keys), int)) | {space.keys[2][0]: "mse-8"}
    message = rf"^{re.escape(space.keys[2][0])}: mse-8 is not of the search space; it has mse-4, "
    with pytest.raises(InputError, match=message):
        space.codes_of(configuration)


@pytest.mark.parametrize("bits", [16, 32])
def test_average_bits_are_counted_in_the_precision_of_the_labels(bits):
    """Rows labelled with weights in float32 have twice the bytes in full precision."""
    rows = quant_cache.load(ROOT / "labels" / "dit_embedded" / "quant_cache.pkl")[:2]
    for row in rows:
        row["config"] = {key: [name, full * bits // 16, *rest] for key, (name, full, *rest) in row["config"].items()}
    space = spaces.of_rows("dit", rows)
    assert space.precision_bits == bits
    assert space.avg_bits(space.codes(rows)) == pytest.approx([row["avg_bits"] for row in rows])
