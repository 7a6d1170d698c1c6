"""Exact K-Means-C beside the published procedure, on the same channels in one run.

    python -m benchmarks.fit

The published procedure is scikit-learn's KMeans(max_iter=100), one channel and one bit width at a
time, and the assignment of its labels element by element. Weights: the embedded DiT's trained ones,
and random ones at DiT-XL/2's widths, Student-t with 5 degrees of freedom (heavy tails) times a
log-normal scale per channel, in half precision. Run it where nothing else runs.
"""

import argparse
import time

import numpy as np
import torch
from sklearn.cluster import KMeans

from benchmarks.machine import write_result
from models.families import FAMILIES
from models.layers import find_slots
from models.pipelines import load_denoiser
from quant import kmeans
from quant.methods import BITS
from quant.multiquantizer import slot_weight


def heavy_tailed(channels, width, seed=0):
    """Half-precision weights [channels, width] with the tails and channel spread of trained ones."""
    rng = np.random.default_rng(seed)
    scale = 0.03 * rng.lognormal(0, 0.4, size=(channels, 1))
    return torch.from_numpy(rng.standard_t(5, size=(channels, width)) * scale).half()


def published(rows):
    """Quantized rows {bits: [R, n]} by the published procedure."""
    out = {}
    for bits in BITS:
        quantized = rows.float().numpy().copy()
        for row in quantized:
            fitted = KMeans(n_clusters=min(2**bits, len(row)), max_iter=100, random_state=0).fit(row[:, None])
            for i in range(len(row)):
                row[i] = fitted.cluster_centers_[fitted.labels_[i], 0]
        out[bits] = torch.from_numpy(quantized)
    return out


def ours(rows):
    return {bits: kmeans.dequantize(kmeans.assign(rows, c), c) for bits, c in kmeans.fit_per_channel(rows).items()}


def timed(procedure, rows, repeats=1):
    """What the procedure returns, and its mean seconds."""
    start = time.perf_counter()
    for _ in range(repeats):
        quantized = procedure(rows)
    return quantized, (time.perf_counter() - start) / repeats


def compare(name, rows):
    """One line of the table: speed of both, and the published squared error over the optimum."""
    theirs, their_seconds = timed(published, rows)
    best, own_seconds = timed(ours, rows, repeats=10)
    ratios = []
    for bits in BITS:
        errors = [((rows.double() - q[bits].double()) ** 2).sum(1) for q in (theirs, best)]
        ratios.append((errors[0] / errors[1].clamp(min=1e-12)).numpy())
    ratio = np.concatenate(ratios)
    line = {
        "weights": name,
        "channels": len(rows),
        "channel_width": rows.shape[1],
        "weights_per_second": round(rows.numel() / own_seconds),
        "published_weights_per_second": round(rows.numel() / their_seconds),
        "speedup_vs_published": round(their_seconds / own_seconds, 1),
        "published_error_over_optimum": {"mean": round(float(ratio.mean()), 4), "least": round(float(ratio.min()), 4)},
    }
    print(
        f"{name:<28}{len(rows):>5} x {rows.shape[1]:<6}{line['weights_per_second'] / 1e6:>9.2f} M/s"
        f"{line['published_weights_per_second'] / 1e6:>9.3f} M/s{line['speedup_vs_published']:>9.1f}x"
        f"{ratio.mean():>9.4f}{ratio.min():>9.4f}"
    )
    return line


def embedded_rows(layer):
    family = FAMILIES["dit"]
    denoiser = load_denoiser(family, "embedded", torch.device("cpu"))
    slot = next(slot for slot in find_slots(denoiser, family).values() if slot.module_path == layer)
    return slot_weight(denoiser, slot, family).reshape(slot.shape[0], -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--channels", type=int, default=256, help="channels compared per line")
    parser.add_argument("--machine", default="cpu", help="name of the machine in the result's file name")
    args = parser.parse_args()
    ours(heavy_tailed(4, 64))  # compile
    print(f"{'weights':<28}{'channels':>14}{'exact':>11}{'published':>13}{'speedup':>10}{'error':>9}{'least':>9}")
    lines = [
        compare("embedded, trained, ff.net.2", embedded_rows("transformer_blocks.14.ff.net.2")),
        compare("random, heavy-tailed", heavy_tailed(args.channels, 1152)),
        compare("random, heavy-tailed", heavy_tailed(args.channels // 4, 4608)),
    ]
    speedup = min(line["speedup_vs_published"] for line in lines[1:])
    write_result(f"fit_{args.machine}", {"speedup_vs_published": speedup, "lines": lines})


if __name__ == "__main__":
    main()
