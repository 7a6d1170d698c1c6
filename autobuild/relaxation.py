"""A lower bound of the squared length of the shortest sum of shifts, by a convex relaxation of the choice of methods.

With x [W, M] one-hot for each weight, the squared length is x'Gx, G the inner products of all shifts. Where x may be any
shares that add up to 1 for each weight, the minimum is a convex quadratic program, and a lower bound. It is raised first:
of one-hot x, x'Bx is linear in x for B the diagonal blocks of G, so x'Gx = x'(G - tB)x + t diag(B)'x, and the less of it
is quadratic the less mixing gains. t is the largest that leaves G - tB positive semidefinite, or nearly: what is lacking
to it, times the number of weights, is taken off the bound. (Billionnet et al., 2009, on such convexifications.)

Whatever point the descent has reached, the tangent there bounds the function from below, and its minimum within the limit
is that of a linear multiple-choice knapsack, bounded by its dual. So the bound holds wherever the descent stops.
"""

import numpy as np

STEPS, CHECKED_EVERY, HALVINGS = 400, 20, 60
LARGEST_DENSE = 4000  # variants of all weights, of whose products eigenvalues are computed; for more t = 0


class Relaxation:
    """The relaxation for products [W, M, W, M], sizes [W, M], a limit of their sum and what is allowed, bool [W, M]."""

    def __init__(self, products, sizes, limit, allowed):
        self.shape = sizes.shape
        self.unit = max(np.abs(np.diagonal(_flat(products))).max(), 1e-30)
        self.sizes, self.limit = sizes / sizes.max(), limit / sizes.max()
        self.forbidden = ~allowed
        self.products = _flat(products)
        self.linear, self.constant = np.zeros(self.shape), 0.0
        if self.products.shape[0] <= LARGEST_DENSE:
            self._convexify(products)

    def _convexify(self, products):
        """Move as much of the diagonal blocks as leaves the rest convex into the linear part."""
        places = np.arange(self.shape[0])
        blocks = products[places, :, places, :].astype(np.float64)  # [W, M, M]
        values, vectors = np.linalg.eigh(blocks)
        is_large = values > 1e-6 * values.max(axis=1, keepdims=True)
        roots = np.where(is_large, 1 / np.sqrt(np.where(is_large, values, 1)), 0)[:, :, None] * vectors.transpose(0, 2, 1)
        whitened = np.einsum("aim,ambn,bjn->aibj", roots, products.astype(np.float64), roots, optimize=True)
        kept = is_large.flatten()
        share = np.linalg.eigvalsh(_flat(whitened)[kept][:, kept])[0] if kept.any() else 1.0
        share = float(np.clip(share, 0, 1))
        rest = products.astype(np.float64)
        rest[places, :, places, :] -= share * blocks
        self.linear = share * np.diagonal(blocks, axis1=1, axis2=2)
        lacking = min(np.linalg.eigvalsh(_flat(rest))[0], 0.0)
        self.products = _flat(rest) - lacking * np.eye(rest.shape[0] * rest.shape[1])
        self.constant = lacking * self.shape[0]

    def solve(self):
        """(lower bound, slope [W, M] of the function at the best point found). Accelerated projected gradients."""
        steepness = 2 * self._largest_eigenvalue()
        shares = previous = self._project(np.zeros(self.shape))
        momentum, bound, slope = 1.0, -np.inf, None
        for step in range(STEPS + 1):
            if step % CHECKED_EVERY == 0:
                found, own = self._tangent_bound(shares)
                if slope is None or found > bound:
                    slope = own
                if step and found <= bound * (1 + 1e-5) and found > 0:
                    break
                bound = max(bound, found)
            following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
            ahead = shares + (momentum - 1) / following * (shares - previous)
            previous, momentum = shares, following
            shares = self._project(ahead - self._slope(ahead) / steepness)
        return bound, slope

    def _times(self, shares):
        return (self.products @ shares.astype(self.products.dtype).ravel()).reshape(self.shape).astype(np.float64)

    def _slope(self, shares):
        return 2 * self._times(shares) + self.linear

    def _largest_eigenvalue(self):
        """Or a little more, by power iterations."""
        vector = np.random.default_rng(0).random(self.shape)
        for _ in range(30):
            vector = self._times(vector / np.linalg.norm(vector))
        return max(1.1 * np.linalg.norm(vector), 1e-12 * self.unit)

    def _tangent_bound(self, shares):
        """(least value within the limit of the function's tangent at a point, its slope)."""
        quadratic = self._times(shares)
        slope = 2 * quadratic + self.linear
        masked = np.where(self.forbidden, np.inf, slope)
        scale = np.abs(slope).max() / max(np.ptp(self.sizes), 1e-12) + 1e-30

        def dual(price):
            best = (masked + price * self.sizes).argmin(axis=1)[:, None]
            size = np.take_along_axis(self.sizes, best, 1).sum()
            return np.take_along_axis(masked, best, 1).sum() + price * (size - self.limit), size

        low, high = 0.0, 1e-6 * scale
        value, size = dual(0.0)
        best = value
        if size > self.limit:
            while dual(high)[1] > self.limit and high < 1e9 * scale:
                high *= 4
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                value, size = dual(middle)
                best = max(best, value)
                low, high = (middle, high) if size > self.limit else (low, middle)
        return best - (shares * quadratic).sum() + self.constant, slope

    def _project(self, values):
        """The nearest shares [W, M] that are allowed and within the limit."""
        values = np.where(self.forbidden, -1e30, values)
        shares = _onto_simplices(values)
        if (shares * self.sizes).sum() <= self.limit:
            return shares
        low, high = 0.0, 1.0
        while (_onto_simplices(values - high * self.sizes) * self.sizes).sum() > self.limit and high < 1e12:
            low, high = high, 4 * high
        for _ in range(HALVINGS // 2):
            middle = (low + high) / 2
            over = (_onto_simplices(values - middle * self.sizes) * self.sizes).sum() > self.limit
            low, high = (middle, high) if over else (low, middle)
        return _onto_simplices(values - high * self.sizes)


def _onto_simplices(values):
    """For each row of values [W, M] the nearest that is not negative and adds up to 1 (Held et al., 1974)."""
    descending = -np.sort(-values, axis=1)
    excess = (np.cumsum(descending, axis=1) - 1) / np.arange(1, values.shape[1] + 1)
    count = (descending > excess).sum(axis=1, keepdims=True)
    return np.maximum(values - np.take_along_axis(excess, count - 1, 1), 0)


def _flat(products):
    count = products.shape[0] * products.shape[1]
    return products.reshape(count, count)
