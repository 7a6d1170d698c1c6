"""Affine quantization of weights: w' = scale x code + offset, least squares, per output channel or group of its inputs.

The offset is a real number in the weights' precision, where UAQ (quant/uaq.py) has a whole zero point, and what is
minimised is the squared error, where it has the power 2.4. From many shrinks of both ends of a row's range, each by
itself, codes and (scale, offset) are found in turns, the one given the other, until nothing changes: codes by rounding,
scale and offset by linear regression. So no result is worse than the grid from the least to the largest weight, nor than
UAQ's. Rounding to the tables' precision comes last: of neighbouring scales, each with the best offset for it, the best.

Weights that share a code are neighbours in their sorted row. So what any scale and offset leave follows from sums up to
2^bits places in it, in O(2^bits log n). `fit` is that in torch, on any device; quant/affine_cpu.py the same for the CPU, a
row at a time.
"""

import torch

from quant.affine_cpu import KEPT_STARTS, MOST_TURNS, HostRows
from quant.uaq import SHRINKS, storable_scale

# Of each end towards the row's mean, from which the search starts: all pairs.
ENDS = {2: 16, 3: 14, 4: 12, 5: 8, 6: 6, 7: 5, 8: 4}  # bits: how many
LEAST_END = 0.2
NUMBERS = 2**24  # held at a time


def quantize(weight, scale, offset, bits):
    """Codes (uint8) 0 ... 2^bits - 1 of the nearest levels, of `weight` [C, ...]: round((w - offset) / scale), clipped.

    `scale` and `offset` are [C]; computed in float32 (float64 for float64 weights).
    """
    scale, offset = _per_channel(weight, scale, offset)
    steps = (weight.to(scale.dtype) - offset).div_(scale).round_()
    return steps.clamp_(0, 2**bits - 1).to(torch.uint8)


def dequantize(codes, scale, offset):
    """Weights scale x code + offset, in the dtype of `scale` [C]: computed in float32 (float64 for float64 scales)."""
    dtype = scale.dtype
    scale, offset = _per_channel(codes, scale, offset)
    return codes.to(scale.dtype).mul_(scale).add_(offset).to(dtype)


def _per_channel(tensor, scale, offset):
    shape = (-1,) + (1,) * (tensor.ndim - 1)
    dtype = torch.promote_types(scale.dtype, torch.float32)
    return scale.to(dtype).reshape(shape), offset.to(dtype).reshape(shape)


def fit(weight, bits, rows=None, masses=None):
    """{b: (scale, offset)} for each of `bits`, each [C], of `weight` [C, ...], in its precision and on its device.

    `masses` [C, n], not negative, weigh the squared errors. `rows` are the weight's sorted rows (numpy, float32), if they
    are at hand and there are no masses. A constant channel is represented exactly.
    """
    if rows is not None and masses is None:
        sorted_rows = HostRows(rows)
    else:
        sorted_rows = _sorted(weight.detach().reshape(len(weight), -1), masses)
    found = {}
    for b in bits:
        scale, offset = sorted_rows.search(starts(sorted_rows.low, sorted_rows.high, sorted_rows.mean, b), b)
        found[b] = _stored(sorted_rows, scale, offset, b, weight.dtype)
    return found


def _sorted(weight, masses):
    """Sorted rows of a weight [C, n] with their masses: HostRows on the CPU, but for float64."""
    if masses is not None:
        masses = masses.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        masses = masses + 1e-6 * masses.mean(dim=1, keepdim=True)  # inputs that were always zero count a little
        masses = torch.where(masses.sum(dim=1, keepdim=True) > 0, masses, 1)
    values, order = weight.to(torch.promote_types(weight.dtype, torch.float32)).sort(dim=1)
    masses = None if masses is None else masses.gather(1, order)
    if weight.device.type == "cpu" and values.dtype == torch.float32:
        return HostRows(values.numpy(), None if masses is None else masses.float().numpy())
    return SortedRows(values, masses)


def starts(low, high, mean, bits):
    """Scales and offsets [P, R], float64, that the search starts from, of rows' least, largest and mean weights [R]."""
    ends = torch.logspace(0, torch.tensor(LEAST_END).log10().item(), ENDS[bits], dtype=torch.float64, device=low.device)
    steps = 2**bits - 1
    lows = mean + (low - mean) * ends.repeat_interleave(len(ends))[:, None]
    highs = mean + (high - mean) * ends.repeat(len(ends))[:, None]
    shrinks = torch.tensor(SHRINKS, dtype=torch.float64, device=low.device)[:, None]
    scales = shrinks * (high - low) / steps
    zeros = (-low * shrinks / scales).round().nan_to_num(0)  # UAQ's
    return torch.cat([(highs - lows) / steps, scales]), torch.cat([lows, -zeros * scales])


