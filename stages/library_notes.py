"""What libraries have to say while a program works: each note once, in one line, and where it is wanted."""

import contextlib
import logging
import warnings

from stages.common import log

PRINTING = ("diffusers", "transformers", "torch", "huggingface_hub")  # loggers that print by themselves
NOT_SAID = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # to programmers


class Once:
    """Gives each note to `write`, an equal one never again."""

    def __init__(self, write):
        self.write, self.said = write, set()

    def __call__(self, note):
        if note not in self.said:
            self.said.add(note)
            self.write(note)


def into_run_log(note):
    """Write a line into the run's log, and not to the screen."""
    record = log.makeRecord(log.name, logging.WARNING, "", 0, note, (), None)
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


@contextlib.contextmanager
def notes_in_run_log(folder):
    """What libraries have to say goes into the log of the run in `folder`; at its end the screen tells how much."""
    notes = Once(into_run_log)
    with library_notes(notes):
        yield
    if notes.said:
        log.info("warnings of libraries: %d, in %s", len(notes.said), folder / "run.log")


@contextlib.contextmanager
def library_notes(keep):
    """Warnings of Python and of libraries' loggers go to `keep`, one line each, instead of to the screen."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: keep(f"{record.name}: {_one_line(record.getMessage())}")
    handler.addFilter(lambda record: record.name != log.name)
    loggers = [logging.getLogger(name) for name in PRINTING]
    before = [each.handlers for each in loggers]
    logging.root.addHandler(handler)
    for each in loggers:
        each.handlers = [] if each.propagate else [handler]
    try:
        with warnings.catch_warnings():
            _say_all_but(NOT_SAID)
            warnings.showwarning = lambda message, category, file, line, *_: keep(
                f"{file}:{line}: {category.__name__}: {_one_line(message)}"
            )
            yield
    finally:
        logging.root.removeHandler(handler)
        for each, handlers in zip(loggers, before, strict=True):
            each.handlers = handlers


def _say_all_but(categories):
    """Each warning once where it comes from, whatever filters there are."""
    warnings.resetwarnings()
    for category in categories:
        warnings.simplefilter("ignore", category)


def _one_line(text):
    return " ".join(str(text).split())
