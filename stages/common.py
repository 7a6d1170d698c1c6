"""What the three stages share: flags, and the one-line end of a bad run."""

import argparse
import dataclasses
import importlib.util
import logging
import math
import sys
import time
import warnings
from pathlib import Path

import diffusers
import torch

from errors import InputError
from models.families import FAMILIES
from models.lora import open_lora
from models.pipelines import is_embedded
from models.single_file import SUFFIXES

log = logging.getLogger("qua2sedimo")
PRECISIONS = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32")}


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
    own = str(family.dtype).removeprefix("torch.")
    parser.add_argument("--dtype", choices=list(PRECISIONS), help=f"precision of the weights; default {own}")
    parser.add_argument(
        "--lora",
        nargs="+",
        default=[],
        metavar="PATH_OR_ID[:SCALE]",
        help="LoRA adapters, fused into the weights before anything else",
    )
    return parser


def in_precision(family, dtype_name):
    """The family with its weights in the precision that --dtype names; None leaves its own."""
    return family if dtype_name is None else dataclasses.replace(family, dtype=PRECISIONS[dtype_name])


def model_help(family):
    single_file = "single file, " if hasattr(getattr(diffusers, family.pipeline), "from_single_file") else ""
    return f"{single_file}Hub id, local folder, or `embedded` (works offline); default {family.model_id}"


def add_flag(parser, family, flag, **settings):
    """Add a flag under its name and the other names that the family has for it."""
    parser.add_argument(flag, *(alias for name, alias in family.aliases if name == flag), dest=flag.strip("-"), **settings)


def multiquantizer_of(args, family):
    """Where the multiquantizer of the flags' model stands by default; adapters and another precision are in its name."""
    path = multiquantizer_path(family, args.model_id)
    changes = [open_lora(each).name for each in args.lora]
    if family.dtype != FAMILIES[family.name].dtype:
        changes.append(args.dtype)
    return path.with_name("_".join([path.name.removesuffix("_mq.pt"), *changes, "mq.pt"]))


def multiquantizer_path(family, model_id):
    """Where a model's multiquantizer stands by default: its own name in it unless it is the family's own."""
    if model_id == family.model_id:
        suffix = ""
    elif is_embedded(family, model_id):
        suffix = "_embedded"
    else:
        path = Path(model_id)
        suffix = f"_{path.stem if path.suffix.lower() in SUFFIXES else path.name}"
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
    except KeyboardInterrupt as stop:
        way_on = stop.args[0] if stop.args else "the same command goes on"
        print(f"stopped after {time.monotonic() - start:.0f} s; {way_on}", file=sys.stderr)
        sys.exit(130)
