"""A run's folder: held by one run at a time, with its log and the settings it was started with."""

import contextlib
import fcntl
import logging
import os
import socket
import time
from datetime import datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from errors import InputError
from quant.storage import atomic_write
from stages.common import log


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
    """Hold `folder` for this process; InputError, naming the other, while another run holds it.

    The system lets go of the lock when its process ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "run.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{folder}: {file.read() or 'another process'} is at work here; give another --outdir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def start_log(folder):
    """Log to the screen and to `run.log` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    for handler in (logging.StreamHandler(), logging.FileHandler(folder / "run.log")):
        handler.setFormatter(formatter)
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk: the run ends by itself where a result cannot be kept


def written(args):
    """The flags as `save_settings` writes them, {name: value}."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def save_settings(args, path):
    """Write the run's flags, all of them, as YAML."""
    settings = written(args)
    with atomic_write(path) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(settings)).encode())


def read_settings(path):
    """The flags that a run was started with, as `save_settings` wrote them."""
    try:
        settings = OmegaConf.load(path)
    except Exception as reason:  # the YAML reader raises many types
        settings = type(reason).__name__
    if not isinstance(settings, DictConfig) or "seed" not in settings:
        raise InputError(f"{path}: damaged; move it and the labels beside it away, or give another --outdir")
    return settings
