"""A run's folder: held by one run at a time, with its log and the settings it was started with."""

import contextlib
import logging
import time
from datetime import datetime
from pathlib import Path

import yaml

from errors import InputError
from quant.files import atomic_write
from stages.common import log
from stages.flags import Flags
from stages.run_lock import locked


def make_run_folder(outdir):
    """A new folder named by the time."""
    outdir.mkdir(parents=True, exist_ok=True)
    while True:
        folder = outdir / datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
        with contextlib.suppress(FileExistsError):  # of a run that began in the same second
            folder.mkdir()
            return folder
        time.sleep(0.1)


@contextlib.contextmanager
def only_run_in(folder):
    """Hold `folder` for this process; InputError, naming the other, while another run holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        yield


def start_log(folder):
    """Log to the screen and to `run.log` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    file = logging.FileHandler(folder / "run.log", encoding="utf-8", errors="backslashreplace")
    for handler in (logging.StreamHandler(), file):
        handler.setFormatter(formatter)
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk: the run ends by itself where a result cannot be kept


LARGEST_SETTINGS_BYTES = 2**20


def _is_plain(item):
    """Whether a name and its value, from a file, are as flags are: a text, number or the like, or a list of them."""
    name, value = item
    values = value if isinstance(value, list) else [value]
    return isinstance(name, str) and all(isinstance(each, str | int | float | None) for each in values)


class _Dumper(yaml.SafeDumper):
    """Writes strings in quotes, unless they are plain words, so that no reader takes one for anything else."""

    def ignore_aliases(self, data):
        return True

    def represent_text(self, text):
        style = None if text.isidentifier() else "'" if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


def written(flags):
    """The flags {name: value} as `save_settings` writes them."""
    return {name: _plain(value) for name, value in flags.items()}


def _plain(value):
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def save_settings(flags, path):
    """Write the run's flags {name: value}, all of them, as YAML."""
    with atomic_write(path) as file:
        yaml.dump(written(flags), file, _Dumper, encoding="utf-8", allow_unicode=True, sort_keys=False)


def read_settings(path):
    """The Flags that a run was started with, as `save_settings` wrote them: data, in which nothing is looked up."""
    try:
        text = path.read_bytes()
        settings = yaml.safe_load(text) if len(text) <= LARGEST_SETTINGS_BYTES else None
    except Exception:  # of damaged YAML as many types as of the values that it may hold
        settings = None
    if not isinstance(settings, dict) or "seed" not in settings or not all(map(_is_plain, settings.items())):
        raise InputError(f"{path}: damaged; move it and the labels beside it away, or give another --outdir")
    return Flags(settings)
