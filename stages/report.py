"""Read labelled configurations: which are best, what quality costs in bits, what tells quality cheaply."""

import argparse
import csv
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib

from errors import InputError
from evaluation import jsonl, quant_cache
from quant import config
from quant.storage import atomic_write
from stages.common import OneLineParser, at_least
from stages.eval_random import LABEL_FLAGS, read_settings

OWN_FLAGS = ("seed", "a_l", "a_u", "halving_key")  # in which labels that are merged may differ
FID = "FID-GT-1k"
COLUMNS = ("avg_bits", "quantized_size", "quantized_error", "bops")  # of a row, that tell it without images
INK, GRAY, ACCENT = "#222222", "#8a8f98", "#c2410c"


class Run(NamedTuple):
    """A labelling run's folder, read."""

    folder: Path
    settings: dict
    rows: list[dict]
    proxies: dict[int, dict]  # by number of the row, from 1
    full_precision: dict


def main():
    args = parse_args()
    runs = [read_run(folder) for folder in args.folders]
    check_mergeable(runs)
    outdir = args.outdir or (runs[0].folder if len(runs) == 1 else Path("merged_labels"))
    table = list(rows_of(runs))
    print("\n".join(text_table(table[: args.top], runs)))
    print("\n".join(correlations(table)))
    write_csv(table, outdir / "report.csv")
    draw(table, runs, outdir / "report.png")
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


def read_run(folder):
    """The labels in a folder; InputError if there are none."""
    cache = folder / "quant_cache.pkl"
    rows = quant_cache.load(cache)
    if not rows:
        raise InputError(f"{cache}: no labelled configurations; make them with *_eval_random.py --outdir {folder}")
    proxies = {line["row"]: line for line in jsonl.load(folder / "quant_proxies.jsonl") if "row" in line}
    try:
        full_precision = json.loads((folder / "full_precision.json").read_text())
    except (OSError, ValueError):
        raise InputError(f"{folder / 'full_precision.json'}: cannot be read; run the labelling again, it goes on") from None
    return Run(folder, read_settings(folder / "sampling_config.yaml"), rows, proxies, full_precision)


def check_mergeable(runs):
    """InputError unless all runs label the same denoiser in the same way, each from a seed of its own."""
    first = runs[0]
    for place, run in enumerate(runs[1:], start=1):
        if set(run.rows[0]["config"]) != set(first.rows[0]["config"]):
            raise InputError(f"{run.folder}: labels another denoiser than {first.folder}; reports are of one family")
        for flag in LABEL_FLAGS:
            if flag not in OWN_FLAGS and run.settings.get(flag) != first.settings.get(flag):
                raise InputError(
                    f"{run.folder}: labelled with {flag} {run.settings.get(flag)}, {first.folder} with "
                    f"{first.settings.get(flag)}; labels made in different ways do not compare"
                )
        for other in runs[:place]:
            if run.settings.seed == other.settings.seed:
                raise InputError(f"{run.folder}: has the seed {run.settings.seed}, and so the noise, of {other.folder}")


def rows_of(runs):
    """A flat dict per row, best first; those whose FID is not a number last."""
    flat = [
        {"folder": str(run.folder), "row": number}
        | {key: row[key] for key in (FID, quant_cache.CLIP_SCORE, *COLUMNS) if key in row}
        | {key: value for key, value in run.proxies.get(number, {}).items() if key not in ("row", "configuration", "images")}
        for run in runs
        for number, row in enumerate(run.rows, start=1)
    ]
    return sorted(flat, key=config.by_fid)


def text_table(table, runs):
    """Lines: the rows, and full precision's."""
    proxies = [name for name in ("image_mse", "latent_mse", "ssim", "psnr") if name in table[0]]
    heads = "".join(f"{name:>12}" for name in proxies)
    named = [(f"full precision, {run.folder}", run.full_precision) for run in runs]
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


def draw(table, runs, path):
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
    whole = sum(run.full_precision[FID] for run in runs) / len(runs)
    axes.axhline(whole, color=INK, linewidth=1, linestyle="--", label=f"full precision, {whole:.2f}")
    axes.set_xlabel("average bits per weight", color=INK)
    axes.set_ylabel("FID", color=INK)
    axes.set_title(
        f"{len(measured)} configurations, {runs[0].settings.n_imgs} images each", color=INK, loc="left", fontsize=11
    )
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
    jsonl.save(proxies, outdir / "quant_proxies.jsonl")
    return [outdir / "quant_cache.pkl", outdir / "quant_proxies.jsonl"]
