"""Temporary files: made beside what they are to become, held while they are written, removed once nobody holds them.

A writer locks its temporary file (flock). The lock ends with its process, however that ends, so a file that can be
locked is one that a kill has left behind.
"""

import contextlib
import functools
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEMPORARY = ".tmp"
OWN = re.compile(r"\..{0,40}\.[a-z0-9_]{8}\.tmp", re.DOTALL)  # as `temporary_file` names them
OLD_SECONDS = 24 * 3600  # where nothing can be locked, nothing is written for so long


def temporary_file(path):
    """(handle, path) of a new file beside `path`, held until the handle is closed."""
    while True:
        handle, temporary = tempfile.mkstemp(**_place(path))
        hold(handle)
        if _is_at(handle, temporary):
            return handle, temporary
        os.close(handle)  # somebody who cleans up was quicker than the lock


@contextlib.contextmanager
def temporary_folder(path):
    """A new folder beside `path`, held and in the end removed, unless it was given another name."""
    while True:
        folder = tempfile.mkdtemp(**_place(path))
        handle = os.open(folder, os.O_RDONLY) if fcntl else None
        if handle is None or (hold(handle), _is_at(handle, folder))[1]:
            break
        os.close(handle)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _place(path):
    return {"dir": path.parent, "prefix": f".{path.name[:40]}.", "suffix": TEMPORARY}


def hold(handle):
    """Lock an open file as one that is being written; False where it cannot be, or another holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (AttributeError, OSError):
        return False
    return True


def _is_at(handle, path):
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def remove_leftovers(folder, below=True):
    """Delete what writers that were killed have left in `folder`, and `below` it; what is being written stays."""
    folder = Path(folder)
    for path in (folder.rglob if below else folder.glob)(f".*{TEMPORARY}"):
        if OWN.fullmatch(path.name) and _is_left(path):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@functools.cache
def remove_leftovers_once(folder):
    """The same in `folder` alone, the first time that this process asks for it."""
    with contextlib.suppress(OSError):
        remove_leftovers(folder, below=False)


def _is_left(path):
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except (AttributeError, OSError):
        return time.time() - os.fstat(handle).st_mtime > OLD_SECONDS
    finally:
        os.close(handle)
