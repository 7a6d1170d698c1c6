"""Where scores come from, as flags say: a trained predictor, or the denoiser itself, asked without labels.

Asking keeps what it has found, so an interrupted run goes on.
"""

import sys
from pathlib import Path

from tqdm import tqdm

from autobuild import space as spaces
from autobuild.first_order import Weight
from errors import InputError
from models.families import FAMILIES
from models.pipelines import pick_device
from quant.file_keys import by_file_key
from quant.files import check_writable
from quant.slots import find_slots
from stages import multi_chkpt, prompt_files
from stages.common import OneLineParser, at_least, in_precision, parser_for
from stages.library_notes import Once, library_notes
from stages.record_file import RecordFile
from stages.sampling import (
    IMAGE_FLAGS,
    add_sampling_flags,
    check_sampling,
    complete_sampling,
    load_for,
    prompts_for,
    settings_of,
    show_steps,
)
from stages.search_flags import checked_methods
from stages.sensitivities import Measured, add_probe_flags, probe_settings

# What sensitivities depend on; a run goes on only with the same ones.
FLAGS = (*IMAGE_FLAGS, "calls", "hand_over")


def parser_of(stage, description, argv=None):
    """(family, parser with the flags that say where scores come from)."""
    first = OneLineParser(prog=f"{stage}.py", add_help=False, allow_abbrev=False)
    first.add_argument("--family", choices=list(FAMILIES), required=not {"-h", "--help"} & set(sys.argv[1:]))
    family = FAMILIES[first.parse_known_args(argv)[0].family or next(iter(FAMILIES))]
    parser = parser_for(family, stage, description)
    parser.prog = f"{stage}.py"
    parser.add_argument("--family", choices=list(FAMILIES), required=True)
    parser.add_argument(
        "--scores",
        "--labels",  # as it was called
        required=True,
        metavar="PREDICTOR",
        help="predictor of train_predictor.py, or `none`: ask the denoiser itself",
    )
    parser.add_argument("--sensitivity", type=Path, help="with `none`: file of what it said; default beside --multi_chkpt")
    parser.add_argument("--n_imgs", type=at_least(1), default=16, help="with `none`: images on whose way it is asked")
    parser.add_argument("--calls", type=at_least(1), default=5, help="with `none`: steps of that way")
    add_probe_flags(parser, "with `none`")
    parser.set_defaults(prompts=None, methods=None, min_bits=(), fix=(), max_bops=None)
    if not family.num_classes:
        parser.add_argument("--prompts", type=Path, help="with `none`: captions, a table or text; default in constants.py")
    add_sampling_flags(parser, family)
    return family, parser


def complete(args, family):
    """Flags {name: value}, those left out filled from what is known of the model."""
    found = complete_sampling(args, family, guidance="label_guidance")
    multi_chkpt = found["multi_chkpt"]
    default = multi_chkpt.with_name(f"{multi_chkpt.stem}_sensitivity.{args.probe}")
    return found | {"methods": checked_methods(args.methods or spaces.NAMES), "sensitivity": args.sensitivity or default}


def load_scores(args, family, avg_bits=None):
    """The scores that --scores asks for; InputError if no configuration is within `avg_bits`, if given."""
    if args.scores != "none":
        return learned(Path(args.scores), args, family, avg_bits)
    from autobuild.scores import MeasuredScores

    return MeasuredScores(*measured(args, family, avg_bits))


def restricted(space, args):
    from autobuild import limits

    return limits.restricted(space, args.min_bits, args.fix)


def budgets_of(args, family, space):
    """The autobuild.limits.Budgets that flags ask for beside the size: of bit operations, counted as labels have them."""
    if args.max_bops is None:
        return ()
    from autobuild.limits import bops_budget

    count = bops_counter(args, family)
    budget = bops_budget(space, count, args.max_bops)
    budget.check(space.is_known, family.name)
    return (budget,)


