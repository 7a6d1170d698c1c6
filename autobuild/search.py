"""From scores to a configuration: the best of each decision by itself, or the best whole within a size.

A decision is what is chosen together: a unit of the graph with all combinations of its weights' methods, or one weight.
Its scores add up to a configuration's, so the best one under a size is a multiple-choice knapsack, solved exactly. Shifts
of the denoiser's output add up as vectors; the shortest sum of those is sought from there by exchanges.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from errors import InputError

GAP = 1e-7  # of the solver, relative: what it may leave to the optimum
LEAST_GAIN = 1e-4  # of a round of exchanges, relative; with less it is the last
UNITS = 1e4  # in which it counts the spare bytes: its tolerance is a millionth of one


@dataclass(frozen=True, eq=False)
class Decision:
    weights: np.ndarray  # [K] numbers of the weights that are chosen together
    codes: np.ndarray  # [V, K] their methods in each variant
    sizes: np.ndarray  # [V] bytes
    scores: np.ndarray  # [V] higher is better


def variants(space, weights):
    """All combinations [V, K] of the known methods of some weights."""
    return np.array(list(itertools.product(*(np.flatnonzero(space.is_known[weight]) for weight in weights))))


def make_decision(space, weights, codes, scores):
    weights = np.asarray(weights)
    return Decision(weights, codes, space.size_bytes[weights, codes].sum(axis=1), np.asarray(scores, dtype=np.float64))


def decisions_of_weights(space, scores):
    """A decision for each weight, of scores [W, M]."""
    places = range(len(space.keys))
    return [make_decision(space, [w], codes := variants(space, [w]), scores[w, codes[:, 0]]) for w in places]


def top_one(space, decisions):
    """Codes [W] of each decision's best variant, whatever its size (Mills et al., 2025); of equals the smallest."""
    codes = np.zeros(len(space.keys), dtype=int)
    for decision in decisions:
        codes[decision.weights] = decision.codes[np.lexsort((decision.sizes, -decision.scores))[0]]
    return codes


def best_within(space, decisions, avg_bits):
    """Codes [W] with the largest total score of all with at most `avg_bits` average bits.

    InputError if even the smallest configuration has more. Variants that another of their decision beats in score at no
    more bytes are left out first; a mixed-integer solver (HiGHS) takes one of the rest for each decision.
    """
    spare = spare_bytes(space, avg_bits, sum(decision.sizes.min() for decision in decisions))
    kept = [undominated(decision) for decision in decisions]
    chosen = _solve(
        [decision.scores[each] - decision.scores.max() for decision, each in zip(decisions, kept, strict=True)],
        [decision.sizes[each] - decision.sizes.min() for decision, each in zip(decisions, kept, strict=True)],
        spare,
    )
    codes = np.zeros(len(space.keys), dtype=int)
    for decision, each, variant in zip(decisions, kept, chosen, strict=True):
        codes[decision.weights] = decision.codes[each[variant]]
    return codes


def spare_bytes(space, avg_bits, smallest_bytes):
    """Bytes that a limit leaves above the smallest configuration; InputError if that has more average bits."""
    limit_bytes = space.limit_bytes(avg_bits)
    if smallest_bytes > limit_bytes:
        smallest = smallest_bytes / space.bit_bytes
        raise InputError(f"--avg_bits {avg_bits:g}: the smallest configuration of {space.family} has {smallest:.3f}")
    return limit_bytes - smallest_bytes


def shortest_sum(space, shifts, codes, avg_bits, shrinkage=0.0):
    """Codes [W] of a configuration whose shifts [W, M, K] have a short sum, from `codes`, which are within `avg_bits`.

    The share `shrinkage` is taken off inner products of different weights' shifts. A quadratic multiple-choice knapsack:
    weight by weight, what shortens the sum most is done, of giving it another method and some other weight one too, until
    nothing of the kind shortens it by much.
    """
    count, methods = space.size_bytes.shape
    shifts = shifts.reshape(count * methods, -1)
    products = (shifts @ shifts.T).reshape(count, methods, count, methods)
    if shrinkage:
        own = products[np.arange(count), :, np.arange(count), :]
        products *= 1 - shrinkage
        products[np.arange(count), :, np.arange(count), :] = own
    exchanges = Exchanges(products, space.size_bytes, codes)
    limit, before = space.limit_bytes(avg_bits), np.inf
    while exchanges.total < (1 - LEAST_GAIN) * before:
        before = exchanges.total
        for weight in range(count):
            exchanges.improve(weight, limit)
    return exchanges.codes


class Exchanges:
    """A configuration on its way to a shorter sum of shifts; products [W, M, W, M] of all shifts, sizes [W, M]."""

    def __init__(self, products, sizes, codes):
        self.products, self.sizes, self.codes = products, sizes, codes.copy()
        self.places = np.arange(len(sizes))
        self.own = products[self.places, :, self.places, :]  # [W, M, M]
        self.with_all = products[:, :, self.places, codes].sum(axis=2)  # [W, M] of each shift with the sum

    @property
    def total(self):
        """Squared norm of the sum."""
        return self.with_all[self.places, self.codes].sum()

    def improve(self, weight, limit):
        """Exchange the method of a weight, and of another, if that shortens the sum and stays within `limit` bytes."""
        places, codes = self.places, self.codes
        grown = self.sizes - self.sizes[places, codes][:, None]
        alone = 2 * (self.with_all - self.with_all[places, codes][:, None]) + np.diagonal(self.own, axis1=1, axis2=2)
        alone += self.own[places, codes, codes][:, None] - 2 * self.own[places, :, codes]
        moved = self.products[weight] - self.products[weight, codes[weight]]  # [M, W, M]
        both = alone[weight][:, None, None] + alone + 2 * (moved - moved[:, places, codes][:, :, None])
        spare = limit - self.sizes[places, codes].sum()
        both[grown[weight][:, None, None] + grown > spare] = np.inf
        both[:, weight] = np.inf
        method, other, of_other = np.unravel_index(np.argmin(both), both.shape)
        if both[method, other, of_other] < 0:
            self._set(weight, method)
            self._set(other, of_other)

    def _set(self, weight, method):
        self.with_all += self.products[:, :, weight, method] - self.products[:, :, weight, self.codes[weight]]
        self.codes[weight] = method


def _solve(scores, sizes, limit):
    """The number of one variant of each decision: the largest sum of scores at a sum of sizes of at most `limit`."""
    numbers = np.concatenate([np.full(len(each), number) for number, each in enumerate(scores)])
    scores, sizes = np.concatenate(scores), np.concatenate(sizes)
    unit = max(limit, 1) / UNITS
    found = milp(
        -scores / max(np.abs(scores).max(), 1e-300),
        constraints=[
            LinearConstraint(sparse.csr_array((np.ones(len(numbers)), (numbers, np.arange(len(numbers))))), 1, 1),
            LinearConstraint(sizes[None] / unit, ub=limit / unit),
        ],
        integrality=np.ones(len(numbers)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        raise RuntimeError(f"the solver found no configuration: {found.message}")
    chosen = [int(np.argmax(found.x[numbers == number])) for number in range(numbers[-1] + 1)]
    if sum(sizes[numbers == number][place] for number, place in enumerate(chosen)) > limit:
        raise RuntimeError("the solver's configuration is too large")
    return chosen


def undominated(decision):
    """Numbers of the variants that no other beats in score at no more bytes, smallest first."""
    order = np.lexsort((-decision.scores, decision.sizes))
    before = np.maximum.accumulate(np.concatenate([[-np.inf], decision.scores[order][:-1]]))
    return order[decision.scores[order] > before]
