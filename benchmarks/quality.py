"""Image quality per bit, ours beside other programs': `python -m benchmarks.quality pixart_alpha`.

    pip install -e '.[peers]'

On an embedded model: images drawn from the same noise by full precision and by each arm (benchmarks/quality_arms.py). Told
are average bits by one rule, all bytes that stand for weights over all quantizable weights, and by the same rule as if
each weight had its shape in the real model (benchmarks/stored_size.py); FID to the real digits; and mean squared
differences to full precision of pixels and of the classifier's features, all with several seeds of noise. Measurements are
kept in --outdir and not made again, so an interrupted run goes on; delete it after changing what an arm does. Writes
benchmarks/results/quality_<family>.json.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import configurations
from benchmarks.embedded_quality import Judge, make_pictures, prompts_and_answers
from benchmarks.machine import installed_version, write_result
from benchmarks.quality_arms import ARMS, configuration_arm, of_calibrated
from benchmarks.quality_peers import LEFT_OUT
from benchmarks.stored_size import average_bits
from errors import InputError, first_line
from models.families import FAMILIES
from models.geometry import real_shapes
from models.pipelines import Extras, load_sampler, refiner_of
from quant.checked_files import from_json, with_digest
from quant.files import atomic_write, save_text
from quant.slots import find_slots
from stages.flags import Flags
from stages.search_flags import ANY_METHODS

DISTANCES = ("fid", "image_mse", "feature_mse")
SIZES = {"own": "avg_bits", "real": "real_avg_bits"}  # what lines are sorted by


class Measuring:
    """Draws images with arms and keeps what is measured in a folder, a line for each arm and seed."""

    def __init__(self, family, args):
        self.family, self.args = family, args
        self.file = args.outdir / "measured.jsonl"
        self.lines = load_lines(self.file)
        self._sampler = self._judge = self._float = None

    def measure(self, name, arm, seeds):
        """What was measured of an arm with each seed, now or before: its lines."""
        keys = [self._key(name, arm, seed) for seed in seeds]
        missing = [key for key in keys if self._known(key) is None]
        if missing:
            self._load()
            denoiser, built = self._build(arm)
        for key in missing:
            self.lines.append(key | built | self._distances(denoiser, key["seed"]))
            save_lines(self.lines, self.file)
        return [self._known(key) for key in keys]

    def _key(self, name, arm, seed):
        """All that a line depends on."""
        version = arm.version or (arm.package and installed_version(arm.package))
        key = {"family": self.family.name, "arm": name, "version": version, "seed": seed}
        return key | {"n_imgs": self.args.n_imgs, "guidance": self.args.guidance}

    def _known(self, key):
        return next((line for line in self.lines if key.items() <= line.items()), None)

    def _load(self):
        """What draws and judges, once it is needed."""
        if self._sampler is not None:
            return
        extras = Extras(refiner_of(self.family, "embedded"))
        self._sampler = load_sampler(self.family, "embedded", torch.device("cpu"), extras)
        self._judge, self._float = Judge(), self._sampler.denoiser
        slots = find_slots(self._float, self.family.slot_rules)
        self._shapes, self._real_shapes = {key: slot.shape for key, slot in slots.items()}, real_shapes(self.family)

    def _build(self, arm):
        """The arm's denoiser, and its average bits in both ways."""
        start = time.perf_counter()
        denoiser = copy.deepcopy(self._float)
        self._put(denoiser)
        denoiser, stored = arm.build(denoiser, self._sampler)
        bits = average_bits(stored, self._shapes), average_bits(stored, self._shapes, self._real_shapes)
        seconds = {"build_seconds": round(time.perf_counter() - start, 1)}
        return denoiser, dict(zip(SIZES.values(), bits, strict=True)) | seconds

    def _distances(self, denoiser, seed):
        """Of the images of a seed to full precision's, which are kept for all arms."""
        path = self.args.outdir / f"full_precision_{seed}_{self.args.n_imgs}_{self.args.guidance:g}.npy"
        if not path.exists():
            with atomic_write(path) as file:
                np.save(file, self._draw(self._float, seed))
        start = time.perf_counter()
        images = self._draw(denoiser, seed)
        seconds = {"draw_seconds": round(time.perf_counter() - start, 1)}
        return self._judge.distances(images, np.load(path)) | seconds

    def _draw(self, denoiser, seed):
        self._put(denoiser)
        prompts, _ = prompts_and_answers(self.family, self.args.n_imgs, self.args.n_imgs)
        return make_pictures(self._sampler, prompts, seed, self.args.guidance)

    def _put(self, denoiser):
        setattr(self._sampler.pipeline, self.family.denoiser, denoiser)


