"""What fitting is measured beside: the published procedure, and other programs' K-Means-C. For benchmarks/fit.py.

    pip install -e '.[benchmark]'

Each procedure takes the channels [C, n] of a weight and returns them quantized, {bits: [C, n]}.
"""

import kmeans1d
import numpy as np
import torch
from sdnq.quant_utils import quantize_weight_codebook
from sklearn.cluster import KMeans

from quant import kmeans, uaq
from quant.registry import BITS


def ours(rows):
    return {b: kmeans.apply(rows.float(), c) for b, c in kmeans.fit_per_channel(rows).items()}


def published(rows):
    """Each row [n] of `rows` by scikit-learn, its labels assigned element by element."""
    out = {}
    for bits in BITS:
        quantized = rows.float().numpy().copy()
        for row in quantized:
            fitted = KMeans(n_clusters=min(2**bits, len(row)), max_iter=100, random_state=0).fit(row[:, None])
            for i in range(len(row)):
                row[i] = fitted.cluster_centers_[fitted.labels_[i], 0]
        out[bits] = torch.from_numpy(quantized)
    return out


def published_uaq(rows):
    """Scale and zero point of each channel, one after another: {bits: (scales, zero points)}."""
    pairs = {bits: [uaq.fit(row[None], bits) for row in rows] for bits in BITS}
    return {bits: tuple(torch.cat(column) for column in zip(*pair, strict=True)) for bits, pair in pairs.items()}


def optimum(rows):
    out = {}
    for bits in BITS:
        quantized = []
        for row in rows.float().numpy():
            codes, centroids = kmeans1d.cluster(row, min(2**bits, len(row)))
            quantized.append(np.array(centroids)[codes])
        out[bits] = torch.from_numpy(np.array(quantized))
    return out


def lloyd(rows):
    """Lloyd's algorithm for all channels together, from evenly spaced quantiles."""
    out = {}
    values = rows.float().sort(dim=1).values
    for bits in BITS:
        k = min(2**bits, values.shape[1])
        places = ((torch.arange(k) + 0.5) / k * values.shape[1]).long()
        centroids = values[:, places].contiguous()
        for _ in range(100):
            codes = torch.searchsorted(kmeans.boundaries_of(centroids), values)
            sums = torch.zeros_like(centroids).scatter_add_(1, codes, values)
            counts = torch.zeros_like(centroids).scatter_add_(1, codes, torch.ones_like(values))
            centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
        out[bits] = kmeans.apply(rows.float(), centroids)
    return out


def sdnq(rows):
    out = {}
    for bits in BITS:
        codes, codebook = quantize_weight_codebook(rows, -1, f"uint{bits}")
        out[bits] = torch.gather(codebook, 1, codes.long())
    return out


PROCEDURES = {"this program": ours, "published": published, "kmeans1d": optimum, "Lloyd": lloyd, "SDNQ": sdnq}