def _stored(rows, scale, offset, bits, dtype):
    """The fitted scale and offset [R] in `dtype`: of the scales beside it that are numbers of `dtype`, the best."""
    constant = rows.low == rows.high
    scale = torch.where(constant, torch.where(rows.low == 0, 1, rows.low.abs()), scale)
    offset = torch.where(constant, rows.low, offset)
    if dtype in (torch.float32, torch.float64):
        return storable_scale(scale, dtype), offset.to(dtype)
    nearest = storable_scale(scale, dtype)
    best = torch.full_like(scale, torch.inf)
    kept_scale, kept_offset = nearest, offset.to(dtype)
    for step in (0, -1, 1):
        tried = (nearest.view(torch.int16) + step).view(dtype)  # the next number of positive ones
        usable = (tried > 0) & tried.isfinite() & ~constant
        tried = torch.where(usable, tried, nearest)
        settled = rows.settled(tried.double(), offset, bits).to(dtype)
        errors = rows.errors(tried.double(), settled.double(), bits)
        better = usable & (errors < best)
        best = torch.where(better, errors, best)
        kept_scale = torch.where(better, tried, kept_scale)
        kept_offset = torch.where(better, settled, kept_offset)
    return kept_scale, kept_offset


class SortedRows:
    """Ascending rows [R, n] on any device, and sums of what lies below each place in them; masses [R, n] weigh them."""

    def __init__(self, values, masses=None):
        values = values.double()
        masses = torch.ones_like(values) if masses is None else masses.double()
        self.low, self.high = values[:, 0], values[:, -1]
        self.mass = masses.sum(dim=1)
        self.mean = (values * masses).sum(dim=1) / self.mass
        self.values = (values - self.mean[:, None]).contiguous()
        self.masses_below = torch.nn.functional.pad(masses.cumsum(dim=1), (1, 0))
        self.moments_below = torch.nn.functional.pad((masses * self.values).cumsum(dim=1), (1, 0))
        self.squares = (masses * self.values.square()).sum(dim=1)

    def search(self, start, bits):
        """The best scale and offset [R] that are found from the starts (scales, offsets), each [P, R]."""
        scale, offset = (each.T.contiguous() for each in start)  # [R, P]
        errors = self._by_parts(scale, offset, bits)
        kept = errors.topk(min(KEPT_STARTS, errors.shape[1]), dim=1, largest=False).indices
        scale, offset = scale.gather(1, kept), offset.gather(1, kept)
        error = torch.full_like(scale, torch.inf)
        for _ in range(MOST_TURNS):
            new_scale, new_offset, new_error = self._regressed(*self._sums(scale, offset, bits))
            better = new_error < error * (1 - 1e-12)
            if not better.any():
                break
            scale, offset = torch.where(better, new_scale, scale), torch.where(better, new_offset, offset)
            error = torch.where(better, new_error, error)
        best = error.argmin(dim=1, keepdim=True)
        return scale.gather(1, best)[:, 0], offset.gather(1, best)[:, 0]

    def settled(self, scale, offset, bits):
        """The best offset [R] for a scale [R] that does not change, from `offset`."""
        for _ in range(MOST_TURNS):
            count = self._sums(scale[:, None], offset[:, None], bits)[0][:, 0]
            new = self.mean - scale * count / self.mass
            if torch.equal(new, offset):
                break
            offset = new
        return offset

    def errors(self, scale, offset, bits):
        """Squared errors [R] that a scale and offset [R] leave."""
        count, square, moment = (each[:, 0] for each in self._sums(scale[:, None], offset[:, None], bits))
        shift = offset - self.mean
        crossed = 2 * scale * shift * count - 2 * scale * moment
        return self.squares + scale.square() * square + crossed + shift.square() * self.mass

    def _by_parts(self, scale, offset, bits):
        """Errors [R, P] after regression on the codes of each start, some at a time."""
        step = max(1, NUMBERS // (len(scale) * 2**bits))
        parts = zip(scale.split(step, dim=1), offset.split(step, dim=1), strict=True)
        return torch.cat([self._regressed(*self._sums(*part, bits))[2] for part in parts], dim=1)

    def _sums(self, scale, offset, bits):
        """Sums over a row of its codes, of their squares and of code x (weight - mean), each times its mass: [R, P]."""
        code = torch.arange(1, 2**bits, device=scale.device, dtype=torch.float64)
        limits = (offset - self.mean[:, None])[..., None] + (code - 0.5) * scale[..., None]  # [R, P, K - 1]
        places = torch.searchsorted(self.values, limits.flatten(1))
        masses = (self.mass[:, None] - self.masses_below.gather(1, places)).view(limits.shape)
        moments = (self.moments_below[:, -1:] - self.moments_below.gather(1, places)).view(limits.shape)
        return masses.sum(dim=2), (masses * (2 * code - 1)).sum(dim=2), moments.sum(dim=2)

    def _regressed(self, count, square, moment):
        """(scale, offset, squared error) [R, P] of the regression of a row's weights on its codes."""
        mass = self.mass[:, None]
        spread = square - count.square() / mass
        scale = moment / spread
        error = self.squares[:, None] - moment.square() / spread
        usable = (spread > 1e-9 * mass) & (scale > 0)
        return scale, self.mean[:, None] - scale * count / mass, torch.where(usable, error, torch.inf)
