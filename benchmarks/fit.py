"""Fitting quantizers beside the published procedure and others, on the same weights in one run.

    pip install -e '.[benchmark]'
    python -m benchmarks.fit [--device cuda] [--machine h100] [pixart_alpha ...]

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

import torch

from benchmarks.footprint import measure_all, timed
from benchmarks.machine import write_result
from benchmarks.weights import embedded_weights, heavy_tailed
from models.families import FAMILIES
from models.pipelines import pick_device
from quant import kmeans, registry, uaq
from quant.registry import BITS
from quant.rows import sorted_rows

CPU = torch.device("cpu")


def squared_errors(rows, quantized):
    """[C] at both bit widths, one after the other."""
    return torch.cat([((rows.double() - quantized[b].double()) ** 2).sum(1) for b in BITS])


def compare_per_channel(name, rows, procedures):
    """Lines of the table: every procedure's speed, and its error over the optimum, which is kmeans1d's."""
    best = squared_errors(rows, procedures["kmeans1d"](rows))
    lines = []
    for procedure, run in procedures.items():
        found, seconds = timed_result(run, rows)
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


def timed_result(run, rows):
    """What `run(rows)` returns, and its seconds: of its first run if that is long, else the mean of ten more."""
    run(rows[:2, :64])  # compile, import
    found = {}
    seconds = timed(CPU, lambda: found.update(run(rows)))
    if seconds < 0.5:
        seconds = timed(CPU, lambda: [run(rows) for _ in range(10)]) / 10
    return found, seconds


def published_rates(rows, weight, peers):
    """Weights per second of the published K-Means-C, K-Means-A and UAQ, both bit widths each, and how ours agree."""
    whole = weight.reshape(1, -1)
    _, per_channel_seconds = timed_result(peers.published, rows)
    found, whole_seconds = timed_result(peers.published, whole)
    theirs, uaq_seconds = timed_result(peers.published_uaq, rows)
    best = {b: kmeans.apply(weight.float(), c).reshape(1, -1) for b, c in kmeans.fit_whole(weight).items()}
    ratio = squared_errors(whole, found) / squared_errors(whole, best)
    mine = uaq.fit_rows(sorted_rows(rows), BITS)
    same = [torch.equal(mine[b][part], theirs[b][part]) for b in BITS for part in (0, 1)]
    rates = {
        "kmeans": round(rows.numel() / per_channel_seconds),
        "kmeans_all": round(whole.numel() / whole_seconds),
        "mse": round(rows.numel() / uaq_seconds),
    }
    return rates, {"kmeans_all_error_over_ours": [round(float(r), 6) for r in ratio], "uaq_identical": all(same)}


def scaling(device):
    """Seconds of all six fits at sizes 64 times apart."""
    lines = []
    for channels in (72, 288, 1152, 4608):
        weight = heavy_tailed(channels, 1152).to(device)
        registry.fit_with_errors(weight)
        seconds = min(timed(device, lambda weight=weight: registry.fit_with_errors(weight)) for _ in range(3))
        lines.append({"weights": weight.numel(), "seconds": round(seconds, 4)})
        print(f"{weight.numel():>12,} weights{seconds:>9.3f} s{weight.numel() / seconds / 1e6:>9.1f} M/s", flush=True)
    return lines


def compare(channels):
    """Parts 1 and 2."""
    from benchmarks import peers  # here: a GPU's machine need not have the others

    print(f"{'K-Means-C':<34}{'procedure':<14}{'speed':>14}{'error':>10}{'worst':>10}")
    trained = max(embedded_weights("pixart_alpha").values(), key=torch.numel)
    rows = heavy_tailed(channels, 1152)
    lines = [
        *compare_per_channel("embedded, trained", trained.reshape(len(trained), -1), peers.PROCEDURES),
        *compare_per_channel("random", rows, peers.PROCEDURES),
        *compare_per_channel("random", heavy_tailed(channels // 4, 4608), peers.PROCEDURES),
    ]
    rates, agreement = published_rates(rows, heavy_tailed(1152, 1152), peers)
    print("published: " + ", ".join(f"{name} {rate / 1e6:.3f} M/s" for name, rate in rates.items()))
    print(f"K-Means-A's published error over ours {agreement['kmeans_all_error_over_ours']}; ", end="")
    print(f"UAQ picks the same: {agreement['uaq_identical']}")
    return {"per_channel": lines, "published_weights_per_second": rates, "agreement": agreement}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help="geometries of part 3; default: all six")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--machine", default="cpu", help="name of the machine in the result's file name")
    parser.add_argument("--channels", type=int, default=256, help="channels that the procedures are compared on")
    args = parser.parse_args()
    result = compare(args.channels) if args.device == "cpu" else {}
    result["geometries"] = measure_all(args.families, args.device)
    if args.device == "cpu" and args.families[0] == "pixart_alpha":
        pixart = result["geometries"][0]
        theirs = sum(pixart["weights"] / rate for rate in result["published_weights_per_second"].values())
        result["published_pixart_alpha_seconds"] = round(theirs)
        result["speedup_vs_published"] = round(theirs / pixart["fit_seconds"], 1)
        print(f"published procedure on pixart_alpha: {theirs:.0f} s; speedup {result['speedup_vs_published']}")
    result["scaling"] = scaling(pick_device(args.device))
    write_result(f"fit_{args.machine}", result)


if __name__ == "__main__":
    main()
