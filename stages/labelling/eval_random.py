"""Stage 2: draw random configurations and label each with its size, error, BOPs and FID."""

from pathlib import Path

import constants
from errors import InputError
from evaluation import fid, quant_cache
from models.clip import CLIP_MODEL, load_clip
from models.embedded.judge import digit_reference_folder
from models.pipelines import is_embedded, pick_device
from quant import config
from quant.files import save_text
from quant.leftovers import remove_leftovers
from stages import multi_chkpt, q_config
from stages.common import at_least, in_precision, log, parser_for, share
from stages.labelling import successive_halving
from stages.labelling.forecast import check_disk
from stages.labelling.label_runs import LABEL_FLAGS
from stages.labelling.labeller import Job, make_extractor
from stages.labelling.labelling_run import LabellingRun
from stages.labelling.stopwatch import Stopwatch
from stages.labelling.workers import needs_ray, start_workers
from stages.library_notes import notes_in_run_log
from stages.run_folder import only_run_in, read_settings, save_settings, start_log
from stages.sampling import add_sampling_flags, check_sampling, complete_sampling, prompts_for

SETTINGS = "sampling_config.yaml"


def main(family):
    args = parse_args(family)
    family = in_precision(family, args.dtype)
    device = pick_device(args.device)
    check_first(args, family, device)
    reference = reference_folder(args, family)
    job = Job(family.name, args, prompts_for(args, family))
    flags = args | {
        "reference": reference,
        "reference_key": fid.folder_key(reference, times=False),
        "multiquantizer_key": multi_chkpt.key(args.multi_chkpt, family),
        "prompts_key": job.prompts_key,
        "halving_key": f"{args.budget_images} of {args.num_archs}" if args.budget_images else None,
    }
    with only_run_in(args.outdir):
        remove_leftovers(args.outdir)
        run(job, flags, device)


def reference_folder(args, family):
    """The folder of real images that the flags ask for."""
    if args.reference is not None:
        return args.reference
    embedded = is_embedded(family, args.model_id)
    return digit_reference_folder() if embedded else Path(getattr(constants, family.reference_images))


def check_first(args, family, device):
    """InputError for what flags and small files tell to be wrong, before anything large is read."""
    needs_ray(args)
    check_sampling(args, family, device)
    entries = multi_chkpt.read(args.multi_chkpt, family)
    for spec in args.q_config:
        q_config.check(spec, entries, family)
    if entries and not args.q_config:
        config.check_space(entries)
    if args.clip_score:
        load_clip(args.clip_model)


def run(job, flags, device):
    """Label as the job says. `flags` are its flags and keys of what they name: what labels depend on."""
    args = job.args
    check_same_run(flags, args.outdir)
    start_log(args.outdir)
    check_disk(args, job.family, device)
    with notes_in_run_log(args.outdir):
        rows, full_precision = label(job, flags, device)
    table = "\n".join(results_table(rows, full_precision))
    save_text(table + "\n", args.outdir / "results.txt")
    log.info("labels: %s\n%s", args.outdir / "quant_cache.pkl", table)


def label(job, flags, device):
    """(rows of all configurations, full precision's)."""
    # The reference first, in case it fails.
    extractor = make_extractor(job, device)
    reference = fid.reference_statistics(flags["reference"], extractor, device)
    watch = Stopwatch(device)
    with start_workers(job, device, extractor, watch) as workers:
        try:
            labelling = LabellingRun(job, workers, reference, watch)
            save_settings(flags | {"reference_images": reference.images}, job.args.outdir / SETTINGS)
            full_precision = labelling.measure_full_precision()
            log.info("full precision: FID %.3f", full_precision["FID-GT-1k"])
            return labelling.label(successive_halving.survivors(labelling, job.args)), full_precision
        finally:
            log.info("where the time went\n%s", "\n".join(watch.table()))


