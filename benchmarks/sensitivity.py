"""Sensitivities by both probes: `python -m benchmarks.sensitivity [pixart_alpha dit]`.

Of each embedded model, what measuring takes by the sketch and exactly, and how far images of the configurations that are
built at each average size are from full precision's: mean squared differences of features and of pixels, over seeds of
noise. Needs the multiquantizers. Everything is kept in --outdir, so an interrupted run goes on.

    python -m benchmarks.sensitivity --geometry pixart_alpha

The cost of a sketch at real geometry, on random weights, in units of a forward pass of the same rows: of the first --blocks
blocks, for one direction, with activations computed again and differences of weights computed in each pass, scaled to all
directions; with the six methods and with thirty, of made-up parameters. With --step_seconds of a step for one image, as
benchmarks/denoising_step.py measures it, it says how long all takes.
Writes benchmarks/results/sensitivity_<family>.json, or sensitivity_cost_<family>.json.
"""

import argparse
import functools
import time
from pathlib import Path

import numpy as np
import torch

from autobuild.first_order import FirstOrder, Weight, random_signs
from benchmarks import configurations
from benchmarks.machine import finish, write_result
from models import geometry
from models.families import FAMILIES
from models.listening import StandIn
from quant.files import save_pickle
from quant.model import QuantizedModel
from quant.registry import SEARCH_SPACE, quantizer
from stages import score_sources, sensitivities
from stages.flags import Flags

MEASURES = ("feature_mse", "image_mse")
THIRTY = (
    *(f"{algorithm}-{bits}" for algorithm in ("mse", "kmeans", "kmeans_all") for bits in range(2, 9)),
    *(f"mse-{bits}-g64" for bits in range(2, 9)),
    "kmeans-3-g64",
    "kmeans-4-g64",
)


def main():
    args = parse_args()
    if args.geometry:
        return cost(args)
    for name in args.families:
        compare(args | {"family": name, "outdir": args.outdir / name})


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=["pixart_alpha", "dit"])
    parser.add_argument("--avg_bits", type=float, nargs="+", default=[3.4, 3.7, 4.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 2000, 3000], help="of noise: image i has seed + i")
    parser.add_argument("--n_imgs", type=int, default=250, help="images by which configurations are compared")
    parser.add_argument("--directions", type=int, default=sensitivities.DIRECTIONS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("multiquantizers"), help="of the multiquantizers")
    parser.add_argument("--outdir", type=Path, default=Path("demo") / "sensitivity")
    parser.add_argument("--geometry", choices=list(geometry.GEOMETRIES), help="measure the cost at this real geometry")
    parser.add_argument("--blocks", type=int, default=1, help="with --geometry: of a transformer")
    parser.add_argument("--images", type=int, default=16, help="with --geometry: in a batch, two rows each")
    parser.add_argument("--pixels", type=int, help="with --geometry: latent pixels per side; default the model's")
    parser.add_argument("--step_seconds", type=float, help="with --geometry: of one step of one image with guidance")
    return Flags(vars(parser.parse_args()))


def compare(args):
    """One family's table."""
    multi_chkpt = args.folder / f"{args.family}_embedded_mq.pt"
    args |= {"multi_chkpt": multi_chkpt}
    seconds, paths = {}, {}
    for probe in ("exact", *sensitivities.PROBES[:1]):
        scores, seconds[probe] = timed_scores(args, probe)
        for bits in args.avg_bits:
            path = paths[(bits, probe)] = args.outdir / f"{probe}_{bits:g}.pkl"
            save_pickle(scores.space.configuration(scores.best_within(bits)), path)
    rows = [configurations.measure(args, f"seed_{seed}", seed, paths.values()) for seed in args.seeds]
    lines = []
    for (bits, probe), *each in zip(paths, *rows, strict=True):
        line = {"avg_bits": bits, "probe": probe}
        lines.append(line | {name: [row[name] for row in each] for name in MEASURES})
    print("\n".join(table(args, seconds, lines)))
    write_result(f"sensitivity_{args.family}", {"directions": args.directions, "seconds": seconds, "configurations": lines})


def timed_scores(args, probe):
    """(scores by a probe, seconds that measuring took); seconds of an earlier run are read from a file beside it."""
    said = args.outdir / f"sensitivity.{probe}"
    argv = ["--family", args.family, "--model_id", "embedded", "--scores", "none", "--probe", probe]
    argv += ["--directions", args.directions, "--multi_chkpt", args.multi_chkpt, "--sensitivity", said]
    family, parser = score_sources.parser_of("build_config", "", argv := list(map(str, argv)))
    flags = parser.parse_args(argv, complete=lambda given: score_sources.complete(given, family))
    took = said.with_suffix(f".{probe}_seconds")

    def timed(measure, *given):
        start = time.perf_counter()
        measure(*given)
        took.write_text(str(time.perf_counter() - start))

    with StandIn(sensitivities.Measured, "measure", timed):
        scores = score_sources.load_scores(flags, family)
    return scores, float(took.read_text())


