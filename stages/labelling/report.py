"""Read labelled configurations: which are best, what quality costs in bits, what tells quality cheaply."""

import argparse
import csv
import io
import math
from pathlib import Path

import matplotlib

from evaluation import quant_cache
from quant.files import atomic_write
from stages.common import OneLineParser, at_least
from stages.labelling import json_lines, label_runs

FID = "FID-GT-1k"
INK, GRAY, ACCENT = "#222222", "#8a8f98", "#c2410c"


def main():
    args = parse_args()
    runs = [label_runs.read(folder) for folder in args.folders]
    label_runs.check_mergeable(runs)
    full_precision = {run.folder: label_runs.read_full_precision(run.folder) for run in runs}
    outdir = args.outdir or (runs[0].folder if len(runs) == 1 else Path("merged_labels"))
    table = list(rows_of(runs))
    print("\n".join(text_table(table[: args.top], full_precision)))
    print("\n".join(correlations(table)))
    write_csv(table, outdir / "report.csv")
    draw(table, runs[0].settings, full_precision, outdir / "report.png")
    written = [outdir / "report.csv", outdir / "report.png"]
    if len(runs) > 1:
        written += merge(runs, outdir)
    print("written: " + ", ".join(map(str, written)))


def parse_args():
    parser = OneLineParser(
        prog="quant_cache_report.py",
        description="Read labelled configurations: the best, a picture of FID against average bits, rank correlations",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="DIR", help="--outdir of *_eval_random.py; several are merged"
    )
    parser.add_argument("--outdir", type=Path, help="where to write; a single DIR itself, else merged_labels")
    parser.add_argument("--top", type=at_least(1), default=10, help="configurations to print")
    return parser.parse_args()


def rows_of(runs):
    """A flat dict per row, best first; those whose FID is not a number last."""
    flat = [
        {"folder": str(run.folder), "row": number} | numbers
        for run in runs
        for number, numbers in enumerate(run.numbers(), start=1)
    ]
    return sorted(flat, key=quant_cache.by_fid)


def text_table(table, full_precision):
    """Lines: the rows, and full precision's."""
    proxies = [name for name in ("image_mse", "latent_mse", "ssim", "psnr") if name in table[0]]
    heads = "".join(f"{name:>12}" for name in proxies)
    named = [(f"full precision, {folder}", row) for folder, row in full_precision.items()]
    named += [(f"{row['folder']}/quant_cache.pkl:{row['row']}", row) for row in table]
    width = max(len(name) for name, _ in named) + 1
    yield f"{'labels':<{width}}{'avg_bits':>9}{'size (MB)':>11}{'BOPs (T)':>10}{'FID':>9}{heads}"
    for name, row in named:
        values = "".join(f"{row[proxy]:>12.5g}" if row.get(proxy) is not None else f"{'':>12}" for proxy in proxies)
        yield (
            f"{name:<{width}}{row['avg_bits']:>9.3f}{row['quantized_size'] / 1e6:>11.3f}"
            f"{row['bops']:>10.4g}{row[FID]:>9.3f}{values}".rstrip()
        )


def correlations(table):
    """Lines: Spearman's rank correlation with FID of all that is known of rows without it, strongest first."""
    from scipy.stats import spearmanr  # imported late: only here

    measured = [row for row in table if not math.isnan(row[FID])]
    if len(measured) < 3:
        yield f"\nrank correlations need three rows with FID; there are {len(measured)}"
        return
    columns = {name: [row.get(name) for row in measured] for name in table[0] if name not in ("folder", "row", FID)}
    fids = [row[FID] for row in measured]
    told = {name: values for name, values in columns.items() if None not in values and len(set(values)) > 1}
    found = [(name, float(spearmanr(values, fids)[0])) for name, values in told.items()]
    yield f"\nrank correlation with FID ({len(measured)} rows)"
    yield from (f"{name:<18}{value:>8.3f}" for name, value in sorted(found, key=lambda pair: -abs(pair[1])))


def pareto(table):
    """The rows that no other beats in both average bits and FID, fewest bits first."""
    front, best = [], math.inf
    for row in sorted(table, key=lambda row: (row["avg_bits"], row[FID])):
        if row[FID] < best:
            front.append(row)
            best = row[FID]
    return front


def draw(table, settings, full_precision, path):
    """FID against average bits, with the Pareto front and full precision's FID."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in table if not math.isnan(row[FID])]
    front = pareto(measured)
    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=150)
    axes.scatter([row["avg_bits"] for row in measured], [row[FID] for row in measured], s=14, color=GRAY, linewidths=0)
    places = [row["avg_bits"] for row in front], [row[FID] for row in front]
    axes.step(*places, where="post", color=ACCENT, linewidth=1.5)
    axes.scatter(*places, s=22, color=ACCENT, zorder=3, label="Pareto front")
    whole = sum(row[FID] for row in full_precision.values()) / len(full_precision)
    axes.axhline(whole, color=INK, linewidth=1, linestyle="--", label=f"full precision, {whole:.2f}")
    axes.set_xlabel("average bits per weight", color=INK)
    axes.set_ylabel("FID", color=INK)
    images = f", {settings.n_imgs} images each" if settings else ""
    axes.set_title(f"{len(measured)} configurations{images}", color=INK, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", bbox_inches="tight")
    pyplot.close(figure)


def write_csv(table, path):
    """All rows, a column for each number that any of them has."""
    names = list(dict.fromkeys(name for row in table for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(table)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def merge(runs, outdir):
    """Write all rows as one `quant_cache.pkl`, and their proxies; returns the paths."""
    rows = [row for run in runs for row in run.rows]
    proxies, before = [], 0
    for run in runs:
        proxies += [line | {"row": before + number} for number, line in sorted(run.proxies.items())]
        before += len(run.rows)
    quant_cache.save(rows, outdir / "quant_cache.pkl")
    json_lines.save(proxies, outdir / "quant_proxies.jsonl")
    return [outdir / "quant_cache.pkl", outdir / "quant_proxies.jsonl"]
