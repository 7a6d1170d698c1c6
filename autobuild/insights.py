"""Pictures and tables of what scores say: which blocks, subgraphs and operations suffer from quantization, and how.

The paper's plots (Mills et al., 2025, section 5): box plots of the scores of all methods, by block, by kind of subgraph
and by operation; how often each method was chosen, by operation; and a ranking of the weights.
"""

import csv
import io
import re

import matplotlib
import numpy as np

from autobuild.space import NAMES
from quant.files import atomic_write
from quant.registry import quantizer

INK, GRID, BOX = "#222222", "#e5e7eb", "#9db4cf"
TITLES = {"mse": "UAQ", "kmeans": "K-Means-C", "kmeans_all": "K-Means-A"}
COLOURS = {  # four bits light, three bits dark
    "kmeans-4": "#7fcdbb",
    "kmeans_all-4": "#c7e9b4",
    "mse-4": "#fdae6b",
    "kmeans-3": "#1d7f86",
    "kmeans_all-3": "#5a8f29",
    "mse-3": "#b3441e",
}
SUBGRAPHS = {"attn": "attention", "attn1": "self-attention", "attn2": "cross-attention", "ff": "feed-forward"}
OUTSIDE = "outside"
LONG = 25  # characters of a name beside an axis


def title_of(method):
    return f"{TITLES[quantizer(method).algorithm]}, {quantizer(method).bits} bits"


def block_of(node):
    """A transformer's block by its number; a U-Net's by its stage and place, without the blocks within it."""
    pieces = re.findall(r"[a-z_]+\.\d+|mid_block", node.block)
    return ".".join(pieces[: 1 if len(pieces) == 1 else 2]) or OUTSIDE


def subgraph_of(unit):
    """What kind of subgraph a unit is: self-attention, feed-forward, or its only layer's name."""
    if not unit.root.block:
        return unit.root.path.split(".")[0]
    name = unit.root.path.removeprefix(unit.root.block).lstrip(".").split(".")[0]
    return SUBGRAPHS.get(name, name)


def draw_all(space, weight_scores, decisions, codes, title, outdir):
    """All pictures and tables; `decisions` are the units', in order, `codes` [W] of the configuration. Returns the paths."""
    weights = space.graph.weights
    by_block, by_operation, by_subgraph = {}, {}, {}
    for node, scores in zip(weights, weight_scores, strict=True):
        known = scores[np.isfinite(scores)]
        by_block.setdefault(block_of(node), []).extend(known)
        by_operation.setdefault(node.layer_type, []).extend(known)
    for unit, decision in zip(space.units, decisions, strict=True):
        by_subgraph.setdefault(subgraph_of(unit), []).extend(decision.scores)
    chosen = {}
    for node, code in zip(weights, codes, strict=True):
        chosen.setdefault(node.layer_type, []).append(NAMES[code])
    for name, groups, what in (
        ("scores_by_block", by_block, "block"),
        ("scores_by_subgraph", by_subgraph, "kind of subgraph"),
        ("scores_by_operation", by_operation, "operation"),
    ):
        draw_boxes(groups, f"{title}: scores of all methods, by {what}", what, outdir / f"{name}.png")
        write_boxes(groups, what, outdir / f"{name}.csv")
        yield from (outdir / f"{name}.png", outdir / f"{name}.csv")
    draw_bars(chosen, f"{title}: chosen methods, by operation", outdir / "methods_by_operation.png")
    write_bars(chosen, outdir / "methods_by_operation.csv")
    yield from (outdir / "methods_by_operation.png", outdir / "methods_by_operation.csv")
    write_ranking(space, weight_scores, codes, outdir / "ranking.csv")
    yield outdir / "ranking.csv"


def _axes(count, title, label):
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.5 + 0.28 * count), 4.2), dpi=150)
    axes.set_title(title, color=INK, loc="left", fontsize=11)
    axes.set_ylabel(label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure, path):
    from matplotlib import pyplot

    with atomic_write(path) as file:
        figure.savefig(file, format="png", bbox_inches="tight")
    pyplot.close(figure)


def draw_boxes(groups, title, what, path):
    """A box for each of {name: values}."""
    figure, axes = _axes(len(groups), title, "score (higher: better)")
    axes.boxplot(
        list(groups.values()),
        patch_artist=True,
        widths=0.6,
        flierprops={"marker": ".", "markersize": 3, "markeredgecolor": INK, "alpha": 0.4},
        boxprops={"facecolor": BOX, "edgecolor": INK, "linewidth": 0.8},
        medianprops={"color": INK},
    )
    # A few weights suffer a hundred times more than the rest.
    values = np.abs(np.concatenate([np.asarray(each) for each in groups.values()]))
    axes.set_yscale("symlog", linthresh=max(float(np.median(values)), 1e-12))
    axes.set_xticks(range(1, len(groups) + 1), _short(groups), rotation=60, ha="right", fontsize=8)
    axes.set_xlabel(what, color=INK)
    _save(figure, path)


def _short(names):
    """Names without what all blocks' have in common, and the last two pieces of long ones."""
    short = [re.sub(r"^(transformer_blocks|blocks)\.", "", name) for name in names]
    return [".".join(name.split(".")[-2:]) if len(name) > LONG else name for name in short]


def draw_bars(chosen, title, path):
    """Shares of the methods in {operation: [method, ...]}, stacked, a bar for each operation."""
    figure, axes = _axes(len(chosen), title, "share of the weights")
    bottom = np.zeros(len(chosen))
    for method, colour in COLOURS.items():
        shares = np.array([methods.count(method) / len(methods) for methods in chosen.values()])
        axes.bar(range(len(chosen)), shares, 0.75, bottom, color=colour, label=title_of(method))
        bottom += shares
    axes.set_xticks(range(len(chosen)), _short(chosen), rotation=60, ha="right", fontsize=8)
    axes.legend(frameon=False, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    _save(figure, path)


def write_boxes(groups, what, path):
    heads = [what, "scores", "mean", "lowest", "quarter", "median", "three quarters", "highest"]
    rows = [
        [name, len(values), np.mean(values), *np.percentile(values, [0, 25, 50, 75, 100])] for name, values in groups.items()
    ]
    write_csv(heads, rows, path)


def write_bars(chosen, path):
    rows = [[name, len(methods), *(methods.count(each) for each in COLOURS)] for name, methods in chosen.items()]
    write_csv(["operation", "weights", *COLOURS], rows, path)


def write_ranking(space, scores, codes, path):
    """The weights, most sensitive first: by how far apart their best and worst method score."""
    ranked = ranking(scores)
    rows = []
    for rank, place in enumerate(ranked, start=1):
        node = space.graph.weights[place]
        spread = np.nanmax(scores[place]) - np.nanmin(scores[place])
        row = [rank, space.keys[place][0], node.layer_type, node.block, int(space.fp_bytes[place])]
        rows.append([*row, spread, *scores[place], NAMES[codes[place]]])
    heads = ["rank", "weight", "operation", "block", "bytes in full precision", "spread", *NAMES, "chosen"]
    write_csv(heads, rows, path)


def ranking(scores):
    """Numbers of the weights, most sensitive first, of scores [W, M]."""
    return np.argsort(-(np.nanmax(scores, axis=1) - np.nanmin(scores, axis=1)), kind="stable")


def write_csv(heads, rows, path):
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(heads)
    writer.writerows([[f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows])
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