def load_lines(path):
    """The sound lines of a file that `save_lines` wrote; none if there is no file."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [line for line in map(from_json, lines) if line is not None]


def save_lines(lines, path):
    save_text("".join(f"{json.dumps(with_digest(line))}\n" for line in lines), path)


def measure_all(arms, measuring, seeds):
    """(results of the arms, {arm: why it is left out}); what is done when it is interrupted."""
    results, left_out = {}, {}
    try:
        for name, arm in arms.items():
            if arm.package and installed_version(arm.package) is None:
                left_out[name] = f"{arm.package} is not installed"
            else:
                try:
                    results[name] = summary(arm.title, measuring.measure(name, arm, seeds))
                except Exception as reason:
                    if not arm.package:
                        raise
                    left_out[name] = f"does not run: {first_line(reason)}"
            print(left_out_line(name, left_out) if name in left_out else table_line(results[name]), flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on")
    return results, left_out


def summary(title, lines):
    """Means and standard deviations over the lines' seeds."""
    result = {"title": title} | {name: lines[0][name] for name in ("version", *SIZES.values())}
    for name in DISTANCES:
        values = [line[name] for line in lines]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        result |= {name: statistics.mean(values), f"{name} std": deviation, f"{name} by seed": values}
    return result | {name: lines[0][name] for name in ("build_seconds", "draw_seconds")}


def table_line(result):
    cells = [f"{result[name]:>9.4f} ±{result[f'{name} std']:<7.4f}" for name in DISTANCES]
    return f"{result['title']:<46}{result['avg_bits']:>6.2f}{result['real_avg_bits']:>7.2f}" + "".join(cells)


def table(results, left_out, args):
    """Lines of the table, smallest first."""
    yield f"{args.family}: {args.n_imgs} images, seeds {' '.join(map(str, args.seeds))}, by {args.sizes} sizes"
    yield f"{'':<46}{'bits':>6}{'real':>7}{'FID':>10}{'pixels':>18}{'features':>18}"
    yield from map(table_line, sorted(results.values(), key=lambda result: result[SIZES[args.sizes]]))
    for name in left_out:
        yield left_out_line(name, left_out)


def left_out_line(name, left_out):
    return f"{name}: left out, {left_out[name]}"


def chosen_arms(args):
    """{name: arm} of what is compared: those of the flags, given configurations, and those built at sizes."""
    arms = {name: ARMS[name] for name in args.arms}
    for path in args.q_config:
        if not path.is_file():
            raise InputError(f"{path}: no such configuration")
        arms[f"config:{path.stem}"] = configuration_arm(path, f"ours, {path.stem}")
    for bits in args.avg_bits:
        path = configurations.build(args, args.outdir / f"{bits:.4g}_bits.pkl", "none", bits, ANY_METHODS)
        title = f"ours, built without labels within {bits:g} bits"
        arms[f"built:{bits:g}"] = configuration_arm(path, title)
        arms[f"built-calibrated:{bits:g}"] = configuration_arm(path, f"{title}, calibrated", of_calibrated)
    return arms


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--q_config", type=Path, nargs="*", default=[], help="configurations' files, each an arm of its own")
    parser.add_argument(
        "--avg_bits", type=float, nargs="*", default=[], help="build configurations without labels within these"
    )
    parser.add_argument("--multi_chkpt", type=Path, help="multiquantizer that --avg_bits needs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 2000, 3000], help="of noise: image i has seed + i")
    parser.add_argument("--n_imgs", type=int, default=250)
    parser.add_argument("--guidance", type=float, help="default: the one that labels of the embedded model are made at")
    parser.add_argument(
        "--sizes", choices=list(SIZES), default="own", help="sort by bits of the embedded model, or as at real size"
    )
    parser.add_argument("--outdir", type=Path, help="folder that keeps measurements; default demo/<family>_quality")
    args = parser.parse_args()
    return Flags(vars(args)) | {
        "guidance": FAMILIES[args.family].embedded.label_guidance if args.guidance is None else args.guidance,
        "multi_chkpt": args.multi_chkpt or Path("multiquantizers") / f"{args.family}_embedded_mq.pt",
        "outdir": args.outdir or Path("demo") / f"{args.family}_quality",
    }


def main():
    args = parse_args()
    args.outdir.mkdir(parents=True, exist_ok=True)
    arms = chosen_arms(args)
    results, left_out = measure_all(arms, Measuring(FAMILIES[args.family], args), args.seeds)
    complete = len(results) + len(left_out) == len(arms)
    left_out |= LEFT_OUT
    print("\n".join(["", *table(results, left_out, args)]))
    if not complete:
        sys.exit(130)  # interrupted, as a shell has it
    told = {name: args[name] for name in ("family", "n_imgs", "seeds", "guidance")}
    write_result(f"quality_{args.family}", told | {"arms": results, "left_out": left_out})


if __name__ == "__main__":
    main()
