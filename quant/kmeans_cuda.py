"""K-Means-C on a CUDA device: the same shortest paths as `quant/kmeans_cpu.py`, a warp for each channel.

All channels of a layer are searched side by side, in Triton, each by one warp, whose threads try the successors of
a boundary together. Rows are not merged to distinct values here; a row for which no path of k steps is best at any
penalty, with no more than k distinct values, or whose sums do not tell its clusters from others, is left to the CPU. So
are all rows where many centroids are asked for.
"""

import torch
import triton
import triton.language as tl

from quant import kmeans_cpu

LANES = 32  # successors tried together: one warp
STEPS_BACK = tl.constexpr(12)
MOST_CENTROIDS = 16  # that this has been measured with
MOST_ATTEMPTS = tl.constexpr(12)  # at a first penalty; see the CPU's
UNFOUND = -1


def fit_per_channel(weight, sizes):
    """Optimal centroids of each output channel of `weight` [C, ...] for each of `sizes`: [[C, k], ...], float64."""
    rows = weight.reshape(len(weight), -1).to(torch.promote_types(weight.dtype, torch.float32)).sort(dim=1).values
    distinct = (rows.diff(dim=1) != 0).sum(dim=1) + 1
    exponent = rows[:, [0, -1]].abs().amax(dim=1, keepdim=True).double().frexp().exponent.clamp(-1000, 1000)
    unit = 2.0 ** exponent.double()
    scaled = rows.double() / unit
    center = scaled.mean(dim=1, keepdim=True)
    x = scaled - center
    squares = x.square().sum(dim=1)
    moment = torch.nn.functional.pad(x.cumsum(dim=1), (1, 0))  # [C, n + 1]
    tables = []
    for k in sizes:
        if k > MOST_CENTROIDS:
            tables.append(_on_cpu(rows, k))
            continue
        bounds = _best_paths(x, moment, k, distinct > k)  # [C, k + 1]
        left = bounds[:, 0] == UNFOUND
        bounds = bounds.where(~left[:, None], 0)
        sums, counts = moment.gather(1, bounds).diff(dim=1), bounds.diff(dim=1)
        told = squares - (sums.square() / counts).sum(dim=1) > kmeans_cpu.LEAST_SHARE * squares
        left |= ~told
        table = (sums / counts + center) * unit
        if left.any():
            table[left] = _on_cpu(rows[left], k)
        tables.append(table)
    return tables


def _on_cpu(rows, k):
    return kmeans_cpu.fit_sorted(rows.cpu().numpy(), [k])[0].to(rows.device)


def _best_paths(x, moment, k, wanted):
    """Boundaries [C, k + 1] of the best path of k steps of each `wanted` row; UNFOUND first where there is none."""
    channels, n = x.shape
    penalty = (kmeans_cpu.PENALTY * _estimated_penalty(x, k)).where(wanted, 0)
    cost = torch.empty_like(moment)
    start = torch.empty(moment.shape, dtype=torch.int32, device=x.device)
    bounds = torch.full((channels, k + 1), UNFOUND, dtype=torch.int64, device=x.device)
    inverse = 1 / torch.arange(n + 1, dtype=torch.float64, device=x.device)
    _search[(channels,)](x, moment, inverse, penalty, cost, start, bounds, n, k, LANES, num_warps=1)
    return bounds


def _estimated_penalty(x, k):
    """As the CPU's, for all rows: [C]."""
    last, places = x.shape[1] - 1, [0]
    stride = max(last // 32, 1)
    while places[-1] < last:
        at = places[-1]
        places.append(at + min(at + 1, stride, (last - at + 1) // 2))
    places = torch.tensor(places, device=x.device)
    steps = places.diff() * x[:, places].diff(dim=1) ** 2
    return (steps ** (1 / 3)).sum(dim=1).div(k).pow(3)


@triton.jit
def _search(x, moment, inverse, penalties, cost, start, bounds, n, k, LANES: tl.constexpr):
    """Boundaries of one row's best path of k steps; see `_best_path` of the CPU's."""
    row = tl.program_id(0).to(tl.int64)
    x += row * n
    moment += row * (n + 1)
    cost += row * (n + 1)
    start += row * (n + 1)
    penalty = tl.load(penalties + row)
    few_cost, many_cost = penalty * 0, penalty * 0
    few_steps, many_steps, attempts = 0, 0, 0
    searching = penalty > 0
    while searching:
        steps = _penalised_path(x, moment, inverse, penalty, cost, start, n, LANES)
        error = tl.load(cost + n) - steps * penalty
        both = (few_steps > 0) & (many_steps > 0)
        tied = both & ((steps <= few_steps) | (steps >= many_steps))
        searching = (steps != k) & (tied == 0)
        if steps == k:
            at = n
            for c in range(k + 1):
                tl.store(bounds + row * (k + 1) + k - c, at)
                at = tl.load(start + at)
        elif steps < k:
            few_cost, few_steps = error, steps
        else:
            many_cost, many_steps = error, steps
        if (few_steps > 0) & (many_steps > 0):
            penalty = (few_cost - many_cost) / (many_steps - few_steps)
        else:
            ratio = steps / (k + few_cost * 0)
            ratio = ratio * ratio * ratio
            ratio = tl.where(steps > k, tl.maximum(ratio, 1.12), tl.minimum(ratio, 1 / 1.12))
            for _ in range(attempts):
                ratio = ratio * ratio
            penalty = penalty * ratio
            searching = searching & (attempts < MOST_ATTEMPTS)
            attempts += 1


@triton.jit
def _penalised_path(x, moment, inverse, penalty, cost, start, n, LANES: tl.constexpr):
    """Steps of the path with the least squared error + penalty x steps; see `_penalised_path` of the CPU's."""
    lanes = tl.arange(0, LANES)
    for first in range(0, n + 1, LANES):
        i = first + lanes
        s = tl.load(moment + i, i <= n, 0.0)
        tl.store(cost + i, tl.where(i > 0, penalty - s * s * tl.load(inverse + i, i <= n, 0.0), 0.0), i <= n)
        tl.store(start + i, i * 0, i <= n)
    tl.debug_barrier()
    first = 1
    left_x = tl.load(x)
    for j in range(1, n):
        right_x = tl.load(x + j)
        moment_j = tl.load(moment + j)
        before = tl.load(start + j)
        base = tl.load(cost + j) + penalty
        left = (moment_j - tl.load(moment + before)) * tl.load(inverse + (j - before))
        low, high = 2 * left_x - left, 2 * right_x - left
        left_x = right_x
        first = tl.maximum(first - STEPS_BACK, j + 1)
        while (first > j + 1) & (tl.load(moment + first - 1) - moment_j >= low * (first - 1 - j)):
            first = tl.maximum(first - LANES // 2, j + 1)
        reached = LANES
        while reached == LANES:
            i = first + lanes
            inside = i <= n
            s = tl.load(moment + i, inside, 0.0) - moment_j
            new = base - s * s * tl.load(inverse + (i - j), inside, 0.0)
            better = inside & (new < tl.load(cost + i, inside, 0.0))
            tl.store(cost + i, new, better)
            tl.store(start + i, i * 0 + j, better)
            # Successors beyond the midpoint rule are no better, so that trying them does no harm.
            reached = tl.sum((inside & (s <= high * (i - j))).to(tl.int32), axis=0)
            first += reached
        tl.debug_barrier()
    steps, at = 0, n
    while at > 0:
        at = tl.load(start + at)
        steps += 1
    return steps
