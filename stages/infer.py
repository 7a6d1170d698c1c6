"""Stage 3: generate images with a quantized denoiser, beside the full-precision ones."""

import time
from datetime import datetime
from pathlib import Path

import numpy as np

from errors import InputError
from evaluation.contact_sheet import contact_sheet
from evaluation.images import generate, save_png
from models.layers import find_slots
from models.pipelines import defaults, denoiser_of, load_pipeline, pick_device
from quant import config, modules, multiquantizer
from stages.common import (
    add_multi_chkpt,
    at_least,
    check_fits_model,
    finite,
    log,
    multiquantizer_path,
    parser_for,
    save_settings,
    start_log,
)


def main(family):
    args = parse_args(family)
    device = pick_device(args.device)
    pipeline = load_pipeline(family, args.model_id, device)
    check_fits_model(args, pipeline, family)
    denoiser = denoiser_of(pipeline, family)
    slots = find_slots(denoiser, family)
    configuration = config.load(args.q_config, slots)
    entries = multiquantizer.load(args.multi_chkpt, denoiser, family)
    description = config.describe(configuration, slots, entries, family.precision_bits)
    avg_bits = config.avg_bits(description, family.precision_bits)

    class_ids = [args.cls_id[index % len(args.cls_id)] for index in range(args.n_imgs)]
    folder = make_run_folder(args.outdir)
    start_log(folder)
    save_settings(args, folder / "sampling_config.yaml")
    log.info("%s: average %.3f bits, %s bytes", args.q_config, avg_bits, f"{config.quantized_size(description):,}")
    layers = modules.install(denoiser, family)
    rows = []
    if not args.no_compare:
        images = np.stack(list(generate(pipeline, class_ids, args, "full precision")))
        rows.append((f"full precision, {family.precision_bits} bits", images))
    config.apply(configuration, layers, slots, entries)
    if args.pack:
        config.pack(configuration, layers, slots, entries)
        log.info("weights packed: %s bytes in memory", f"{modules.weight_bytes(denoiser):,}")
    images = np.stack(list(generate(pipeline, class_ids, args, "quantized")))
    rows.append((f"{args.q_config}, {avg_bits:.2f} bits", images))
    for index, image in enumerate(images):
        save_png(image, folder / "samples" / f"{index:03d}.png")
    contact_sheet(rows).save(folder / "contact_sheet.png")
    log.info("images: %s; contact sheet: %s", folder / "samples", folder / "contact_sheet.png")


def parse_args(family):
    parser = parser_for(family, "infer", "generate images with a quantized denoiser")
    parser.add_argument("--outdir", type=Path, default=Path(f"{family.name}_sample"), help="folder of the results")
    parser.add_argument(
        "--q_config",
        help=f"name.pkl, quant_cache.pkl:best, quant_cache.pkl:3 or uniform:<method>; default {family.q_config}",
    )
    parser.add_argument("--cls_id", type=int, nargs="+", help=f"class, or several in turn; default {family.class_ids[0]}")
    parser.add_argument("--n_imgs", type=at_least(1), help="number of images; default one per class")
    parser.add_argument("--res", type=int, help="resolution in pixels; must be the model's own")
    parser.add_argument("--steps", type=at_least(1), help="sampler steps; default the model's")
    parser.add_argument("--guidance", type=finite, help="guidance scale; default the model's")
    parser.add_argument("--batch_size", type=at_least(1), default=25, help="images generated together")
    parser.add_argument("--no_compare", action="store_true", help="leave out the full-precision images")
    parser.add_argument("--pack", action="store_true", help="hold weights as packed 4/3-bit codes; less memory, slower")
    add_multi_chkpt(parser, family)
    args = parser.parse_args()
    row = defaults(family, args.model_id)
    args.q_config = row.q_config if args.q_config is None else args.q_config
    args.cls_id = args.cls_id or list(row.class_ids)
    args.n_imgs = args.n_imgs or len(args.cls_id)
    args.steps = args.steps or row.steps
    args.guidance = row.guidance if args.guidance is None else args.guidance
    args.multi_chkpt = args.multi_chkpt or multiquantizer_path(family, args.model_id)
    for class_id in args.cls_id:
        if not 0 <= class_id < row.num_classes:
            raise InputError(f"--cls_id {class_id}: {args.model_id} has classes 0 to {row.num_classes - 1}")
    return args


def make_run_folder(outdir):
    """A new folder named by the time, with `samples` in it."""
    folder = outdir / datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    while folder.exists():
        time.sleep(0.1)
        folder = outdir / datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    (folder / "samples").mkdir(parents=True)
    return folder
