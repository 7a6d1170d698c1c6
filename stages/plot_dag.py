"""Draw the graph of a family's denoiser."""

from pathlib import Path

from autobuild import graph
from errors import InputError
from models.families import FAMILIES
from quant.file_keys import by_file_key
from stages import q_config
from stages.common import OneLineParser, check_extra


def main():
    args = parse_args()
    check_extra("igraph", "autobuild", "plot_dag.py needs igraph")
    from autobuild import draw

    output = args.output or Path("dag_plots") / f"{args.family}{f'_{args.block}' if args.block else ''}.png"
    if output.suffix not in (".png", ".svg"):
        raise InputError(f"--output {output}: must end in .png or .svg")
    configuration = configuration_of(args)
    drawn = graph.of_family(args.family)
    if args.block is not None and args.block not in drawn.blocks:
        raise InputError(f"--block {args.block}: {args.family} has {', '.join(drawn.blocks[:3])} ... {drawn.blocks[-1]}")
    draw.draw(drawn, output, configuration, args.block)
    counts = ", ".join(f"{count} {kind}" for kind, count in drawn.counts().most_common())
    print(f"{output}: {len(drawn.nodes)} nodes ({counts}), {len(drawn.edges)} edges")


def parse_args():
    parser = OneLineParser(prog="plot_dag.py", description="draw a denoiser's graph, layer by layer", allow_abbrev=False)
    parser.add_argument("--family", required=True, choices=list(FAMILIES))
    parser.add_argument("--q_config", help="colour weights by a configuration: as the infer scripts take it")
    parser.add_argument("--block", help="draw one block alone, such as transformer_blocks.0")
    parser.add_argument("--output", type=Path, help=".png or .svg; default dag_plots/<family>.png")
    return parser.parse_args()


def configuration_of(args):
    """{file key: method} of what --q_config names, as the graph's nodes are named; None without it."""
    if args.q_config is None:
        return None
    slots = graph.slots_of_family(args.family)[1]
    return by_file_key(q_config.load(args.q_config, slots), slots)
