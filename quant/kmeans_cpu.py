"""Exact one-dimensional K-Means on the CPU.

Clusters of sorted values are intervals, so a clustering is a path 0 = b_0 < b_1 < ... < b_k = m over the
m distinct values, and its squared error the sum of its steps' costs. Filling a table of k rows (Wang and
Song, 2011; Gronlund et al., 2017) takes O(k m log m). This is O(m) in practice, and exact, by two facts:

1. The least error E(k) is convex in k, since the cost has the Monge property (Aggarwal, Schieber and
   Tokuyama, 1994): for a penalty per cluster between E(k) - E(k+1) and E(k-1) - E(k), the best path of
   any length has k steps. That interval is wide (about 3/k of its size), and high-resolution theory
   (Panter and Dite, 1951) says where it lies, so one or two paths over the values usually do. Where the
   interval is a point, paths of fewer and of more steps are both best there, and they cross: their
   pieces make one of k steps.
2. At the optimum every boundary lies at the midpoint of the means on both sides of it (Lloyd, 1982). From
   boundary j, whose best left cluster is known, the next boundary can thus only be one of the few i for
   which the midpoint of that cluster's mean and that of values j ... i-1 falls between the values j-1 and
   j. They lie close to those of boundary j-1, so each j costs a handful of steps. Of many values, the same
   rule first leaves few that can be boundaries at all (`_possible_boundaries`).

Sums are in double precision, of values over a power of two of their size. Where the error that is found is
less than LEAST_SHARE of the squares, they do not tell the best clusters from others: far outliers, or many
centroids for few values. The slower table of quant/kmeans_table.py, which is exact for these too, is then filled,
and where no path of k steps is found.
"""

import math

import numpy as np
import torch
from numba import prange, uint64

from quant.compiled import kernel
from quant.doors import expect
from quant.kmeans_table import best_clusters, mean_from_first
from quant.rows import check, run

ROWS_PER_TASK = 16  # each task's rows share what they learn about the penalty
PENALTY = 0.165  # of the high-resolution estimate; 1/6 for fine quantizers
MANY_VALUES = 2**12  # above which boundaries that cannot be are ruled out first,
FEW_CLUSTERS = 32  # if that rules out any: of many clusters, nearly all boundaries are possible
MOST_ATTEMPTS = 12  # at a first penalty: beyond, costs are told apart no more
LEAST_SHARE = 2.0**-20  # of the sum of squares: an error that costs of about that size still tell to nine digits
ONE = uint64(1)  # unsigned indices spare each array access the test for a negative one
BACK = uint64(6)  # where the search for a boundary's successors starts, before the end of the last ones


def fit_sorted(rows, sizes, masses=None):
    """Optimal centroids of ascending rows (numpy [C, n]) for each of `sizes`: [[C, k], ...], float64.

    `masses` [C, n] weigh the squared errors; None: one each.
    """
    expect("rows", rows, (None, None), np.float32, np.float64)
    if masses is not None:
        expect("masses", masses, rows.shape, np.float64)
    _check_sizes(rows.shape[1], sizes)
    out = np.empty((len(rows), sum(sizes)))
    run(_fit_rows, rows, masses, np.array(sizes), out)
    return [torch.from_numpy(table) for table in np.split(out, np.cumsum(sizes)[:-1], axis=1)]


def fit_values(values, counts, sizes):
    """Optimal centroids of ascending values (numpy [n]) with `counts` [n] (None: one each), for each size: [[k], ...]."""
    expect("values", values, (None,), np.float32, np.float64)
    if counts is not None:
        expect("counts", counts, values.shape, np.int64, np.float64)
    _check_sizes(len(values), sizes)
    out = np.empty(sum(sizes))
    run(_fit_histogram, values, counts, np.array(sizes), out)
    return list(torch.from_numpy(out).split(sizes))


def _check_sizes(count, sizes):
    if count < 1 or min(sizes, default=1) < 1:
        raise ValueError(f"{count} values have no {sizes} centroids")


