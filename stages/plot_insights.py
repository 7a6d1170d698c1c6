"""Draw what scores say of blocks, subgraphs, operations and weights."""

from pathlib import Path

from quant.file_keys import by_file_key
from quant.files import check_writable
from stages import q_config
from stages.common import check_extra, finite
from stages.score_sources import complete, load_scores, parser_of


def main():
    family, args = parse_args()
    check_extra("torch_geometric", "autobuild", "plot_insights.py needs PyTorch Geometric")
    from autobuild import insights
    from autobuild.graph import slots_of_family

    check_writable(args.outdir / "ranking.csv")
    best = args.q_config is None
    slots = slots_of_family(family.name)[1]
    chosen = None if best else by_file_key(q_config.load(args.q_config, slots), slots)
    scores = load_scores(args, family, args.avg_bits if best else None)
    space = scores.space
    codes = scores.best_within(args.avg_bits) if best else space.codes_of(chosen)
    for path in insights.draw_all(
        space, scores.of_weights(), scores.published_decisions(), codes, family.title, args.outdir
    ):
        print(path)


def parse_args():
    family, parser = parser_of("plot_insights", "draw which blocks, subgraphs and operations suffer from quantization")
    parser.add_argument("--q_config", help="configuration whose methods are drawn, as the infer scripts take it")
    parser.add_argument("--avg_bits", type=finite, default=4.0, help="without --q_config: draw the best one within this")
    parser.add_argument("--outdir", type=Path, help="where to write; default insights/<family>")

    def completed(args):
        return complete(args, family) | {"outdir": args.outdir or Path("insights") / family.name}

    return family, parser.parse_args(complete=completed)
