"""What the three stages share: flags, and the one-line end of a bad run."""

import argparse
import importlib.util
import logging
import math
import sys
import time
import warnings
from pathlib import Path

from errors import InputError
from models.families import FAMILIES
from models.pipelines import SINGLE_FILES, defaults, is_embedded, load_sampler, refiner_of

log = logging.getLogger("qua2sedimo")
RESOLUTION_STEP = 16  # pixels: the autoencoders' 8 times the transformers' patches of 2


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one line, as every other bad input is said."""

    def error(self, message):
        raise InputError(f"{message}; see --help")


def parser_for(family, stage, description):
    """A parser with the flags that every stage has."""
    parser = OneLineParser(
        prog=f"{family.name}_{stage}.py", description=f"{family.title}: {description}", allow_abbrev=False
    )
    add_flag(parser, family, "--model_id", default=family.model_id, help=model_help(family))
    parser.add_argument("--device", help="cuda, cuda:1, cpu ...; default: CUDA where there is one, else the CPU")
    parser.add_argument("--seed", type=seed, default=42, help="seed of everything random")
    return parser


def model_help(family):
    single_file = "single .ckpt file, " if family.model_id.endswith(SINGLE_FILES) else ""
    return f"{single_file}Hub id, local folder, or `embedded` (works offline)"


def add_flag(parser, family, flag, **settings):
    """Add a flag under its name and the other names that the family has for it."""
    parser.add_argument(flag, *(alias for name, alias in family.aliases if name == flag), dest=flag.strip("-"), **settings)


def add_sampling_flags(parser, family):
    """The flags of the stages that make images."""
    parser.add_argument("--res", type=at_least(1), help=f"pixels per side; default {family.resolution}, embedded its own")
    add_flag(parser, family, "--steps", type=at_least(1), help="sampler steps; default the model's")
    add_flag(parser, family, "--guidance", type=finite, help="guidance scale; default the model's")
    parser.add_argument("--batch_size", type=at_least(1), help="images generated together; default the model's")
    parser.add_argument("--multi_chkpt", type=Path, help=f"multiquantizer; default multiquantizers/{family.name}_mq.pt")
    if any(flag == "--eta" for flag, _ in family.aliases):
        add_flag(parser, family, "--eta", type=finite, default=0.0, help="must be 0: the sampler is PLMS")
    if family.refiner:
        parser.add_argument("--refiner_id", help=f"Hub id or folder of the refiner; default {family.refiner.model_id}")
        parser.add_argument("--no_refiner", action="store_true", help="leave the refiner out")


def parse_sampling(parser, family, guidance="guidance"):
    """The parsed flags, those left out filled from the model's row, whose guidance stands in the column named."""
    args = parser.parse_args()
    row = defaults(family, args.model_id)
    args.steps = args.steps or row.steps
    args.batch_size = args.batch_size or row.batch_size
    args.res = args.res or (None if family.num_classes else row.resolution)
    if args.guidance is None:
        args.guidance = row.guidance if getattr(row, guidance) is None else getattr(row, guidance)
    args.multi_chkpt = args.multi_chkpt or multiquantizer_path(family, args.model_id)
    if family.refiner:
        args.refiner_id = None if args.no_refiner else args.refiner_id or refiner_of(family, args.model_id)
    if getattr(args, "eta", 0):
        raise InputError(f"--eta {args.eta}: {family.title} is sampled with PLMS, which draws no noise; leave it at 0")
    return args


def load_for(args, family, device, text_encoders=True):
    """The sampler that the flags ask for; InputError if a flag is not for this model."""
    sampler = load_sampler(family, args.model_id, device, getattr(args, "refiner_id", None), text_encoders)
    own = sampler.native_resolution
    if not sampler.takes_resolution and args.res not in (None, own):
        raise InputError(f"--res {args.res}: {args.model_id} makes images of {own} px only")
    if args.res and args.res % RESOLUTION_STEP:
        raise InputError(f"--res {args.res}: is not a multiple of {RESOLUTION_STEP}")
    if args.steps < family.least_steps:
        raise InputError(f"--steps {args.steps}: {family.title} needs at least {family.least_steps}")
    longest = sampler.pipeline.scheduler.config.num_train_timesteps
    if args.steps > longest:
        raise InputError(f"--steps {args.steps}: {args.model_id} has {longest} noise levels to step through")
    return sampler


def multiquantizer_path(family, model_id):
    """Where a model's multiquantizer stands by default: its own name in it unless it is the family's own."""
    if model_id == family.model_id:
        suffix = ""
    elif is_embedded(family, model_id):
        suffix = "_embedded"
    else:
        path = Path(model_id)
        suffix = f"_{path.stem if path.suffix in SINGLE_FILES else path.name}"
    return Path("multiquantizers") / f"{family.name}{suffix}_mq.pt"


def seed(text):
    """Type of a flag that seeds random numbers."""
    number = int(text)
    if not 0 <= number < 2**62:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 2^62")
    return number


def finite(text):
    """Type of a flag that is an ordinary number."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


def at_least(least):
    """Type of a flag that counts something."""

    def count(text):
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is not at least {least}")
        return number

    return count


def share(text):
    """Type of a flag between 0 and 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 1")
    return number


def check_extra(package, extra, what):
    """InputError unless `package`, of an extra of this project, is installed; `what` says what needs it."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{what}: pip install -e '.[{extra}]'")


def run_stage(stage, family_name):
    """Run a stage's `main` for a family as `run_main` has it."""
    run_main(lambda: stage(FAMILIES[family_name]))


def run_main(main):
    """Run a script; bad input ends with one line and exit code 2, Ctrl-C with 130."""
    warnings.filterwarnings("ignore", module=r"(diffusers|transformers|huggingface_hub)\b")
    start = time.monotonic()
    try:
        main()
    except (InputError, OSError) as reason:
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"stopped after {time.monotonic() - start:.0f} s; the same command goes on", file=sys.stderr)
        sys.exit(130)
