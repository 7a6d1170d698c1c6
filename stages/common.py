"""What the three stages share: flags, log, run folder, and the one-line end of a bad run."""

import argparse
import logging
import math
import sys
import time
import warnings
from pathlib import Path

from omegaconf import OmegaConf

from errors import InputError
from models.families import FAMILIES
from models.pipelines import is_embedded, native_resolution
from quant.storage import atomic_write

log = logging.getLogger("qua2sedimo")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one line, as every other bad input is said."""

    def error(self, message):
        raise InputError(f"{message}; see --help")


def parser_for(family, stage, description):
    """A parser with the flags that every stage has."""
    parser = OneLineParser(
        prog=f"{family.name}_{stage}.py", description=f"{family.title}: {description}", allow_abbrev=False
    )
    parser.add_argument("--model_id", default=family.model_id, help="Hub id, local folder, or `embedded` (works offline)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu ...; default: CUDA where there is one, else the CPU")
    parser.add_argument("--seed", type=seed, default=42, help="seed of everything random")
    return parser


def add_multi_chkpt(parser, family):
    parser.add_argument("--multi_chkpt", type=Path, help=f"multiquantizer; default multiquantizers/{family.name}_mq.pt")


def multiquantizer_path(family, model_id):
    """Where a model's multiquantizer stands by default: its own name in it unless it is the family's own."""
    if model_id == family.model_id:
        suffix = ""
    else:
        suffix = "_embedded" if is_embedded(family, model_id) else f"_{Path(model_id).name}"
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


def check_fits_model(args, pipeline, family):
    """Raise InputError if --res or --steps is not for this model."""
    own = native_resolution(pipeline, family)
    if getattr(args, "res", None) not in (None, own):
        raise InputError(f"--res {args.res}: {args.model_id} makes images of {own} px only")
    longest = pipeline.scheduler.config.num_train_timesteps
    if getattr(args, "steps", 1) > longest:
        raise InputError(f"--steps {args.steps}: {args.model_id} has {longest} noise levels to step through")


def share(text):
    """Type of a flag between 0 and 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 1")
    return number


def start_log(folder):
    """Log to the screen and to `run.log` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    for handler in (logging.StreamHandler(), logging.FileHandler(folder / "run.log")):
        handler.setFormatter(formatter)
        log.addHandler(handler)
    log.setLevel(logging.INFO)


def save_settings(args, path):
    """Write the run's flags, all of them, as YAML."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    with atomic_write(path) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(settings)).encode())


def run_stage(stage, family_name):
    """Run a stage's `main`; bad input ends with one line and exit code 2, Ctrl-C with 130."""
    warnings.filterwarnings("ignore", module=r"(diffusers|transformers|huggingface_hub)\b")
    start = time.monotonic()
    try:
        stage(FAMILIES[family_name])
    except (InputError, OSError) as reason:
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"stopped after {time.monotonic() - start:.0f} s; the same command goes on", file=sys.stderr)
        sys.exit(130)