def bops_counter(args, family):
    """A function from {file key: method} to tera-BOPs of a call for one image."""
    from bops.bops import tera_bops
    from bops.macs import count_macs
    from models.pipelines import meta_denoiser

    sampler = load_for(args | {"refiner_id": None}, family, pick_device("cpu"), prompts_for(args, family)[:1])
    macs = count_macs(meta_denoiser(sampler.denoiser), sampler.denoiser_inputs(args.res))
    slots = {slot.file_key: slot for slot in find_slots(sampler.denoiser, family.slot_rules).values()}
    return lambda configuration: tera_bops(macs, slots, configuration)


def learned(path, args, family, avg_bits):
    from autobuild import predictor_file
    from autobuild.scores import LearnedScores

    if set(args.methods) != set(spaces.NAMES):
        raise InputError(f"--methods: a predictor knows {', '.join(spaces.NAMES)}; leave it out, or give --scores none")
    space, states, told = predictor_file.load(path, family.name)
    space = restricted(space, args)
    check_avg_bits(space, avg_bits)
    print(f"{path}: learned {told['target']} from {told['rows']} rows")
    return LearnedScores(space, states)


def check_avg_bits(space, avg_bits):
    from autobuild.search import spare_bytes

    if avg_bits is not None:
        spare_bytes(space, avg_bits, space.smallest_bytes)


def measured(args, family, avg_bits):
    """What each weight's methods do to the denoiser's output: search space, changes [W, M] and shifts [W, M, K] of it, and
    what share of the shifts' inner products is noise.

    What flags and small files tell to be wrong is told before the pipeline is read, and it is not where all is known.
    """
    family = in_precision(family, args.dtype)
    device, prompts = pick_device(args.device), prompts_for(args, family)
    hand_over = family.refiner.hand_over if getattr(args, "refiner_id", None) else None
    args |= {"refiner_id": None}  # it is never asked
    check_sampling(args, family, device)
    entries = multi_chkpt.read(args.multi_chkpt, family)
    told = {
        "prompts_key": prompt_files.key(prompts),
        "multiquantizer_key": multi_chkpt.key(args.multi_chkpt, family),
        "hand_over": hand_over,
    }
    if entries is not None:
        check_avg_bits(space_of(args, family, entries), avg_bits)
    check_writable(args.sensitivity)
    records = RecordFile(args.sensitivity, probe_settings(args, args.methods) | flags_of(args | told))
    keys = spaces.graph_and_keys(family.name)[1]
    known = Measured(records, [[each[0]] for each in keys], ["sketch"])
    if entries is None or not known.is_complete:
        with library_notes(Once(tqdm.write)):
            entries = measure_missing(args, family, hand_over, device, prompts, keys, known)
    changes, shifts, shrinkage = known.result()
    return space_of(args, family, entries), changes.numpy(), shifts.numpy(), shrinkage


def space_of(args, family, entries):
    """The search space of a multiquantizer's entries, as flags restrict it."""
    return restricted(spaces.of_multiquantizer(family, entries, args.multi_chkpt, args.methods), args)


def measure_missing(args, family, hand_over, device, prompts, keys, known):
    """Add to `known`, a Measured, what is missing of the weights `keys`; returns the multiquantizer's entries {file key}."""
    from autobuild.sensitivity import Probe, record_calls

    sampler = load_for(args, family, device, prompts)
    show_steps(sampler)
    model = multi_chkpt.load(args.multi_chkpt, family, sampler.denoiser)
    settings = settings_of(args, hand_over)
    probe = Probe(sampler.denoiser, record_calls(sampler, prompts, settings, args.calls), settings.batch_size)
    parts = by_file_key(model.parts, model.slots)
    for shared in tqdm(keys, desc="fitting", unit="weight", delay=2, leave=False):
        model.fit_weight(parts[shared[0]].slot.tie, args.methods)  # what the multiquantizer lacks of the methods
    entries = by_file_key(model.entries, model.slots)
    weights = [Weight([parts[key] for key in shared], entries[shared[0]]["parameters"]) for shared in keys]
    known.measure(weights, args.methods, probe, args, "weights")
    return entries


def flags_of(known):
    """Those of FLAGS, of all flags and keys, as they are kept."""
    return {flag: str(value) if isinstance(value := known[flag], Path) else value for flag in FLAGS}
