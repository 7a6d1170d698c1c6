"""Stage 3: generate images with a quantized denoiser, beside the full-precision ones.

Images are kept as they come, in a folder of the run's own. A run that was cut off goes on by its folder's name.
"""

import argparse
import contextlib
import dataclasses
import functools
import shutil
from pathlib import Path

from autobuild.sensitivity import draw
from errors import InputError
from evaluation.contact_sheet import MOST_IMAGES, contact_sheet
from models.components import is_packed, quiet_loading
from models.families import PUBLISHED_CONFIGS
from models.pipelines import defaults, has_bfloat16_units, is_embedded, model_of, pick_device
from quant import config, layers
from quant.activations import ACT_BITS, set_activation_bits
from quant.files import save_png
from quant.leftovers import remove_leftovers
from quant.packed_state import size_of
from stages import calibrating, multi_chkpt, q_config
from stages.common import at_least, in_precision, log, parser_for, short_hash, utf8
from stages.library_notes import notes_in_run_log
from stages.pictures import Pictures
from stages.run_folder import make_run_folder, only_run_in, read_settings, save_settings, start_log, written
from stages.sampling import (
    add_sampling_flags,
    check_sampling,
    complete_sampling,
    is_own,
    load_for,
    settings_of,
    show_steps,
)

SETTINGS, SHEET, CALIBRATION = "sampling_config.yaml", "contact_sheet.png", "calibration"
INTEGER, SIMULATED, ANY = "integer", "simulated", True  # how activations are quantized
# Flags on which no image depends, or which stand beside a key of what they name.
FREE_FLAGS = {
    *("outdir", "run", "device", "batch_size", "n_imgs", "no_compare", "pack", "offload", "debug"),
    *("multi_chkpt", "packed", "calibration_prompts"),
}


def main(family):
    args = parse_args(family)
    family = in_precision(family, args.dtype)
    device = pick_device(args.device)
    check_first(args, family, device)
    flags = args | {
        "multi_chkpt_key": None if args.packed else multi_chkpt.key(args.multi_chkpt, family),
        "q_config_key": q_config.key(args.q_config),
        "calibration_key": short_hash(str(calibrating_prompts(args, family))) if args.calibrate else None,
    }
    flags = calibrating.without_calibration(flags)
    chosen = args.cls_id if family.num_classes else args.prompt
    prompts = [chosen[index % len(chosen)] for index in range(args.n_imgs or len(chosen))]
    with run_folder(args) as folder:
        remove_leftovers(folder)
        check_same_run(flags, folder)
        start_log(folder)
        try:
            with notes_in_run_log(folder):
                run(family, args, flags, device, prompts, folder)
        except KeyboardInterrupt as stop:
            if (folder / SETTINGS).exists():
                stop.args = (f"`--run {folder.name}` with the same flags goes on",)
            raise


def check_first(args, family, device):
    """InputError for what flags and small files tell to be wrong, before anything large is read."""
    calibrating.check_calibration_flags(args)
    if args.packed:
        check_sampling(args, family, device, packed=True)
        return
    if args.q_config == family.q_config and not Path(args.q_config).is_file():
        raise InputError(
            f"{args.q_config}: no such file; it comes with the paper's repository ({PUBLISHED_CONFIGS}), others are made by "
            "build_config.py or labelled (quant_cache.pkl:best); `--q_config uniform:mse-4` needs none"
        )
    entries = multi_chkpt.read(args.multi_chkpt, family)
    q_config.check(args.q_config, entries, family)
    check_sampling(args, family, device)


@contextlib.contextmanager
def run_folder(args):
    """The folder that --run names, or a new one named by the time, held. A new one of which nothing came goes again."""
    is_new = args.run is None or not (args.outdir / args.run).exists()
    folder = make_run_folder(args.outdir) if args.run is None else args.outdir / args.run
    with only_run_in(folder):
        try:
            yield folder
        except BaseException:
            if is_new and not (folder / SETTINGS).exists():
                with contextlib.suppress(OSError):
                    for path in folder.iterdir():
                        path.unlink()
                    folder.rmdir()
            raise


def check_same_run(flags, folder):
    """Refuse to mix images drawn under other flags into one folder."""
    settings = folder / SETTINGS
    if not settings.exists():
        if any(folder.glob("*/*.png")):
            raise InputError(f"{folder}: has images but no {SETTINGS} that says how they were made; give another --run")
        return
    before, now = read_settings(settings), written(flags)
    for name in now:
        if name not in FREE_FLAGS and before.get(name) != now[name]:
            raise InputError(
                f"{folder}: its images were made with --{name.removesuffix('_key')} {before.get(name)!s:.80}, "
                f"not {now[name]!s:.80}; give the same flags to go on, or another --run"
            )