def table(args, seconds, lines):
    exact, sketch = seconds["exact"], seconds["sketch"]
    yield f"{args.family}: measured exactly in {exact:.0f} s, sketched in {sketch:.0f} s, a {exact / sketch:.1f}th of it"
    yield f"{'average bits':<14}{'probe':<8}" + "".join(f"{name:>14}{'std':>10}{'/ exact':>9}" for name in MEASURES)
    of_exact = {line["avg_bits"]: line for line in lines if line["probe"] == "exact"}
    for line in sorted(lines, key=lambda line: line["avg_bits"]):
        cells = ""
        for name in MEASURES:
            mean, base = np.mean(line[name]), np.mean(of_exact[line["avg_bits"]][name])
            cells += f"{mean:>14.5f}{np.std(line[name]):>10.5f}{mean / base:>9.3f}"
        yield f"{line['avg_bits']:<14g}{line['probe']:<8}{cells}"


def cost(args):
    """The cost of a sketch at real geometry, in forward passes of the same rows."""
    name, family = args.geometry, FAMILIES[args.geometry]
    torch.manual_seed(0)
    changes = {"num_layers": args.blocks} if "num_layers" in geometry.GEOMETRIES[name][1] else {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with device:
        denoiser = geometry.build(name, **changes).to(torch.float32 if device.type == "cpu" else family.dtype).eval()
        pixels = args.pixels or min(family.resolution // 8, denoiser.config.sample_size)
        inputs = geometry.example_inputs(name, denoiser, batch=2 * args.images, pixels=pixels)
    model = QuantizedModel(denoiser, **family.quantization)
    ask = functools.partial(guided, denoiser, inputs)
    with torch.no_grad():
        forward = min(timed_call(ask, device) for _ in range(2))
    passes = {len(words): direction_seconds(model, words, ask, args, device) / forward for words in (SEARCH_SPACE, THIRTY)}
    total = {count: args.directions * each for count, each in passes.items()}
    part = f"{args.blocks} blocks" if changes else "the whole"
    print(
        f"{name}, {part} at {pixels} px of latents, {args.images} images of two rows: a forward pass takes {forward:.2f} s"
    )
    for count, each in passes.items():
        print(f"{count} methods: {each:.2f} forward passes a direction, {total[count]:.0f} for {args.directions} directions")
    print(f"30 methods take {passes[30] / passes[6]:.2f} times as long as 6; exactly, 6 take {exact_passes(family)} passes")
    if args.step_seconds:
        minutes = total[6] * 16 * 5 * args.step_seconds / 60
        print(f"16 images at 5 steps, at {args.step_seconds} s an image and step: {minutes:.0f} min, reckoned")
    told = {"blocks": args.blocks, "pixels": pixels, "images": args.images, "directions": args.directions}
    write_result(f"sensitivity_cost_{name}", told | {"forward_seconds": forward, "passes_a_direction": passes})


def exact_passes(family):
    """Forward passes that measuring all pairs takes, computed whole."""
    from autobuild.space import graph_and_keys

    return len(graph_and_keys(family.name)[1]) * len(SEARCH_SPACE)


def guided(denoiser, inputs):
    """Guided outputs [N, ...] of a batch of two copies."""
    output = denoiser(**inputs, return_dict=False)[0].float()
    without, with_prompt = output.chunk(2)
    return without + 4.5 * (with_prompt - without)


def timed_call(function, device):
    start = time.perf_counter()
    function()
    finish(device)
    return time.perf_counter() - start


def direction_seconds(model, words, ask, args, device):
    """Seconds for one direction: a forward pass, and a backward pass in which all that can be computed again is."""
    weights = [Weight([part], {word: made_up(part.original, word) for word in words}) for part in model.parts.values()]
    first_order = FirstOrder(model.module, weights, words, budget_bytes=0)
    first_order.checkpoints = True
    with torch.no_grad():
        shape = ask().shape
    signs = torch.stack([random_signs(shape[1:], 0, image) for image in range(args.images)])[None]
    return timed_call(lambda: first_order.products(ask, 2 * args.images, signs), device)


def made_up(weight, word):
    """Parameters of a quantizer, by the weight's range: what they are does not change what applying them costs."""
    method, bound = quantizer(word), float(weight.abs().max())
    if method.is_affine:
        lead = method.lead(weight.shape)
        zeros = torch.full(lead, 2 ** (method.bits - 1), dtype=torch.int16)
        return {"scale": torch.full(lead, 2 * bound / 2**method.bits), "zero_point": zeros}
    shape = method.table_shape(weight.shape)
    return {"centroids": torch.linspace(-bound, bound, shape[-1]).expand(shape).contiguous()}


if __name__ == "__main__":
    main()
