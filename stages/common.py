"""What the three stages share: flags, log, run folder, and the one-line end of a bad run."""

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

from omegaconf import OmegaConf

from errors import InputError
from models.families import FAMILIES
from models.pipelines import is_embedded
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
    parser.add_argument("--seed", type=int, default=42, help="seed of everything random")
    return parser


def add_multi_chkpt(parser, family):
    parser.add_argument("--multi_chkpt", type=Path, help=f"multiquantizer; default multiquantizers/{family.name}_mq.pt")


def multiquantizer_path(family, model_id):
    """Where a model's multiquantizer stands by default."""
    return Path("multiquantizers") / f"{family.name}{'_embedded' if is_embedded(family, model_id) else ''}_mq.pt"


def at_least(least):
    """Type of a flag that counts something."""

    def count(text):
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is not at least {least}")
        return number

    return count


def check_resolution(args, row):
    """Raise InputError if --res is not the resolution that the model is made for."""
    if args.res not in (None, row.resolution):
        raise InputError(f"--res {args.res}: {args.model_id} makes images of {row.resolution} px only")


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
    except InputError as reason:
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"stopped after {time.monotonic() - start:.0f} s; the same command goes on", file=sys.stderr)
        sys.exit(130)
