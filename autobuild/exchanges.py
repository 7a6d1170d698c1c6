"""The shortest sum of shifts within a size and other budgets: a quadratic multiple-choice knapsack, by exchanges.

Weight by weight, what shortens the sum most is done, of giving it another method and some other weight one too, until
nothing of the kind shortens it by much. That is begun from several configurations: the best by squared lengths alone, the
best by the slope of a convex relaxation at its optimum, and the best so far with some weights' methods drawn at random, as
often as asked for (iterated local search; Lourenço et al., 2003). All draws are from one seed.
"""

from typing import NamedTuple

import numpy as np

from autobuild.limits import Budget
from autobuild.relaxation import Relaxation
from autobuild.search import best_within, decisions_of_weights

LEAST_GAIN = 1e-4  # of a round of exchanges, relative; with less it is the last
DRAWN_STARTS = 16
DRAWN_SHARE, LEAST_DRAWN = 0.1, 4  # of weights whose methods are drawn
SEED = 0


class Found(NamedTuple):
    """A configuration, and how good it is."""

    codes: np.ndarray  # [W]
    length: float  # squared, of its sum of shifts
    bound: float  # that no configuration within the limits can be below

    @property
    def excess(self):
        """Share by which the squared length is above the optimum's, at most."""
        return self.length / self.bound - 1 if self.bound > 0 else float("inf")


def shortest_sum(space, shifts, avg_bits, shrinkage=0.0, budgets=(), starts=DRAWN_STARTS):
    """What is Found of configurations with a short sum of shifts [W, M, K] and at most `avg_bits` average bits.

    The share `shrinkage` is taken off inner products of different weights' shifts. The time is about that of 3 + `starts`
    descents; memory that of the products [W, M, W, M] in float32, 1 GB for 800 weights of 20 methods.
    """
    products = products_of(shifts, shrinkage)
    limits = (Budget(space.size_bytes, space.limit_bytes(avg_bits), "--avg_bits"), *budgets)
    lengths = np.diagonal(products.reshape(shifts.shape[0] * shifts.shape[1], -1)).reshape(shifts.shape[:2])
    first = best_within(space, decisions_of_weights(space, -lengths), avg_bits, budgets)
    bound, slope = Relaxation(products, limits[0].costs, limits[0].limit, space.is_known).solve()
    relaxed = best_within(space, decisions_of_weights(space, -slope), avg_bits, budgets)
    exchanges, rng = Exchanges(products, limits, space.is_known), np.random.default_rng(SEED)
    length, codes = min((exchanges.descended(each) for each in (first, relaxed)), key=lambda found: found[0])
    for _ in range(starts):
        length, codes = min((length, codes), exchanges.descended(exchanges.drawn(codes, rng)), key=lambda found: found[0])
    return Found(codes, length, max(min(bound, length), 0.0))


def products_of(shifts, shrinkage=0.0):
    """Inner products [W, M, W, M] of shifts [W, M, K], in float32."""
    count, methods = shifts.shape[:2]
    shifts = np.asarray(shifts, np.float32).reshape(count * methods, -1)
    products = (shifts @ shifts.T).reshape(count, methods, count, methods)
    if shrinkage:
        places = np.arange(count)
        own = products[places, :, places, :]
        products *= 1 - shrinkage
        products[places, :, places, :] = own
    return products


class Exchanges:
    """Configurations on their way to a shorter sum of shifts: of products [W, M, W, M], Budgets and allowed, bool [W, M]."""

    def __init__(self, products, budgets, allowed):
        self.products, self.budgets, self.allowed = products, budgets, allowed
        self.places = np.arange(len(allowed))
        self.own = products[self.places, :, self.places, :].astype(np.float64)  # [W, M, M]

    def descended(self, codes):
        """(squared length, codes) after exchanges from codes [W], which are within the budgets."""
        self.codes = np.array(codes)
        self.with_all = self.products[:, :, self.places, codes].sum(axis=2, dtype=np.float64)  # of each shift with the sum
        before = np.inf
        while self.total < (1 - LEAST_GAIN) * before:
            before = self.total
            for weight in self.places:
                self.improve(weight)
        return self.total, self.codes

    def drawn(self, codes, rng):
        """The codes with some weights' methods drawn at random, of which as many are taken back as break a budget."""
        codes, kept = codes.copy(), codes
        free = np.flatnonzero(self.allowed.sum(axis=1) > 1)
        count = min(max(LEAST_DRAWN, round(DRAWN_SHARE * len(free))), len(free))
        weights = rng.choice(free, count, replace=False)
        for weight in weights:
            codes[weight] = rng.choice(np.flatnonzero(self.allowed[weight]))
        for weight in weights:
            if all(budget.costs[self.places, codes].sum() <= budget.limit for budget in self.budgets):
                break
            codes[weight] = kept[weight]
        return codes

    @property
    def total(self):
        """Squared norm of the sum."""
        return float(self.with_all[self.places, self.codes].sum())

    def improve(self, weight):
        """Exchange the method of a weight, and of another, if that shortens the sum and stays within the budgets."""
        places, codes = self.places, self.codes
        alone = 2 * (self.with_all - self.with_all[places, codes][:, None]) + np.diagonal(self.own, axis1=1, axis2=2)
        alone += self.own[places, codes, codes][:, None] - 2 * self.own[places, :, codes]
        alone[~self.allowed] = np.inf
        moved = self.products[weight] - self.products[weight, codes[weight]]  # [M, W, M]
        both = alone[weight][:, None, None] + alone + 2 * (moved - moved[:, places, codes][:, :, None])
        for budget in self.budgets:
            grown = budget.costs - budget.costs[places, codes][:, None]
            spare = budget.limit - budget.costs[places, codes].sum()
            both[grown[weight][:, None, None] + grown > spare] = np.inf
        both[:, weight] = np.inf
        method, other, of_other = np.unravel_index(np.argmin(both), both.shape)
        if both[method, other, of_other] < 0:
            self._set(weight, method)
            self._set(other, of_other)

    def _set(self, weight, method):
        self.with_all += self.products[weight, method] - self.products[weight, self.codes[weight]]
        self.codes[weight] = method