def run(family, args, flags, device, prompts, folder):
    originals, samples = Pictures(folder / "full_precision", prompts), Pictures(folder / "samples", prompts)
    unseen, unquantized = ([] if args.no_compare else originals.missing()), samples.missing()
    if not unseen and not unquantized and (folder / SHEET).exists():
        log.info("all %d images are there: %s; contact sheet: %s", len(prompts), samples.folder, folder / SHEET)
        return
    others = calibrating_prompts(args, family) if args.calibrate else []
    sampler = load_for(args, family, device, [*prompts, *others], place=False)
    if args.packed:
        packed = (layer for _, layer in layers.packed_layers(sampler.denoiser))
        put, avg_bits, size_bytes = None, *size_of(packed, family.precision_bits)
    else:
        model, configuration, avg_bits, size_bytes = chosen(args, family, sampler.denoiser)
        put = functools.partial(quantize, args, model, configuration)
    save_settings(flags, folder / SETTINGS)
    log.info("%s: average %.3f bits, %s bytes", args.q_config, avg_bits, f"{size_bytes:,}")
    if args.packed:
        log.info("%s: is already quantized, so there are no full-precision images to compare with", args.model_id)
    log.info("run %s; cut off, it goes on with --run %s and the same flags", folder, folder.name)
    show_steps(sampler)
    settings = settings_of(args)
    if unseen:
        if args.compute_dtype:
            model.keep_originals()
        place(sampler, device)
        originals.draw(unseen, sampler, settings, "full precision")
        sampler.gather()
    if unquantized:
        if args.calibrate:
            model = calibrated(args, family, sampler, model, configuration, others, device, folder)
            put = functools.partial(quantize, args, model, configuration)
        if put is not None:
            put()
        if args.quant_act:
            set_activation_bits(sampler.denoiser, args.act_bit, simulated=args.quant_act == SIMULATED)
        place(sampler, device)
        samples.draw(unquantized, sampler, settings, "quantized")
    activations = (
        f", activations {args.act_bit} bits{' simulated' * (args.quant_act == SIMULATED)}" if args.quant_act else ""
    )
    rows = [] if args.no_compare else [(f"full precision, {family.precision_bits} bits", originals)]
    how = f"{activations}, calibrated" if args.calibrate else activations
    finish([*rows, (f"{args.q_config}, {avg_bits:.2f} bits{how}", samples)], folder)
    shutil.rmtree(folder / CALIBRATION, ignore_errors=True)


def chosen(args, family, denoiser):
    """(the denoiser's QuantizedModel, the configuration that it is to take, its average bits, its bytes)."""
    model = multi_chkpt.load(args.multi_chkpt, family, denoiser)
    configuration = q_config.load(args.q_config, model.slots)
    description = model.describe(configuration)
    avg_bits = config.avg_bits(description, family.precision_bits)
    return model, configuration, avg_bits, config.quantized_size(description)


