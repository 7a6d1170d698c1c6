"""How a script is run: its flags are read, and whatever ends it is told in one line.

Imports nothing heavy, so that a failure to import what is heavy is told like any other.
"""

import argparse
import contextlib
import importlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path

from errors import RUST_PANIC, InputError, first_line, lack_of_memory, system_reason
from stages.flags import Flags

DEBUG = "--debug"
BROKEN_PIPE, INTERRUPTED, TERMINATED = 141, 130, 143  # exit codes, as shells have them
# What makes a run take less memory, in the order in which to try it: flag, how it is said, values that are it already.
LESS_MEMORY = (
    ("--batch_size", "a smaller --batch_size", (1,)),
    ("--workers", "fewer --workers", (None, 1)),
    ("--offload", "--offload model or sequential", ("sequential",)),
    ("--pack", "--pack", (True,)),
    ("--no_refiner", "--no_refiner", (True,)),
    ("--vae_tiling", "--vae_tiling", (True,)),
    ("--res", "a smaller --res", ()),
    ("--device", "--device cpu", ("cpu",)),
)
TAKE_HOST_MEMORY = ("--offload", "--device")  # instead of a device's


def path(text):
    """Type of a flag that names a file or folder: an empty name, as of a variable that is not set, is none."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one line, as every other bad input is said."""

    latest = None  # of all parsers, the one that read flags last
    flags = Flags({})  # that it read

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register("type", Path, path)
        self.add_argument(
            DEBUG, action="store_true", default=argparse.SUPPRESS, help="where a run ends in an error, show where it is from"
        )

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            try:
                word.encode()
            except UnicodeEncodeError:
                self.error(f"{word!a}: is not UTF-8, as what this program writes is; rename it, or set a UTF-8 locale")
        parsed, left = super().parse_known_args(args, namespace)
        vars(parsed).pop(DEBUG.strip("-"), None)  # `run_main` sees to it, and nothing depends on it
        OneLineParser.latest, self.flags = self, Flags(vars(parsed))
        return parsed, left

    def parse_args(self, args=None, complete=dict):
        """The Flags of a command line; `complete(flags)` {name: value} says what those are that were left out."""
        super().parse_args(args)
        self.flags |= complete(self.flags)
        return self.flags

    def error(self, message):
        raise InputError(f"{message}; see --help")


def run_script(stage, *family_names):
    """Run the `main` of a module of stages/, given the families of these names, as `run_main` has it."""

    def main():
        module = importlib.import_module(f"stages.{stage}")
        from models.families import FAMILIES

        module.main(*(FAMILIES[name] for name in family_names))

    run_main(main)


def run_main(main):
    """Run a script; what ends it is one line and exit code 2, with --debug a traceback before; Ctrl-C is 130.

    SIGTERM, which Slurm and Kubernetes send before they kill, ends it in the same order, with 143. A reader of its output
    that goes away ends it quietly.
    """
    start = time.monotonic()
    heed_sigterm()
    settle_streams()
    silence()
    try:
        settle_home()
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        sys.exit(BROKEN_PIPE)
    except KeyboardInterrupt as stop:
        way_on = stop.args[0] if stop.args else "the same command goes on"
        print(f"stopped after {time.monotonic() - start:.0f} s; {way_on}", file=sys.stderr)
        sys.exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED)
    except BaseException as reason:
        if not isinstance(reason, Exception) and type(reason).__name__ != RUST_PANIC:
            raise
        if DEBUG in sys.argv[1:]:
            show_whole(reason)
        print(f"error: {explanation(reason)}", file=sys.stderr)
        sys.exit(2)


class Terminated(KeyboardInterrupt):
    """SIGTERM has come: whatever saves and ends in order at Ctrl-C does so now."""


def heed_sigterm():
    """Have SIGTERM raise Terminated in this process, once: those that come while it ends do nothing."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(_signal, _frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def silence():
    """Keep off the screen what libraries say that is of no use to a user."""
    warnings.filterwarnings("ignore", module=r"(diffusers|transformers|huggingface_hub)\b")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it keeps its list of fonts


def settle_streams():
    """Output that is closed goes nowhere; what a terminal's encoding has no sign for is shown by its number."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def settle_home():
    """Give libraries a home folder where there is none: without one they make a folder of the name `~` here."""
    if os.path.expanduser("~") == "~":
        home = os.path.join(tempfile.gettempdir(), f"qua2sedimo-{os.getuid()}" if hasattr(os, "getuid") else "qua2sedimo")
        os.environ["USERPROFILE" if os.name == "nt" else "HOME"] = home
        print(f"there is no home folder: {home} takes its place; set HOME, or HF_HOME for models", file=sys.stderr)


def drop_output():
    """Send what is left of the output nowhere, so that Python does not complain at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())


def show_whole(reason):
    """Print the traceback of an exception and of those that it came of, hidden ones too."""
    each = reason
    while each is not None:
        each.__suppress_context__ = each.__cause__ is not None
        each = each.__cause__ or each.__context__
    traceback.print_exception(reason)


def explanation(reason):
    """One line on what ended a run."""
    lack = lack_of_memory(reason)
    if lack is not None:  # first: it makes sound files look damaged
        return f"out of memory ({first_line(lack)}); {advice_on_memory(lack)}"
    if isinstance(reason, InputError):
        return " ".join(str(reason).split("\n"))
    more = "" if DEBUG in sys.argv[1:] else f"; {DEBUG} shows more"
    if isinstance(reason, ImportError):
        return f"{first_line(reason)}; `pip install -e .` in the project's folder installs what it needs{more}"
    if isinstance(reason, OSError) and reason.strerror:
        where = f"{reason.filename}: " if isinstance(reason.filename, str) else ""
        return f"{where}{system_reason(reason)}{more}"
    return f"unexpected {type(reason).__name__}: {first_line(reason)}{more}"


def advice_on_memory(reason):
    """What of the script's own flags, as they were given, would take less of the memory that ran out."""
    host = isinstance(reason, MemoryError | OSError | ImportError) or "CPU" in str(reason)
    parser = OneLineParser.latest
    flags = {} if parser is None else {flag: action.dest for action in parser._actions for flag in action.option_strings}
    helpful = [
        how
        for flag, how, already in LESS_MEMORY
        if flag in flags and parser.flags.get(flags[flag]) not in already and not (host and flag in TAKE_HOST_MEMORY)
    ]
    return f"what takes less: {', '.join(helpful)}" if helpful else "a machine with more memory is needed"
