"""A lock on a folder that ends with its process, on any file system.

The system's own lock (flock) is let go of when its process ends, however it ends. Some file systems have none, nor has
Windows: there a file says which process holds the folder, and whether that process still lives is looked up.
"""

import contextlib
import json
import logging
import os
import socket
import time

import psutil

from errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK, PID = "run.lock", "run.pid"
SAME_PROCESS_SECONDS = 60  # clocks are set meanwhile; a process that began further apart has inherited the number
log = logging.getLogger("qua2sedimo")


@contextlib.contextmanager
def locked(folder):
    """Hold `folder` for this process; InputError, naming the other, while another holds it."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context((folder / LOCK).open("a+", encoding="utf-8"))
        refusal = _lock(file, folder)
        if refusal is None:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        else:
            log.warning("%s: cannot be locked (%s); its %s says who is at work here", folder, refusal, PID)
            stack.enter_context(_held_by_file(folder / PID))
        yield
        if not _is_still_there(file, folder / LOCK):
            raise InputError(f"{folder}: was deleted, moved or replaced while this run wrote to it; run it again")


def _is_still_there(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(file, folder):
    """Have the system lock the file; returns why it does not, None where it does."""
    if fcntl is None:
        return "this system has no flock"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # some network file systems say the second
        file.seek(0)
        raise _busy(folder, file.read()) from None
    except OSError as reason:
        return reason.strerror
    return None


@contextlib.contextmanager
def _held_by_file(path):
    own = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time()})
    while not _create(path, own):
        _remove_if_left(path)
    try:
        yield
    finally:
        if _read(path) == own:
            path.unlink(missing_ok=True)


def _create(path, text):
    """Write a new file; False if there is one."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _remove_if_left(path):
    """Remove the file of a process that is gone; InputError if the process lives, or nobody here can tell."""
    text = _read(path)
    holder = _holder(text)
    if holder is not None and _may_live(holder):
        way_out = "" if holder["host"] == socket.gethostname() else f"; if it is not, delete {path}"
        raise _busy(path.parent, f"process {holder['process']} on {holder['host']}", way_out)
    taken = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):  # another was quicker
        os.replace(path, taken)
        if _read(taken) != text:  # another was quicker, and this is its own
            os.replace(taken, path)
        taken.unlink(missing_ok=True)


def _read(path):
    """The text of the file, for whose writer to finish is waited a little."""
    for _ in range(10):
        try:
            if text := path.read_text(encoding="utf-8"):
                return text
        except (OSError, ValueError):
            return ""
        time.sleep(0.02)
    return ""


def _holder(text):
    """Who holds the folder; None if the text does not say, as where its writer was cut off."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        holder = json.loads(text)
        return {"process": int(holder["process"]), "host": str(holder["host"]), "started": float(holder["started"])}
    return None


def _may_live(holder):
    """Whether a process may be running: it is on another machine, or here, and began when it says."""
    if holder["host"] != socket.gethostname():
        return True
    try:
        process = psutil.Process(holder["process"])
        same = abs(process.create_time() - holder["started"]) < SAME_PROCESS_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except psutil.Error:
        return False


def _busy(folder, who, way_out=""):
    return InputError(f"{folder}: {who or 'another process'} is at work here; give another --outdir{way_out}")
