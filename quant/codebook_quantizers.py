"""Quantizers whose codes count through the centroids of a codebook: K-Means-C, of each channel, and K-Means-A, of all."""

import math

from quant import kmeans, sorted_errors, weighted
from quant.quantizer import TABLE_DTYPES, Quantizer


class ChannelKMeans(Quantizer):
    """K-Means-C: codes count through ascending centroids of the output channel, or group; see quant/kmeans.py.

    Optional `boundaries`, one fewer than centroids, send a weight to another centroid than the nearest.
    """

    algorithm, tables, optional = "kmeans", ("centroids",), ("boundaries", "codes")

    @staticmethod
    def fit_block(block, bits):
        """Tables {b: {"centroids": [R, k]}} of the rows of a block, in its search's precision."""
        return {b: {"centroids": found} for b, found in kmeans.fit_per_channel(block.weight, bits, block.rows).items()}

    def stored(self, tables, dtype):
        """The fitted table as files hold it: centroids in `dtype`."""
        return {"centroids": tables["centroids"].to(dtype)}

    def fit_weighted(self, block, importance):
        """Tables {"centroids": [R, k]} of the rows of a block, by the importance of each weight."""
        return {"centroids": weighted.fit_per_channel(block, importance, self.bits)}

    def levels(self, shape):
        """Centroids of a codebook: 2^b, or as many as weights share it if these are fewer."""
        return min(2**self.bits, self._sharing(shape))

    def table_shape(self, shape):
        """Shape of the centroids of a weight [C, ...]."""
        return (*self.lead(shape), self.levels(shape))

    def _sharing(self, shape):
        """Weights that share a codebook, at most."""
        width = math.prod(shape[1:])
        return width if self.group is None else min(width, self.group)

    def _encode(self, block, centroids, boundaries=None):
        return kmeans.assign_by_boundaries(block, kmeans.boundaries_of(centroids) if boundaries is None else boundaries)

    def _decode(self, codes, centroids):
        return kmeans.dequantize(codes, centroids)

    def _apply(self, block, centroids, boundaries=None):
        return kmeans.apply(block, centroids, boundaries)

    def _row_error(self, rows, centroids):
        return sorted_errors.of_kmeans(rows, centroids)

    def _are_sound(self, shape, centroids, boundaries=None):
        lead, count = self.lead(shape), self.levels(shape)
        sound = _is_ascending(centroids, (*lead, count)) and bool(centroids.isfinite().all())
        # Above the last centroid that is used, boundaries are infinite.
        return sound and (boundaries is None or _is_ascending(boundaries, (*lead, count - 1)))


class WholeKMeans(ChannelKMeans):
    """K-Means-A: centroids of the whole weight."""

    algorithm, takes_groups, on_host = "kmeans_all", False, True

    @staticmethod
    def fit_block(block, bits):
        """Tables {b: {"centroids": [k]}} of a weight, in its search's precision."""
        return {b: {"centroids": found} for b, found in kmeans.fit_whole(block.weight, bits, block.rows).items()}

    def fit_weighted(self, block, importance):
        """Tables {"centroids": [k]} of a weight, by the importance of each number in it."""
        return {"centroids": weighted.fit_whole(block, importance, self.bits)}

    def lead(self, shape):
        """Shape of the codebooks: one for the whole weight."""
        return ()

    def rows_of(self, weight):
        """The weight as one row [1, n]."""
        return weight.reshape(1, -1)

    def _sharing(self, shape):
        return math.prod(shape)


def _is_ascending(table, shape):
    fits = table.dtype in TABLE_DTYPES and table.shape == shape
    return fits and bool((table[..., 1:] >= table[..., :-1]).all() and not table.isnan().any())
