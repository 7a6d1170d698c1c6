"""Fitting quantizers beside the published procedure and others, on the same weights in one run.

    pip install -e '.[benchmark]'
    python -m benchmarks.fit [--device cuda] [--machine h100]

1. K-Means-C at 4 and 3 bits by: this program; the published procedure, scikit-learn's KMeans(max_iter=100) a
   channel at a time and the assignment of its labels element by element; kmeans1d, exact and an independent
   program, which gives the optimum; Lloyd's algorithm for all channels together in torch (100 iterations from
   evenly spaced quantiles); SDNQ's codebooks (its 24 steps). The error is the squared one over the optimum: the
   mean and the worst over channels and bit widths.
2. K-Means-A and UAQ beside the published procedure; of UAQ, how many channels have the same scale and zero point.
3. The six real geometries (benchmarks/footprint.py), and the published procedure's time for PixArt-alpha at the
   speeds of the samples in 1 and 2.
4. Speed at sizes 64 times apart.

Weights: benchmarks/weights.py. On a GPU only this program is measured. Run it where nothing else runs.
"""

import argparse

import kmeans1d
import numpy as np
import torch
from sdnq.quant_utils import quantize_weight_codebook
from sklearn.cluster import KMeans

from benchmarks.footprint import measure_all, timed
from benchmarks.machine import write_result
from benchmarks.weights import embedded_weights, heavy_tailed
from models.families import FAMILIES
from models.pipelines import pick_device
from quant import kmeans, methods, uaq
from quant.methods import BITS
from quant.rows import sorted_rows

CPU = torch.device("cpu")


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


def squared_errors(rows, quantized):
    """[C] at both bit widths, one after the other."""
    return torch.cat([((rows.double() - quantized[b].double()) ** 2).sum(1) for b in BITS])


def compare_per_channel(name, rows):
    """Lines of the table: every procedure's speed, and its error over the optimum."""
    best = squared_errors(rows, optimum(rows))
    lines = []
    for procedure, run in PROCEDURES.items():
        found = {}
        run(rows[:2])  # compile, import
        repeats = 10 if run is ours else 1
        seconds = timed(CPU, lambda run=run, n=repeats: [found.update(run(rows)) for _ in range(n)]) / repeats
        ratios = (squared_errors(rows, found) / best.clamp(min=1e-12)).numpy()
        lines.append(
            {
                "weights": name,
                "channels": len(rows),
                "channel_width": rows.shape[1],
                "procedure": procedure,
                "weights_per_second": round(rows.numel() / seconds),
                "error_over_optimum": {"mean": round(float(ratios.mean()), 6), "worst": round(float(ratios.max()), 6)},
            }
        )
        print(
            f"{name:<20}{len(rows):>5} x {rows.shape[1]:<6}{procedure:<14}{rows.numel() / seconds / 1e6:>10.3f} M/s"
            f"{ratios.mean():>10.5f}{ratios.max():>10.5f}",
            flush=True,
        )
    return lines


def published_rates(rows, weight):
    """Weights per second of the published K-Means-C, K-Means-A and UAQ, both bit widths each; UAQ's agreement."""
    rates = {"kmeans": rows.numel() / timed(CPU, lambda: published(rows))}
    whole = weight.reshape(1, -1)
    found = {}
    rates["kmeans_all"] = whole.numel() / timed(CPU, lambda: found.update(published(whole)))
    best = {b: kmeans.apply(weight.float(), c).reshape(1, -1) for b, c in kmeans.fit_whole(weight).items()}
    ratio = squared_errors(whole, found) / squared_errors(whole, best)
    theirs = {}
    rates["mse"] = rows.numel() / timed(CPU, lambda: theirs.update(published_uaq(rows)))
    mine = uaq.fit_rows(sorted_rows(rows), BITS)
    same = [bool(torch.equal(mine[b][part], theirs[b][part])) for b in BITS for part in (0, 1)]
    agreement = {"kmeans_all_error_over_ours": [round(float(r), 6) for r in ratio], "uaq_identical": all(same)}
    return {name: round(rate) for name, rate in rates.items()}, agreement


def scaling(device):
    """Seconds of all six fits at sizes 64 times apart."""
    lines = []
    for channels in (72, 288, 1152, 4608):
        weight = heavy_tailed(channels, 1152).to(device)
        methods.fit_with_errors(weight)
        seconds = min(timed(device, lambda weight=weight: methods.fit_with_errors(weight)) for _ in range(3))
        lines.append({"weights": weight.numel(), "seconds": round(seconds, 4)})
        print(f"{weight.numel():>12,} weights{seconds:>9.3f} s{weight.numel() / seconds / 1e6:>9.1f} M/s", flush=True)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--machine", default="cpu", help="name of the machine in the result's file name")
    parser.add_argument("--channels", type=int, default=256, help="channels that the procedures are compared on")
    args = parser.parse_args()
    result = {}
    if args.device == "cpu":
        print(f"{'K-Means-C':<34}{'procedure':<14}{'speed':>14}{'error':>10}{'worst':>10}")
        trained = max(embedded_weights("pixart_alpha").values(), key=torch.numel)
        rows = heavy_tailed(args.channels, 1152)
        result["per_channel"] = [
            *compare_per_channel("embedded, trained", trained.reshape(len(trained), -1)),
            *compare_per_channel("random", rows),
            *compare_per_channel("random", heavy_tailed(args.channels // 4, 4608)),
        ]
        rates, agreement = published_rates(rows, heavy_tailed(1152, 1152))
        result["published_weights_per_second"], result["agreement"] = rates, agreement
        print("published: " + ", ".join(f"{name} {rate / 1e6:.3f} M/s" for name, rate in rates.items()))
        print(f"K-Means-A's published error over ours {agreement['kmeans_all_error_over_ours']}; ", end="")
        print(f"UAQ picks the same: {agreement['uaq_identical']}")
    result["geometries"] = measure_all(list(FAMILIES), args.device)
    if args.device == "cpu":
        pixart = result["geometries"][0]
        theirs = sum(pixart["weights"] / rate for rate in rates.values())
        result["published_pixart_alpha_seconds"] = round(theirs)
        result["speedup_vs_published"] = round(theirs / pixart["fit_seconds"], 1)
        print(f"published procedure on pixart_alpha: {theirs:.0f} s; speedup {result['speedup_vs_published']}")
    result["scaling"] = scaling(pick_device(args.device))
    write_result(f"fit_{args.machine}", result)


if __name__ == "__main__":
    main()
