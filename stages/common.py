"""What the three stages share: flags, and the models that they ask for."""

import argparse
import dataclasses
import hashlib
import importlib.util
import logging
import math
import os
import re
from pathlib import Path

import torch

from errors import InputError
from models.families import FAMILIES
from models.lora import open_lora
from models.pipelines import is_embedded
from models.repository import CHECKPOINTS
from stages.run import OneLineParser

log = logging.getLogger("qua2sedimo")
HUB_ID = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?")
LONGEST_NAME = 60  # characters of a model's name in a file's
PRECISIONS = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32")}


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
    single_file = "single file, " if family.in_one_file else ""
    return f"{single_file}Hub id, local folder, or `embedded` (works offline); default {family.model_id}"


def add_flag(parser, family, flag, **settings):
    """Add a flag under its name and the other names that the family has for it."""
    parser.add_argument(flag, *(alias for name, alias in family.aliases if name == flag), dest=flag.strip("-"), **settings)


def multiquantizer_of(args, family):
    """Where the multiquantizer of the flags' model stands by default; adapters and another precision are in its name."""
    path = multiquantizer_path(family, args.model_id)
    changes = [f"{lora.name}-{short_hash(lora.key)}" for lora in map(open_lora, args.lora)]
    if family.dtype != FAMILIES[family.name].dtype:
        changes.append(args.dtype)
    return path.with_name("_".join([path.name.removesuffix("_mq.pt"), *changes, "mq.pt"]))


def multiquantizer_path(family, model_id):
    """Where a model's multiquantizer stands by default: its own name in it unless it is the family's own.

    Of a Hub id that is the id; of a folder or file its name, and a hash of the whole path: the same names stand in many.
    """
    if str(model_id) == family.model_id:
        suffix = ""
    elif is_embedded(family, model_id):
        suffix = "_embedded"
    elif HUB_ID.fullmatch(str(model_id)) and not Path(model_id).exists():
        suffix = f"_{model_id.replace('/', '--')}"
    else:
        path = Path(model_id).resolve()
        name = path.stem if path.suffix.lower() in CHECKPOINTS else path.name
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:LONGEST_NAME]
        suffix = f"_{readable}-{short_hash(path)}"
    return Path("multiquantizers") / f"{family.name}{suffix}_mq.pt"


def short_hash(name):
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:8]


def seed(text):
    """Type of a flag that seeds random numbers."""
    number = int(text)
    if not 0 <= number < 2**62:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 2^62")
    return number


def utf8(text):
    """Type of a flag that is words, which tokenizers read as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!a} is not UTF-8") from None
    return text


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
