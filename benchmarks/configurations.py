"""Built configurations against others of their size: `python -m benchmarks.configurations pixart_alpha`.

At each average size: what a predictor's scores build, what asking the denoiser without labels builds, the same knapsack
with weight errors for scores, and the best of random configurations drawn at that size; the six uniform ones; and what
is built at the sizes of some of them (--size_of). All are measured afresh on an embedded model by *_eval_random.py: FID
at the guidance that labels are made at, and the mean squared difference to full precision's images from the same noise,
each with several seeds. Needs the multiquantizer, and predictors made by train_predictor.py. Everything is kept in
--outdir, so an interrupted run goes on. Writes benchmarks/results/configurations_<family>.json.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from autobuild import search
from autobuild import space as spaces
from benchmarks.machine import write_result
from evaluation import quant_cache
from models.families import FAMILIES
from models.pipelines import load_denoiser, pick_device
from quant import config
from quant.file_keys import by_file_key
from quant.files import save_pickle
from stages import multi_chkpt
from stages.flags import Flags
from stages.labelling import json_lines

SCRIPTS = Path(__file__).parents[1] / "scripts"
POOL_SEED = 9000


def main():
    args = parse_args()
    family = FAMILIES[args.family]
    model = multi_chkpt.load(args.multi_chkpt, family, load_denoiser(family, "embedded", pick_device("cpu")))
    slots, space = model.slots, spaces.of_multiquantizer(family, by_file_key(model.entries, model.slots))
    chosen = {(None, f"uniform {name}"): f"uniform:{name}" for name in spaces.NAMES}
    for bits in args.avg_bits:
        chosen |= at_size(args, space, slots, bits)
    for name in args.size_of:
        chosen |= built(args, float(space.avg_bits(np.full(len(space.keys), spaces.NUMBER[name]))))
    measured = [measure(args, f"seed_{seed}", seed, chosen.values()) for seed in args.seeds]
    lines = [summary(bits, name, rows) for (bits, name), *rows in zip(chosen, *measured, strict=True)]
    print("\n".join(table(lines, args)))
    write_result(f"configurations_{family.name}", {"seeds": args.seeds, "n_imgs": args.n_imgs, "configurations": lines})


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--avg_bits", type=float, nargs="+", default=[3.4, 3.7, 4.0])
    parser.add_argument(
        "--size_of",
        nargs="*",
        choices=spaces.NAMES,
        default=["mse-3", "kmeans-4"],
        help="uniform ones, to build at their size",
    )
    parser.add_argument(
        "--predictors", type=Path, nargs="*", default=[], help="built configurations are named by these files"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 2000, 3000], help="of noise: image i has seed + i")
    parser.add_argument("--n_imgs", type=int, default=250)
    parser.add_argument("--num_random", type=int, default=10, help="random configurations drawn at each size")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--multi_chkpt", type=Path)
    parser.add_argument("--outdir", type=Path)
    args = Flags(vars(parser.parse_args()))
    return args | {
        "multi_chkpt": args.multi_chkpt or Path("multiquantizers") / f"{args.family}_embedded_mq.pt",
        "outdir": args.outdir or Path("demo") / f"{args.family}_configurations",
    }


def built(args, bits):
    """{(bits, name): file} of the configurations that are built at a size."""
    folder = args.outdir / f"{bits:.4g}_bits"
    sources = {f"predictor {path.stem}": path for path in args.predictors} | {"without labels": "none"}
    return {(bits, name): build(args, folder / f"{Path(scores).stem}.pkl", scores, bits) for name, scores in sources.items()}


def at_size(args, space, slots, bits):
    """{(bits, name): file} of all configurations that are compared at a size."""
    folder = args.outdir / f"{bits:.4g}_bits"
    by_error = search.best_within(space, search.decisions_of_weights(space, -space.errors), bits)
    save_pickle(space.configuration(by_error), folder / "weight_error.pkl")
    best = best_random(args, space, slots, bits, folder)
    others = {(bits, "weight error"): folder / "weight_error.pkl", (bits, f"best of {args.num_random} random"): best}
    return built(args, bits) | others


def build(args, path, scores, bits, methods=spaces.NAMES):
    command = ["build_config.py", "--family", args.family, "--model_id", "embedded", "--multi_chkpt", args.multi_chkpt]
    if not path.exists():
        run([*command, "--scores", scores, "--avg_bits", bits, "--output", path, "--methods", *methods])
    return path


def best_random(args, space, slots, bits, folder):
    """The one with the lowest FID of random configurations brought down to a size."""
    paths = [folder / f"random_{number}.pkl" for number in range(args.num_random)]
    for number, path in enumerate(paths):
        save_pickle(space.configuration(random_within(space, slots, bits, number)), path)
    rows = measure(args, f"{bits:.4g}_bits/random", POOL_SEED, paths)
    return paths[min(range(len(rows)), key=lambda place: rows[place]["FID-GT-1k"])]


def random_within(space, slots, bits, number):
    """Codes [W] of a random configuration, random weights of which take random smaller methods until it is small enough."""
    rng = np.random.default_rng([POOL_SEED, number])
    codes = space.codes_of(by_file_key(config.draw_random(slots, POOL_SEED, number), slots))
    while space.avg_bits(codes) > bits:
        place = rng.integers(len(codes))
        smaller = np.flatnonzero(space.size_bytes[place] < space.size_bytes[place, codes[place]])
        if len(smaller):
            codes[place] = rng.choice(smaller)
    return codes


def measure(args, name, seed, specs):
    """Rows of the configurations, their proxies among them."""
    outdir = args.outdir / name
    command = [f"{args.family}_eval_random.py", "--model_id", "embedded", "--multi_chkpt", args.multi_chkpt]
    command += ["--outdir", outdir, "--seed", seed, "--n_imgs", args.n_imgs]
    run([*command, *(["--workers", args.workers] if args.workers > 1 else []), "--q_config", *specs])
    rows = quant_cache.load(outdir / "quant_cache.pkl")
    proxies = json_lines.load(outdir / "quant_proxies.jsonl")
    return [row | line for row, line in zip(rows, proxies, strict=True)]


def run(command):
    script, *flags = map(str, command)
    subprocess.run([sys.executable, str(SCRIPTS / script), *flags], check=True)


def summary(bits, name, rows):
    """Means and standard deviations over the seeds' rows."""
    line = {"within_bits": bits, "name": name, "avg_bits": rows[0]["avg_bits"]}
    for number in ("FID-GT-1k", "image_mse", "feature_mse"):
        values = [row[number] for row in rows]
        line |= {number: float(np.mean(values)), f"{number} std": float(np.std(values)), f"{number} by seed": values}
    return line


def table(lines, args):
    cells = {(line["within_bits"], line["name"]): cell(line) for line in lines}
    sizes = sorted({line["within_bits"] for line in lines} - {None})
    yield (
        f"{args.family}, {args.n_imgs} images, {len(args.seeds)} seeds: FID, its standard deviation over seeds, and mean "
        "squared difference of pixels"
    )
    yield f"{'within average bits':<22}" + "".join(f"{bits:^20.4g}" for bits in sizes)
    for name in dict.fromkeys(line["name"] for line in lines if line["within_bits"]):
        yield (f"{name:<22}" + "".join(f"{cells.get((bits, name), ''):^20}" for bits in sizes)).rstrip()
    for line in lines:
        if line["within_bits"] is None:
            yield f"{line['name']:<22}{cell(line):^20}{line['avg_bits']:.3f} bits"


def cell(line):
    return f"{line['FID-GT-1k']:.2f} ±{line['FID-GT-1k std']:.2f} {line['image_mse']:.4f}"


if __name__ == "__main__":
    main()