def parse_args(family, argv=None):
    parser = parser_for(family, "eval_random", "label random quantization configurations with FID")
    parser.add_argument("--outdir", type=Path, default=Path(f"{family.name}_random_seed42"), help="folder of the results")
    parser.add_argument("--num_archs", type=at_least(1), default=500, help="configurations to label")
    parser.add_argument("--n_imgs", type=at_least(2), default=1000, help="images per configuration")
    parser.add_argument("--a_l", type=share, default=0.0, help="least expected share of 3-bit weights")
    parser.add_argument("--a_u", type=share, default=1.0, help="largest expected share of 3-bit weights")
    parser.add_argument(
        "--q_config",
        nargs="+",
        default=[],
        help="label these configurations, given as the infer scripts take them, not random ones",
    )
    parser.add_argument("--reference", type=Path, help="folder of real images; default the one in constants.py")
    parser.add_argument("--published_noise", action="store_true", help="start every image from the same seed, as published")
    parser.add_argument("--keep_samples", action="store_true", help="keep the images in <outdir>/samples")
    parser.add_argument("--workers", type=at_least(1), help="processes that share the work by Ray: one per GPU, or CPU core")
    parser.add_argument("--ray_address", help="work on a running Ray cluster, `auto` for the one of this machine")
    parser.add_argument(
        "--budget_images",
        type=at_least(2),
        nargs="+",
        default=[],
        help="successive halving: all configurations on so many images, the better ones on more, the best on --n_imgs",
    )
    parser.set_defaults(prompts=None, clip_score=False, clip_model=None)
    if not family.num_classes:
        parser.add_argument(
            "--prompts",
            type=Path,
            help="COCO captions, a .csv, .tsv, .jsonl or .json with prompts, or text, one a line; default in constants.py",
        )
        parser.add_argument("--clip_score", action="store_true", help="label with the CLIP score too")
        parser.add_argument("--clip_model", default=CLIP_MODEL, help="CLIP of --clip_score: Hub id or local folder")
    add_sampling_flags(parser, family)
    return parser.parse_args(argv, lambda args: complete(args, family))


def complete(args, family):
    """Flags {name: value}, those left out filled from what is known of the model."""
    found = complete_sampling(args, family, guidance="label_guidance")
    if args.a_l > args.a_u:
        raise InputError(f"--a_l {args.a_l} is above --a_u {args.a_u}")
    successive_halving.check(args)
    chosen_key = ", ".join(map(q_config.key, args.q_config)) or None
    return found | {"num_archs": len(args.q_config) or args.num_archs, "chosen_key": chosen_key}


def check_same_run(flags, outdir):
    """Refuse to mix labels made under other flags into one cache."""
    rows, settings = quant_cache.load(outdir / "quant_cache.pkl"), outdir / SETTINGS
    if not settings.exists():
        if rows:
            raise InputError(f"{outdir}: has labels but no {settings.name} that says how they were made")
        return
    before = read_settings(settings)
    for flag in LABEL_FLAGS:
        if before.get(flag) != flags.get(flag):
            raise InputError(
                f"{outdir}: its labels were made with {flag} {before.get(flag)}, not {flags.get(flag)}; "
                "give the same flags to go on, or another --outdir"
            )


def results_table(rows, full_precision):
    """Lines of a table: configuration, average bits, size, FID; best first."""
    yield f"{'configuration':<16}{'avg_bits':>9}{'size (MB)':>11}{'BOPs (T)':>10}{'FID':>9}"
    numbered = [("full precision", full_precision)]
    order = sorted(enumerate(rows, 1), key=lambda pair: quant_cache.by_fid(pair[1]))
    numbered += [(str(number), row) for number, row in order]
    for name, row in numbered:
        yield (
            f"{name:<16}{row['avg_bits']:>9.3f}{row['quantized_size'] / 1e6:>11.3f}"
            f"{row['bops']:>10.4f}{row['FID-GT-1k']:>9.3f}"
        )