def histogram(weight):
    """Distinct values of a half-precision weight, ascending, and their counts."""
    check(weight)
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"the weight is {weight.dtype}, not in half precision")
    bits = weight.detach().cpu().contiguous().view(torch.uint16).numpy().reshape(-1)
    counts = np.zeros((2 * torch.get_num_threads(), 2**16), np.int64)
    run(_count, bits, counts)
    counts = counts.sum(axis=0)
    (used,) = counts.nonzero()
    values = torch.from_numpy(used.astype(np.uint16)).view(weight.dtype).double().numpy()
    order = values.argsort()
    return values[order], counts[used[order]]


@kernel(parallel=True, nogil=True)
def _count(bits, counts):
    """How often each 16-bit pattern stands in `bits` [n]: counts [parts, 65536], to be added up."""
    parts = len(counts)
    for part in prange(parts):
        for i in range(len(bits) * part // parts, len(bits) * (part + 1) // parts):
            counts[part, bits[i]] += 1


@kernel(parallel=True, nogil=True, error_model="numpy")
def _fit_rows(rows, masses, sizes, out):
    """Centroids of each ascending row of `rows` [R, n] with `masses` [R, n] (None: one each), for each size in turn.

    out [R, sum(sizes)].
    """
    count, n = rows.shape
    for task in prange((count + ROWS_PER_TASK - 1) // ROWS_PER_TASK):
        factors = np.full(len(sizes), PENALTY)
        x, mass, moment = np.empty(n), np.empty(n + 1), np.empty(n + 1)
        cost, start = np.empty(n + 1), np.empty(n + 1, np.uint32)
        for row in range(task * ROWS_PER_TASK, min((task + 1) * ROWS_PER_TASK, count)):
            own_masses = None if masses is None else masses[row]
            told = _prefix_sums(rows[row], own_masses, x, mass, moment)
            m, offset = told[0], 0
            sums = x[:m], mass[: m + 1], moment[: m + 1]
            for s in range(len(sizes)):
                own = out[row, offset : offset + sizes[s]]
                factors[s] *= _fit_values(rows[row], sums, told, factors[s], cost, start, own)
                offset += sizes[s]


@kernel(parallel=True, nogil=True, error_model="numpy")
def _fit_histogram(values, counts, sizes, out):
    """Centroids of ascending `values` [n] with `counts` [n] (None: one each), for each size in turn: out [sum(sizes)]."""
    n = len(values)
    x, mass, moment = np.empty(n), np.empty(n + 1), np.empty(n + 1)
    told = _prefix_sums(values, counts, x, mass, moment)
    m, ends = told[0], np.cumsum(sizes)
    sums = x[:m], mass[: m + 1], moment[: m + 1]
    for s in prange(len(sizes)):
        cost, start = np.empty(m + 1), np.empty(m + 1, np.uint32)
        _fit_values(values, sums, told, PENALTY, cost, start, out[ends[s] - sizes[s] : ends[s]])


@kernel(error_model="numpy")
def _prefix_sums(values, counts, x, mass, moment):
    """Number of distinct values, a unit of about their size, their mean in it, and the sum of squares about that.

    Fills x, the distinct values in the unit about the mean, and prefix sums of counts and of count times x.
    """
    unit = _unit(max(abs(values[0]), abs(values[-1])))
    inverse = 1 / unit
    total, weight = 0.0, 0.0
    for i in range(len(values)):
        w = 1.0 if counts is None else float(counts[i])
        total += w * (values[i] * inverse)
        weight += w
    center = total / weight
    m, squares = 0, 0.0
    mass[0], moment[0] = 0.0, 0.0
    for i in range(len(values)):
        w = 1.0 if counts is None else float(counts[i])
        if i == 0 or values[i] != values[i - 1]:
            x[m] = values[i] * inverse - center
            m += 1
            mass[m], moment[m] = mass[m - 1], moment[m - 1]
        mass[m] += w
        moment[m] += w * x[m - 1]
        squares += w * x[m - 1] * x[m - 1]
    return m, unit, center, squares


@kernel()
def _unit(size):
    """A power of two: values in it neither overflow nor underflow when squared, and lose nothing."""
    _, exponent = math.frexp(size)
    return 2.0 ** min(max(exponent, -1000), 1000)


@kernel(error_model="numpy")
def _fit_values(values, sums, told, factor, cost, start, out):
    """Write as many centroids as `out` takes; returns how far off `factor` of the estimated penalty was, a share of it."""
    x, mass, moment = sums
    m, unit, center, squares = told
    k = len(out)
    if m <= k:
        _write_distinct(values, 1.0, out)
        out[m:] = out[m - 1]
        return 1.0
    penalty = factor * _estimated_penalty(x, mass, k)
    if m > MANY_VALUES and k <= FEW_CLUSTERS:
        x, mass, moment = _possible_boundaries(x, mass, moment, k)
    bounds, found = _best_path(x, mass, moment, k, penalty, cost, start)
    if len(bounds) > k and _write_means(bounds, mass, moment, squares, center, unit, out):
        return (found / penalty) ** 0.3
    _, mass, _ = sums
    x = np.empty(m)
    _write_distinct(values, 1 / unit, x)
    bounds = best_clusters(x, mass, k)
    for c in range(k):
        out[c] = unit * (x[bounds[c]] + mean_from_first(x, mass, bounds[c], bounds[c + 1]))
    return 1.0


@kernel(error_model="numpy")
def _write_means(bounds, mass, moment, squares, center, unit, out):
    """Write the clusters' means; returns whether the sums do tell these clusters from others."""
    explained = 0.0
    for c in range(len(out)):
        w, s = mass[bounds[c + 1]] - mass[bounds[c]], moment[bounds[c + 1]] - moment[bounds[c]]
        explained += s * s / w
        out[c] = unit * (center + s / w)
    return squares - explained > LEAST_SHARE * squares


@kernel()
def _write_distinct(values, factor, out):
    """Write the distinct ones of ascending values, times a power of two."""
    at = 0
    for i in range(len(values)):
        if i == 0 or values[i] != values[i - 1]:
            out[at] = values[i] * factor
            at += 1


@kernel(error_model="numpy")
def _estimated_penalty(x, mass, k):
    """6 x the high-resolution penalty of k clusters: (integral of density^(1/3) / k)^3, from about 40 steps."""
    last = len(x) - 1
    stride = max(last // 32, 1)
    total, at = 0.0, 0
    while at < last:
        # Steps double away from either tail, where values are few and far apart.
        to = at + min(at + 1, stride, (last - at + 1) // 2)
        total += ((mass[to] - mass[at]) * (x[to] - x[at]) ** 2) ** (1 / 3)
        at = to
    return (total / k) ** 3


@kernel(error_model="numpy")
def _best_path(x, mass, moment, k, penalty, cost, start):
    """Boundaries [k + 1] of the best path of k steps, and a penalty at which it is best of all.

    No boundaries where costs that differ by less than their sums' rounding, or too few values, leave no such path.
    """
    cost, start = cost[: len(x) + 1], start[: len(x) + 1]
    nothing = np.empty(0, np.int64)
    if len(x) <= k:
        return np.arange(k + 1) if len(x) == k else nothing, penalty
    few_steps, many_steps = 0, 0  # 0: no such path yet
    few_cost, many_cost = 0.0, 0.0
    few, many = np.empty(0, np.int64), np.empty(0, np.int64)
    exponent, attempts = 1, 0
    while True:
        steps = _penalised_path(x, mass, moment, penalty, cost, start)
        if steps == k:
            return _trace(start, steps), penalty
        if few_steps and many_steps and not few_steps < steps < many_steps:
            return _splice(few, many, k), penalty  # nothing lies below the line through both: they tie here
        if steps < k:
            few_steps, few_cost, few = steps, cost[-1] - steps * penalty, _trace(start, steps)
        else:
            many_steps, many_cost, many = steps, cost[-1] - steps * penalty, _trace(start, steps)
        if few_steps and many_steps:
            penalty = (few_cost - many_cost) / (many_steps - few_steps)
        else:
            attempts += 1
            if attempts > MOST_ATTEMPTS:
                return nothing, penalty
            ratio = (steps / k) ** 3
            penalty *= (max(ratio, 1.12) if steps > k else min(ratio, 1 / 1.12)) ** exponent
            exponent *= 2


@kernel(error_model="numpy")
def _penalised_path(x, mass, moment, penalty, cost, start):
    """Steps of the path with the least squared error + penalty x steps.

    cost[i] is that (less the sum of squares, which all paths share) of the best path to i, and start[i]
    its last boundary but one.
    """
    m = uint64(len(x))
    for i in range(ONE, m + ONE):
        cost[i] = penalty - moment[i] * moment[i] / mass[i]
        start[i] = 0
    cost[0] = 0.0
    i = ONE
    for j in range(ONE, m):
        mass_j, moment_j, before = mass[j], moment[j], uint64(start[j])
        left = (moment_j - moment[before]) / (mass_j - mass[before])
        # x[j - 1] <= (left + mean of j ... i-1) / 2 <= x[j]
        low, high = 2 * x[j - ONE] - left, 2 * x[j] - left
        base = cost[j] + penalty
        i = max(i, j + ONE + BACK) - BACK
        while i > j + ONE and moment[i - ONE] - moment_j >= low * (mass[i - ONE] - mass_j):
            i -= ONE
        while i <= m:
            w, s = mass[i] - mass_j, moment[i] - moment_j
            if s > high * w:
                break
            new = base - s * s / w
            better = new < cost[i]
            cost[i] = new if better else cost[i]  # without a branch: it would be mispredicted half the time
            start[i] = j if better else start[i]
            i += ONE
    steps, at = 0, m
    while at > 0:
        at = uint64(start[at])
        steps += 1
    return steps


@kernel(error_model="numpy")
def _possible_boundaries(x, mass, moment, k):
    """x, mass and moment with values merged across which no boundary of the best k clusters can lie.

    A boundary lies at the midpoint of its clusters' means, which moves right with any other boundary. So from
    boundaries all too far left, moving each to its midpoint, again and again, never passes the best ones, and
    neither does the same from the right: the best lie between where both come to rest.
    """
    m = len(x)
    left, right = np.arange(k + 1), np.arange(m - k, m + 1)
    left[k], right[0] = m, 0
    moved = True
    while moved:
        moved = False
        for c in range(1, k):
            # From boundary to next boundary, all of them too far left: the midpoint is no further right than the next.
            low, high, middle = left[c], left[c + 1], _midpoint(mass, moment, left[c - 1], left[c], left[c + 1])
            while low < high:
                at = (low + high) // 2
                if x[at] < middle:
                    low = at + 1
                else:
                    high = at
            moved |= low > left[c]
            left[c] = low
        for c in range(k - 1, 0, -1):
            low, high, middle = right[c - 1], right[c], _midpoint(mass, moment, right[c - 1], right[c], right[c + 1])
            while low < high:
                at = (low + high) // 2
                if x[at] <= middle:
                    low = at + 1
                else:
                    high = at
            moved |= low < right[c]
            right[c] = low
    possible = np.zeros(m + 1, np.bool_)
    possible[0] = possible[m] = True
    for c in range(1, k):
        possible[left[c] : right[c] + 1] = True
    (nodes,) = np.nonzero(possible)
    mass, moment = mass[nodes], moment[nodes]
    return (moment[1:] - moment[:-1]) / (mass[1:] - mass[:-1]), mass, moment


@kernel(error_model="numpy")
def _midpoint(mass, moment, begin, boundary, end):
    """Between the means of the clusters on both sides of a boundary."""
    left = (moment[boundary] - moment[begin]) / (mass[boundary] - mass[begin])
    return (left + (moment[end] - moment[boundary]) / (mass[end] - mass[boundary])) / 2


@kernel()
def _trace(start, steps):
    bounds = np.empty(steps + 1, np.int64)
    at = len(start) - 1
    for c in range(steps, -1, -1):
        bounds[c] = at
        at = start[at]
    return bounds


@kernel()
def _splice(few, many, k):
    """A path of k steps from two that are best at the same penalty: the first steps of `few`, the last of `many`."""
    shift = len(many) - 1 - k
    for c in range(len(few) - 1):
        d = c + shift
        if d + 1 < len(many) and few[c] <= many[d] and many[d + 1] <= few[c + 1]:
            return np.concatenate((few[: c + 1], many[d + 1 :]))
    return few  # only by rounding: between the first step and the last, the paths cross at every shift
