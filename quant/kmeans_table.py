"""Exact one-dimensional K-Means by the plain table, for values whose sums do not tell their clusters apart.

Row r of the table holds the least squared error of the first values in r clusters (Wang and Song, 2011). The best last
boundary moves right with the last value, so each row is filled from coarse to fine between those already known (Gronlund
et al., 2017): O(k m log m) costs for m values.

What makes it exact for any finite values is how the cost of a cluster is found: not as the difference of sums over all
values, in which one far value drowns the rest, but merged of parts that lie side by side (Chan, Golub and LeVeque, 1979),

    error = error_1 + error_2 + (mean_2 - mean_1)^2 w_1 w_2 / (w_1 + w_2),

where each part's mean is told from the nearest value of its own. No two large numbers are subtracted, so a cost is right
to a few units of double precision relative to itself. The parts are kept for blocks of values, and for runs of blocks.
"""

import numpy as np

from quant.compiled import kernel

BLOCK = 16  # values
MOST_PLACES = 2**18  # where boundaries may lie, which bounds the memory,
WHOLE_ENDS = 2**16  # if there are more values: these many at each end, and as evenly as possible between


@kernel(error_model="numpy")
def best_clusters(x, mass, k):
    """Boundaries [k + 1] of the best k clusters of ascending distinct `x` [m], `mass` [m + 1] the sums of their counts.

    1 <= k < m. Of more than MOST_PLACES values the inner boundaries lie between some of them only, then near those found.
    """
    parts = _parts_of_blocks(x, mass)
    runs = _parts_of_runs(x, mass, parts)
    m = len(x)
    if m < MOST_PLACES:
        return _best_at(np.arange(m + 1), x, mass, parts, runs, k)
    ends = np.arange(WHOLE_ENDS)
    between = np.linspace(WHOLE_ENDS, m - WHOLE_ENDS, MOST_PLACES - 2 * WHOLE_ENDS).astype(np.int64)
    found = _best_at(np.concatenate((ends, between, m + 1 - WHOLE_ENDS + ends)), x, mass, parts, runs, k)
    near = np.zeros(m + 1, np.bool_)
    near[0] = near[m] = True
    reach = min(MOST_PLACES // (2 * k), 4 * (m // len(between) + 1))
    for c in range(1, k):
        near[max(found[c] - reach, 0) : found[c] + reach + 1] = True
    return _best_at(np.nonzero(near)[0], x, mass, parts, runs, k)


@kernel(error_model="numpy")
def mean_from_first(x, mass, begin, end):
    """Mean of the values begin ... end - 1, less the first of them."""
    total = 0.0
    for i in range(begin + 1, end):
        total += (mass[i + 1] - mass[i]) * (x[i] - x[begin])
    return total / (mass[end] - mass[begin])


@kernel(error_model="numpy")
def _best_at(places, x, mass, parts, runs, k):
    """The best boundaries [k + 1] among ascending `places` [p], the first 0 and the last m; k < p."""
    count = len(places)
    cost, new = np.empty(count), np.empty(count)
    last = np.zeros((k + 1, count), np.int32)  # the last boundary but one, as a number of its place
    for p in range(1, count):
        cost[p] = _cost(0, places[p], x, mass, parts, runs)
    for row in range(2, k + 1):
        _fill(row, places, x, mass, parts, runs, cost, new, last[row])
        cost, new = new, cost
    bounds = np.empty(k + 1, np.int64)
    at = count - 1
    for row in range(k, 0, -1):
        bounds[row] = places[at]
        at = last[row, at]
    bounds[0] = 0
    return bounds


@kernel(error_model="numpy")
def _fill(row, places, x, mass, parts, runs, cost, new, last):
    """One row of the table: `new` of `cost`, the row before, and `last`, coarse steps first."""
    count = len(places) - row  # places from `row` on, as each cluster takes one
    stride = 1
    while stride < count:
        stride *= 2
    while stride:
        for number in range(stride, count + 1, 2 * stride):
            p = number - 1 + row
            low = row - 1 if number == stride else last[p - stride]
            high = last[p + stride] if number + stride <= count else p - 1
            best, place = np.inf, low
            for q in range(min(high, p - 1), low - 1, -1):
                step = _cost(places[q], places[p], x, mass, parts, runs)
                if step > best:
                    break  # wider clusters cost more
                if cost[q] + step < best:
                    best, place = cost[q] + step, q
            new[p], last[p] = best, place
        stride //= 2


@kernel(error_model="numpy")
def _joined(part, weight, error, mean, distance):
    """Part (weight, error, mean) and the one to its right; means from points of which the second is `distance` further."""
    own_weight, own_error, own_mean = part
    total = own_weight + weight
    gap = distance + mean - own_mean
    share = weight / total
    return total, own_error + error + gap * gap * own_weight * share, own_mean + gap * share


@kernel(error_model="numpy")
def _cost(begin, end, x, mass, parts, runs):
    """Squared error of the values begin ... end - 1 about their mean."""
    first, last = begin // BLOCK, (end - 1) // BLOCK
    if first == last:
        part = mass[begin + 1] - mass[begin], 0.0, 0.0
        for i in range(begin + 1, end):
            part = _joined(part, mass[i + 1] - mass[i], 0.0, 0.0, x[i] - x[begin])
        return part[1]
    edge = BLOCK * (first + 1)
    part = mass[edge] - mass[begin], parts[2, begin], parts[3, begin]  # from the last value of its block
    origin = x[edge - 1]
    if last - first > 1:
        level = 0
        while (first + 1) >> level != (last - 1) >> level:
            level += 1
        middle = edge
        if level:
            middle = BLOCK * (((last - 1) >> (level - 1)) << (level - 1))
            run = runs[level, :, first + 1]  # from the last value before the middle
            part = _joined(part, mass[middle] - mass[edge], run[0], run[1], x[middle - 1] - origin)
        stop = BLOCK * last
        run = runs[level, :, last - 1]  # from the first value of the middle
        part = _joined(part, mass[stop] - mass[middle], run[0], run[1], x[middle] - origin)
    start = BLOCK * last
    part = _joined(part, mass[end] - mass[start], parts[0, end - 1], parts[1, end - 1], x[start] - origin)
    return part[1]


@kernel(error_model="numpy")
def _parts_of_blocks(x, mass):
    """[4, m]: error and mean of a block's values up to each, from its first; and of those from each on, from its last."""
    m = len(x)
    parts = np.empty((4, m))
    for start in range(0, m, BLOCK):
        stop = min(start + BLOCK, m)
        part = 0.0, 0.0, 0.0
        for i in range(start, stop):
            part = _joined(part, mass[i + 1] - mass[i], 0.0, 0.0, x[i] - x[start])
            parts[0, i], parts[1, i] = part[1], part[2]
        part = 0.0, 0.0, 0.0
        for i in range(stop - 1, start - 1, -1):
            part = _joined(part, mass[i + 1] - mass[i], 0.0, 0.0, x[i] - x[stop - 1])
            parts[2, i], parts[3, i] = part[1], part[2]
    return parts


@kernel(error_model="numpy")
def _parts_of_runs(x, mass, parts):
    """[levels, 2, blocks]: error and mean of runs of blocks.

    Level 0 has the blocks, each from its first value. On level l blocks come in pieces of 2^l; in the right half of a
    piece a run begins at the piece's middle and ends with the block, its mean from the first value of the middle; in the
    left half it begins with the block and ends before the middle, its mean from the last value there.
    """
    m = len(x)
    count = (m + BLOCK - 1) // BLOCK
    levels = 1
    while 1 << (levels - 1) < count:
        levels += 1
    runs = np.zeros((levels, 2, count))
    for block in range(count):
        last = min(BLOCK * (block + 1), m) - 1
        runs[0, 0, block], runs[0, 1, block] = parts[0, last], parts[1, last]
    for level in range(1, levels):
        half = 1 << (level - 1)
        for middle in range(half, count, 2 * half):
            origin = x[BLOCK * middle]
            part = 0.0, 0.0, 0.0
            for block in range(middle, min(middle + half, count)):
                start, stop = BLOCK * block, min(BLOCK * (block + 1), m)
                part = _joined(part, mass[stop] - mass[start], runs[0, 0, block], runs[0, 1, block], x[start] - origin)
                runs[level, 0, block], runs[level, 1, block] = part[1], part[2]
            origin = x[BLOCK * middle - 1]
            part = 0.0, 0.0, 0.0
            for block in range(middle - 1, middle - half - 1, -1):
                start, stop = BLOCK * block, BLOCK * (block + 1)
                part = _joined(part, mass[stop] - mass[start], parts[2, start], parts[3, start], x[stop - 1] - origin)
                runs[level, 0, block], runs[level, 1, block] = part[1], part[2]
    return runs
