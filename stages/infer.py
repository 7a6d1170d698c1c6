"""Stage 3: generate images with a quantized denoiser, beside the full-precision ones."""

from pathlib import Path

from errors import InputError
from evaluation.contact_sheet import contact_sheet
from evaluation.images import generate, save_png
from models.pipelines import defaults, pick_device
from quant import config, modules, multiquantizer
from quant.activations import ACT_BITS, set_activation_bits
from stages.common import at_least, in_precision, log, parser_for, utf8
from stages.run_folder import make_run_folder, save_settings, start_log
from stages.sampling import add_sampling_flags, load_for, parse_sampling


def main(family):
    args = parse_args(family)
    family = in_precision(family, args.dtype)
    device = pick_device(args.device)
    chosen = args.cls_id if family.num_classes else args.prompt
    prompts = [chosen[index % len(chosen)] for index in range(args.n_imgs or len(chosen))]
    sampler = load_for(args, family, device, prompts)
    slots, entries = multiquantizer.load(args.multi_chkpt, sampler.denoiser, family)
    configuration = config.load(args.q_config, slots)
    description = config.describe(configuration, slots, entries, family.precision_bits)
    avg_bits = config.avg_bits(description, family.precision_bits)
    folder = make_run_folder(args.outdir)
    start_log(folder)
    save_settings(args, folder / "sampling_config.yaml")
    log.info("%s: average %.3f bits, %s bytes", args.q_config, avg_bits, f"{config.quantized_size(description):,}")
    parts = modules.install(sampler.denoiser, family, slots)
    rows = []
    if not args.no_compare:
        images = generate(sampler, prompts, args, "full precision")
        rows.append((f"full precision, {family.precision_bits} bits", images))
    config.apply(configuration, parts, slots, entries)
    if args.pack:
        config.pack(configuration, parts, slots, entries)
        log.info("weights packed: %s bytes in memory", f"{modules.weight_bytes(sampler.denoiser):,}")
    if args.quant_act:
        set_activation_bits(sampler.denoiser, args.act_bit)
    images = generate(sampler, prompts, args, "quantized")
    activations = f", activations {args.act_bit} bits" if args.quant_act else ""
    rows.append((f"{args.q_config}, {avg_bits:.2f} bits{activations}", images))
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
    if family.num_classes:
        parser.add_argument(
            "--cls_id", type=int, nargs="+", help=f"class, or several in turn; default {family.class_ids[0]}"
        )
    else:
        parser.add_argument("--prompt", type=utf8, nargs="+", help=f"prompt, or several in turn; default '{family.prompt}'")
    parser.add_argument("--n_imgs", type=at_least(1), help="number of images; default one per prompt or class")
    parser.add_argument("--quant_act", action="store_true", help="quantize activations too, online and token-wise")
    parser.add_argument("--act_bit", type=int, choices=ACT_BITS, default=ACT_BITS[0], help="their bits, with --quant_act")
    parser.add_argument("--no_compare", action="store_true", help="leave out the full-precision images")
    parser.add_argument("--pack", action="store_true", help="hold weights as packed 4/3-bit codes; less memory, slower")
    add_sampling_flags(parser, family)
    args = parse_sampling(parser, family)
    row = defaults(family, args.model_id)
    args.q_config = row.q_config if args.q_config is None else args.q_config
    if family.num_classes:
        args.cls_id = args.cls_id or [each for each in row.class_ids if each < args.num_classes] or [0]
        for class_id in args.cls_id:
            if not 0 <= class_id < args.num_classes:
                raise InputError(f"--cls_id {class_id}: {args.model_id} has classes 0 to {args.num_classes - 1}")
    else:
        args.prompt = args.prompt or [row.prompt]
    return args