def calibrating_prompts(args, family):
    """Prompts, or class numbers, of the images for calibration; those of the embedded models are of their captions."""
    if family.num_classes:
        count = calibrating.image_count(args)
        return [number * args.num_classes // count % args.num_classes for number in range(count)]
    if args.calibration_prompts is None and is_embedded(family, args.model_id):
        return calibrating.captions(args)
    return calibrating.calibration_prompts(args)


def calibrated(args, family, sampler, model, configuration, prompts, device, folder):
    """The QuantizedModel of a configuration, calibrated by images of `prompts` from noise of its own."""
    if args.compute_dtype:
        model.keep_originals()
    place(sampler, device)
    hand_over = family.refiner.hand_over if sampler.refiner is not None else None
    settings = dataclasses.replace(settings_of(args, hand_over), seed=args.seed + calibrating.SEED_OFFSET)
    batches = [range(first, min(first + args.batch_size, len(prompts))) for first in range(0, len(prompts), args.batch_size)]
    calls = [functools.partial(draw, sampler, prompts[each.start : each.stop], each, settings) for each in batches]
    told = f"{prompts} {settings} {args.scheduler} {args.negative_prompt} {args.compute_dtype} {device.type} {family.dtype}"
    log.info("calibrating on %d images: %s", len(prompts), folder / CALIBRATION)
    model = calibrating.calibrate(model, configuration, calls, folder / CALIBRATION, told)
    sampler.gather()
    return model


def quantize(args, model, configuration):
    """Put the configuration into the denoiser for good, a weight at a time, where its weights are."""
    if args.pack:
        model.pack(configuration)
        log.info("weights packed: %s bytes in memory", f"{layers.weight_bytes(model.module):,}")
    else:
        model.apply(configuration, for_good=True)


def place(sampler, device):
    with quiet_loading():
        sampler.place(device)


def finish(rows, folder):
    """Draw the contact sheet of `rows`, a list of (caption, Pictures); InputError if images are missing."""
    sheet = contact_sheet([(caption, pictures.paths) for caption, pictures in rows])
    if sheet is not None:
        save_png(sheet, folder / SHEET)
    count = len(rows[0][1].paths)
    shown = f" (the first {MOST_IMAGES})" if count > MOST_IMAGES else ""
    log.info("images: %s; contact sheet%s: %s", rows[-1][1].folder, shown, folder / SHEET)
    if broken := [path for _, pictures in rows for path in pictures.broken]:
        names = ", ".join(str(path.relative_to(folder)) for path in broken[:5])
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise InputError(
            f"{folder}: {names}{more}: values that are not numbers; the others are there; try other flags, "
            "such as --dtype float32"
        )


def of_packed(args, family, source):
    """Flags {name: value} for a denoiser that this program has packed; InputError for those that mean nothing then."""
    if args.q_config is not None or args.lora or args.calibrate:
        flag = "--lora" if args.lora else "--calibrate" if args.calibrate else "--q_config"
        raise InputError(
            f"{flag}: {args.model_id} is already quantized by this program; give the model that it was made from"
        )
    return {"packed": True, "no_compare": True, "q_config": str(source.folder / family.denoiser / "config.json")}


def run_name(text):
    """Type of --run: the name of a folder in --outdir."""
    if text in ("", ".", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder in --outdir")
    return text


def parse_args(family):
    parser = parser_for(family, "infer", "generate images with a quantized denoiser")
    parser.add_argument("--outdir", type=Path, default=Path(f"{family.name}_sample"), help="folder of the runs")
    parser.add_argument(
        "--run", type=run_name, help="name of the run's folder in it; one that is there goes on; default: the time"
    )
    parser.add_argument(
        "--q_config",
        help=f"name.pkl, quant_cache.pkl:best, quant_cache.pkl:3 or uniform:<method>; default {family.q_config}",
    )
    if family.num_classes:
        parser.add_argument(
            "--cls_id", type=int, nargs="+", help=f"class, or several in turn; default {family.class_ids[0]}"
        )
    else:
        parser.add_argument("--prompt", type=utf8, nargs="+", help=f"prompt, or several in turn; default '{family.prompt}'")
    parser.add_argument("--n_imgs", type=at_least(1), help="number of images; default one per prompt or class")
    parser.add_argument(
        "--quant_act",
        nargs="?",
        choices=(INTEGER, SIMULATED),
        const=ANY,
        default=False,
        help=f"quantize activations too, online and token-wise: {INTEGER}, the default of packed weights, multiplies whole "
        f"numbers in linear layers and leaves convolutions and attention float; {SIMULATED} rounds floats in all three, as "
        "the paper does",
    )
    parser.add_argument("--act_bit", type=int, choices=ACT_BITS, default=ACT_BITS[0], help="their bits, with --quant_act")
    parser.add_argument("--no_compare", action="store_true", help="leave out the full-precision images")
    parser.add_argument(
        "--pack",
        action=argparse.BooleanOptionalAction,
        help="hold weights as packed 4/3-bit codes, a quarter of the memory; default on a CPU, where it is as fast",
    )
    calibrating.add_calibration_flags(parser, "default off, as published")
    add_sampling_flags(parser, family, on_cpu="bfloat16 if it has units for that, else float32")
    return parser.parse_args(complete=lambda args: complete(args, family))


def complete(args, family):
    """Flags {name: value}, those left out filled from what is known of the model."""
    row = defaults(family, args.model_id)
    found = complete_sampling(args, family)
    source = None if is_own(family, args.model_id) else model_of(family, args.model_id)
    if source is not None and is_packed(source, family.denoiser):
        found |= of_packed(args, family, source)
    else:
        found |= {"packed": False, "q_config": row.q_config if args.q_config is None else args.q_config}
    found |= how_to_compute(args, family, found["packed"])
    if family.num_classes:
        return found | {"cls_id": class_ids(args, row, found["num_classes"])}
    return found | {"prompt": args.prompt or [row.prompt]}


def how_to_compute(args, family, packed):
    """--compute_dtype, --pack and --quant_act, those left out as is best on the device, or for a model that is packed."""
    on_cpu = pick_device(args.device).type == "cpu"
    own_dtype = "bfloat16" if on_cpu and has_bfloat16_units() and not is_embedded(family, args.model_id) else None
    if args.quant_act == INTEGER and args.pack is False and not packed:
        raise InputError(f"--quant_act {INTEGER}: is for packed weights; leave --no-pack out, or give {SIMULATED}")
    pack = packed or args.quant_act == INTEGER or on_cpu if args.pack is None else args.pack
    quant_act = args.quant_act
    if quant_act is ANY:
        quant_act = INTEGER if pack or packed else SIMULATED
    return {"compute_dtype": args.compute_dtype or own_dtype, "pack": pack, "quant_act": quant_act}


def class_ids(args, row, count):
    """The numbers of the classes to draw, each below `count`."""
    numbers = args.cls_id or [each for each in row.class_ids if each < count] or [0]
    for number in numbers:
        if not 0 <= number < count:
            raise InputError(f"--cls_id {number}: {args.model_id} has classes 0 to {count - 1}")
    return numbers
