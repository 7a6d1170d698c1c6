"""Build a configuration from scores: the best within a size, or each subgraph's best."""

from collections import Counter
from pathlib import Path

from autobuild.space import NAMES
from errors import InputError
from quant.files import check_writable, save_pickle
from stages.common import check_extra, finite
from stages.score_sources import budgets_of, complete, load_scores, parser_of
from stages.search_flags import add_search_flags


def main():
    family, args = parse_args()
    check_extra("torch_geometric", "autobuild", "build_config.py needs PyTorch Geometric")
    from autobuild import search

    check_writable(args.output)
    scores = load_scores(args, family, args.avg_bits)
    if args.choice == "top1":
        codes = search.top_one(scores.space, scores.published_decisions())
    else:
        codes = scores.best_within(args.avg_bits, budgets_of(args, family, scores.space))
    configuration = scores.space.configuration(codes)
    save_pickle(configuration, args.output)
    if scores.found is not None:
        print(f"the output's squared shift is at most {scores.found.excess:.1%} above what any choice within the limits has")
    counts = Counter(configuration.values())
    print(f"{args.output}: average {scores.space.avg_bits(codes):.3f} bits")
    print(", ".join(f"{counts[name]} {name}" for name in sorted(counts, key=counts.get, reverse=True)))


def parse_args():
    family, parser = parser_of("build_config", "build a configuration from what a predictor learned, or without labels")
    parser.add_argument("--avg_bits", type=finite, help="at most so many bits per weight, parameters included")
    parser.add_argument(
        "--choice",
        choices=["knapsack", "top1"],
        default="knapsack",
        help="the best total within --avg_bits, exactly; or the paper's, each subgraph's best whatever its size",
    )
    add_search_flags(parser, NAMES, "with --scores none")
    parser.add_argument("--max_bops", type=finite, help="at most so many tera bit operations a call, counted as in labels")
    parser.add_argument("--output", type=Path, help="file to write; default quant_configs/<family>_<10 x avg_bits>.pkl")
    return family, parser.parse_args(complete=lambda args: complete(args, family) | {"output": output_of(args)})


def output_of(args):
    """The file to write; InputError if it is not said of what size."""
    if (args.choice == "knapsack") != (args.avg_bits is not None):
        raise InputError("--avg_bits goes with --choice knapsack, and is needed there")
    if args.choice == "top1" and args.max_bops is not None:
        raise InputError("--max_bops: is a limit of --choice knapsack; top1 keeps none")
    size = "top1" if args.avg_bits is None else f"{10 * args.avg_bits:g}"
    return args.output or Path("quant_configs") / f"{args.family}_{size}.pkl"
