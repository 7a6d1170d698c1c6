"""Where scores come from, as flags say: a trained predictor, or the denoiser itself, asked without labels.

Asking goes weight by weight and keeps what it has, so an interrupted run goes on.
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from autobuild import space as spaces
from errors import InputError
from models.families import FAMILIES
from models.pipelines import pick_device
from quant import modules, multiquantizer
from quant.storage import atomic_write, load_checkpoint
from stages.common import (
    OneLineParser,
    at_least,
    in_precision,
    parser_for,
)
from stages.eval_random import prompts_for
from stages.sampling import add_sampling_flags, load_for, parse_sampling

# What sensitivities depend on; a run goes on only with the same ones.
FLAGS = ("model_id", "seed", "n_imgs", "calls", "steps", "guidance", "res", "prompts", "multiquantizer_key")
FLAGS += ("scheduler", "negative_prompt", "dtype", "lora_key")


def parser_of(stage, description, argv=None):
    """(family, parser with the flags that say where scores come from)."""
    first = OneLineParser(prog=f"{stage}.py", add_help=False, allow_abbrev=False)
    first.add_argument("--family", choices=list(FAMILIES), required=not {"-h", "--help"} & set(sys.argv[1:]))
    family = FAMILIES[first.parse_known_args(argv)[0].family or next(iter(FAMILIES))]
    parser = parser_for(family, stage, description)
    parser.prog = f"{stage}.py"
    parser.add_argument("--family", choices=list(FAMILIES), required=True)
    parser.add_argument(
        "--labels", required=True, help="predictor of train_predictor.py, or `none`: ask the denoiser itself"
    )
    parser.add_argument("--sensitivity", type=Path, help="with `none`: file of what it said; default beside --multi_chkpt")
    parser.add_argument("--n_imgs", type=at_least(1), default=16, help="with `none`: images on whose way it is asked")
    parser.add_argument("--calls", type=at_least(1), default=5, help="with `none`: steps of that way")
    parser.set_defaults(prompts=None)
    if not family.num_classes:
        parser.add_argument("--prompts", type=Path, help="with `none`: COCO captions, or text; default in constants.py")
    add_sampling_flags(parser, family)
    return family, parser


def parse(parser, family):
    args = parse_sampling(parser, family, guidance="label_guidance")
    args.sensitivity = args.sensitivity or args.multi_chkpt.with_name(f"{args.multi_chkpt.stem}_sensitivity.pt")
    return args


def load_scores(args, family):
    """The scores that --labels asks for."""
    if args.labels != "none":
        return learned(Path(args.labels), family)
    from autobuild.scores import MeasuredScores

    return MeasuredScores(*measured(args, family))


def learned(path, family):
    from autobuild import predictor_file
    from autobuild.scores import LearnedScores

    space, states, told = predictor_file.load(path, family.name)
    print(f"{path}: learned {told['target']} from {told['rows']} rows")
    return LearnedScores(space, states)


def measured(args, family):
    """What each weight's methods do to the denoiser's output: search space, changes [W, M] and shifts [W, M, K] of it."""
    device = pick_device(args.device)
    family = in_precision(family, args.dtype)
    args.multiquantizer_key = multiquantizer.file_key(args.multi_chkpt, family)
    sampler = load_for(args, family, device)
    slots, entries = multiquantizer.load(args.multi_chkpt, sampler.denoiser, family)
    space = spaces.of_multiquantizer(family.name, slots, entries)
    known = read_measured(args)
    left = [place for place, keys in enumerate(space.keys) if keys[0] not in known]
    if left:
        probe = make_probe(args, family, sampler)
        parts = modules.install(sampler.denoiser, family, slots)
        for place in tqdm(left, desc="weights", unit="weight", initial=len(space.keys) - len(left), total=len(space.keys)):
            keys = space.keys[place]
            known[keys[0]] = measure([parts[key] for key in keys], entries[keys[0]]["parameters"], probe)
            with atomic_write(args.sensitivity) as file:
                torch.save({"flags": flags_of(args), "weights": known}, file)
    changes, shifts = zip(*(known[keys[0]] for keys in space.keys), strict=True)
    return space, torch.stack(changes).numpy(), torch.stack(shifts).float().numpy()


def make_probe(args, family, sampler):
    from autobuild.sensitivity import Probe, record_calls

    calls = record_calls(sampler, prompts_for(args, family), args, args.calls)
    return Probe(sampler.denoiser, calls, together=max(1, args.batch_size // len(calls[0].guided)))


def measure(parts, parameters, probe):
    """(changes [M], shifts [M, K]) under the methods of a weight, in all the places where it stands."""
    found = []
    for name in spaces.NAMES:
        for part in parts:
            part.set_method(name, parameters[name])
        found.append(probe.shift())
    for part in parts:
        part.set_method(None)
    changes, shifts = zip(*found, strict=True)
    return torch.tensor(changes, dtype=torch.float64), torch.stack(shifts).half()


def flags_of(args):
    return {flag: str(value) if isinstance(value := getattr(args, flag), Path) else value for flag in FLAGS}


def read_measured(args):
    """{key: (changes, shifts)} that was measured before, with the same flags."""
    if not args.sensitivity.exists():
        return {}
    kept = load_checkpoint(args.sensitivity)
    if not (isinstance(kept, dict) and kept.keys() == {"flags", "weights"}):
        raise InputError(f"{args.sensitivity}: is not what --labels none was told; give another --sensitivity")
    for flag, value in flags_of(args).items():
        if kept["flags"].get(flag) != value:
            raise InputError(
                f"{args.sensitivity}: was measured with {flag} {kept['flags'].get(flag)}, not {value}; "
                "give another --sensitivity"
            )
    return kept["weights"]
