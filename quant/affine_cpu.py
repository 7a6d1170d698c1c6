"""The search of quant/affine.py on the CPU: a row at a time, compiled, all starts of it while it is in the cache."""

import numpy as np
import torch
from numba import prange

from quant.compiled import kernel
from quant.rows import run

KEPT_STARTS = 4  # of which codes and tables are found in turns
MOST_TURNS = 200
NO_MASSES = np.empty((0, 0), np.float32)


class HostRows:
    """Ascending rows [R, n] of float32 (numpy); masses [R, n] weigh their squared errors. See affine.SortedRows."""

    def __init__(self, values, masses=None):
        self.values, self.masses = values, NO_MASSES if masses is None else masses
        self.low, self.high = (torch.from_numpy(values[:, place].astype(np.float64)) for place in (0, -1))
        mean = values.mean(axis=1, dtype=np.float64) if masses is None else np.average(values, axis=1, weights=masses)
        self.mean = torch.from_numpy(mean)

    def search(self, start, bits):
        """The best scale and offset [R] that are found from the starts (scales, offsets), each [P, R]."""
        return self._run(_search, bits, *start, count=2)

    def settled(self, scale, offset, bits):
        """The best offset [R] for a scale [R] that does not change, from `offset`."""
        return self._run(_settle, bits, scale, offset)[0]

    def errors(self, scale, offset, bits):
        """Squared errors [R] that a scale and offset [R] leave."""
        return self._run(_errors, bits, scale, offset)[0]

    def _run(self, function, bits, *tables, count=1):
        out = np.empty((count, len(self.values)))
        tables = [np.ascontiguousarray(each.numpy()) for each in tables]
        run(function, self.values, self.masses, self.mean.numpy(), 2**bits - 1, *tables, out)
        return torch.from_numpy(out)


@kernel(parallel=True, nogil=True, error_model="numpy")
def _search(rows, masses, means, top, scales, offsets, out):
    """out [2, R] of starts [P, R]."""
    for r in prange(len(rows)):
        values, below = _prepared(rows[r], masses, means[r], r)
        errors = np.empty(len(scales))
        for p in range(len(scales)):
            errors[p] = _regressed(_sums(values, below, scales[p, r], offsets[p, r] - means[r], top), below)[2]
        best, best_scale, best_offset = np.inf, scales[0, r], offsets[0, r] - means[r]
        for _ in range(min(KEPT_STARTS, len(errors))):
            p = np.argmin(errors)
            errors[p] = np.inf
            scale, offset, error = _in_turns(values, below, scales[p, r], offsets[p, r] - means[r], top)
            if error < best:
                best, best_scale, best_offset = error, scale, offset
        out[0, r], out[1, r] = best_scale, best_offset + means[r]


@kernel(error_model="numpy")
def _in_turns(values, below, scale, offset, top):
    error = np.inf
    for _ in range(MOST_TURNS):
        new_scale, new_offset, new_error = _regressed(_sums(values, below, scale, offset, top), below)
        if not new_error < error * (1 - 1e-12):
            break
        scale, offset, error = new_scale, new_offset, new_error
    return scale, offset, error


@kernel(parallel=True, nogil=True, error_model="numpy")
def _settle(rows, masses, means, top, scales, offsets, out):
    for r in prange(len(rows)):
        values, below = _prepared(rows[r], masses, means[r], r)
        offset = offsets[r] - means[r]
        for _ in range(MOST_TURNS):
            count, _, _ = _sums(values, below, scales[r], offset, top)
            new = -scales[r] * count / below[0, -1]
            if new == offset:
                break
            offset = new
        out[0, r] = offset + means[r]


@kernel(parallel=True, nogil=True, error_model="numpy")
def _errors(rows, masses, means, top, scales, offsets, out):
    for r in prange(len(rows)):
        values, below = _prepared(rows[r], masses, means[r], r)
        scale, offset, mass = scales[r], offsets[r] - means[r], below[0, -1]
        count, square, moment = _sums(values, below, scale, offset, top)
        crossed = 2 * scale * offset * count - 2 * scale * moment
        out[0, r] = below[2, -1] + scale * scale * square + crossed + offset * offset * mass


@kernel(error_model="numpy")
def _prepared(row, masses, mean, r):
    """The row less its mean, and sums [3, n + 1] below each place of masses, of first and of second moments."""
    values, below = np.empty(len(row)), np.zeros((3, len(row) + 1))
    for i in range(len(row)):
        value, mass = np.float64(row[i]) - mean, 1.0
        if len(masses):
            mass = np.float64(masses[r, i])
        values[i] = value
        below[0, i + 1] = below[0, i] + mass
        below[1, i + 1] = below[1, i] + mass * value
        below[2, i + 1] = below[2, i] + mass * value * value
    return values, below


@kernel(error_model="numpy")
def _sums(values, below, scale, offset, top):
    """Sums over a row of its codes, of their squares and of code x value, each times its mass."""
    count, square, moment, at = 0.0, 0.0, 0.0, 0
    mass, first = below[0, -1], below[1, -1]
    for code in range(1, top + 1):
        limit = offset + (code - 0.5) * scale
        step = 1
        while at + step < len(values) and values[at + step] < limit:  # doubled steps to beyond the limit, then bisection
            step *= 2
        low, high = at + step // 2, min(at + step, len(values))
        while low < high:
            middle = (low + high) // 2
            if values[middle] < limit:
                low = middle + 1
            else:
                high = middle
        at = low
        above = mass - below[0, at]
        count += above
        square += (2 * code - 1) * above
        moment += first - below[1, at]
        if at == len(values):
            break
    return count, square, moment


@kernel(error_model="numpy")
def _regressed(sums, below):
    """(scale, offset, squared error) of the regression of a row's values on its codes; infinite where there is none."""
    count, square, moment = sums
    mass = below[0, -1]
    spread = square - count * count / mass
    if not (spread > 1e-9 * mass and moment > 0):
        return 1.0, 0.0, np.inf
    scale = moment / spread
    return scale, -scale * count / mass, below[2, -1] - moment * moment / spread
