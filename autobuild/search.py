"""From scores to a configuration: the best of each decision by itself, or the best whole within a size.

A decision is what is chosen together: a unit of the graph with all combinations of its weights' methods, or one weight.
Its scores add up to a configuration's, so the best one under a size is a multiple-choice knapsack, solved exactly. Shifts
of the denoiser's output add up as vectors: the shortest sum of those is sought in autobuild/exchanges.py.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from errors import InputError

GAP = 1e-7  # of the solver, relative: what it may leave to the optimum
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


def best_within(space, decisions, avg_bits, budgets=()):
    """Codes [W] with the largest total score of all with at most `avg_bits` average bits, and within other `budgets`.

    InputError if even the smallest configuration has more. Where the size alone counts, variants that another of their
    decision beats in score at no more bytes are left out first; a mixed-integer solver (HiGHS) takes one of the rest for
    each decision.
    """
    spare = spare_bytes(space, avg_bits, sum(decision.sizes.min() for decision in decisions))
    for budget in budgets:
        budget.check(space.is_known, space.family)
    kept = [np.arange(len(each.sizes)) if budgets else undominated(each) for each in decisions]
    pairs = list(zip(decisions, kept, strict=True))
    costs = [([decision.sizes[each] - decision.sizes.min() for decision, each in pairs], spare)]
    for budget in budgets:
        costs.append(([budget.costs[d.weights, d.codes[each]].sum(axis=1) for d, each in pairs], budget.limit))
    chosen = _solve([decision.scores[each] - decision.scores.max() for decision, each in pairs], costs)
    if chosen is None:
        flags = ", ".join(f"{budget.flag} {budget.limit:g}" for budget in budgets)
        raise InputError(f"--avg_bits {avg_bits:g} and {flags}: no configuration of {space.family} is within all of them")
    codes = np.zeros(len(space.keys), dtype=int)
    for (decision, each), variant in zip(pairs, chosen, strict=True):
        codes[decision.weights] = decision.codes[each[variant]]
    return codes


def spare_bytes(space, avg_bits, smallest_bytes):
    """Bytes that a limit leaves above the smallest configuration; InputError if that has more average bits."""
    limit_bytes = space.limit_bytes(avg_bits)
    if smallest_bytes > limit_bytes:
        smallest = smallest_bytes / space.bit_bytes
        raise InputError(f"--avg_bits {avg_bits:g}: the smallest configuration of {space.family} has {smallest:.3f}")
    return limit_bytes - smallest_bytes


def _solve(scores, costs):
    """The number of one variant of each decision: the largest sum of scores within all `costs`; None if there is none.

    A cost is ([of each decision's variants], the most that their sum may be).
    """
    numbers = np.concatenate([np.full(len(each), number) for number, each in enumerate(scores)])
    scores = np.concatenate(scores)
    costs = [(np.concatenate(each), limit) for each, limit in costs]
    # The first cost is bytes, of which none may be to spare.
    units = [max(limit, 1) / UNITS if place == 0 else limit / UNITS for place, (_, limit) in enumerate(costs)]
    sums = [LinearConstraint(each[None] / unit, ub=limit / unit) for (each, limit), unit in zip(costs, units, strict=True)]
    one_each = sparse.csr_array((np.ones(len(numbers)), (numbers, np.arange(len(numbers)))))
    found = milp(
        -scores / max(np.abs(scores).max(), 1e-300),
        constraints=[LinearConstraint(one_each, 1, 1), *sums],
        integrality=np.ones(len(numbers)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP},
    )
    if found.x is None and len(costs) > 1:
        return None
    if found.x is None:
        raise RuntimeError(f"the solver found no configuration: {found.message}")
    chosen = [int(np.argmax(found.x[numbers == number])) for number in range(numbers[-1] + 1)]
    for each, limit in costs:
        if sum(each[numbers == number][place] for number, place in enumerate(chosen)) > limit * (1 + 1e-9):
            raise RuntimeError("the solver's configuration is too large")
    return chosen


def undominated(decision):
    """Numbers of the variants that no other beats in score at no more bytes, smallest first."""
    order = np.lexsort((-decision.scores, decision.sizes))
    before = np.maximum.accumulate(np.concatenate([[-np.inf], decision.scores[order][:-1]]))
    return order[decision.scores[order] > before]
