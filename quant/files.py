"""Files that survive a crash and pickles that cannot run code."""

import contextlib
import functools
import io
import logging
import os
import pickle
import tempfile
import zipfile
from pathlib import Path

import torch
from PIL import Image

from errors import InputError, first_line, system_reason
from quant import plain_pickle
from quant.leftovers import hold, remove_leftovers_once, temporary_file, temporary_folder

PROBE_BYTES = 2**20
log = logging.getLogger("qua2sedimo")


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that takes the place of `path` once written and synced, or not at all: InputError, naming it."""
    path, temporary = Path(path), None
    try:
        _reach(path)
        remove_leftovers_once(path.parent)
        handle, temporary = temporary_file(path)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not hold(file.fileno()):  # Windows renames no open file
                file.close()
            with contextlib.suppress(OSError):  # file systems without modes
                os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as reason:
        refused = system_error(reason, temporary)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if refused is None:
            raise
        raise InputError(f"{_unwritten(path, refused)}; what was there before is kept") from reason


@contextlib.contextmanager
def atomic_folder(path, is_whole):
    """A new folder that takes the place of `path` once it is filled, unless what is there by then `is_whole(path)`.

    Other processes that make the same folder meanwhile are not disturbed: the first one's stays. InputError, naming it.
    """
    path = Path(path)
    try:
        _reach(path)
        remove_leftovers_once(path.parent)
        with temporary_folder(path) as new:
            yield new
            os.chmod(new, 0o777 & ~_umask())
            _sync_folder(new)
            _put_folder(new, path, is_whole)
        _sync_folder(path.parent)
    except OSError as reason:
        raise InputError(_unwritten(path, reason)) from reason


def _put_folder(new, path, is_whole):
    with contextlib.suppress(OSError):  # no folder is renamed to one that has something in it
        os.rename(new, path)
        return
    if not is_whole(path):
        with temporary_folder(path) as old:
            os.rename(path, old / path.name)
            os.rename(new, path)


def check_writable(path):
    """InputError unless a file can be written at `path`: to be told before long work rather than after."""
    path = Path(path)
    try:
        _reach(path)
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name a file")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as reason:
        raise InputError(_unwritten(path, reason)) from reason


def _reach(path):
    """Make the folder of `path`; OSError if the path is none that a file can have, as one too long is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        path.stat()


def _unwritten(path, reason):
    return f"{path}: cannot be written ({system_reason(reason)})"


def system_error(reason, temporary):
    """The OSError that writing `temporary`, a file to be thrown away, failed by; None if something else went wrong.

    Libraries put their own errors in the place of the system's, so a bit more is written to hear it again.
    """
    if isinstance(reason, OSError) and reason.errno is not None:
        return reason
    if isinstance(reason, Exception) and not isinstance(reason, InputError) and temporary is not None:
        try:
            with open(temporary, "ab") as file:
                file.write(bytes(PROBE_BYTES))
                os.fsync(file.fileno())
        except OSError as refused:
            return refused
    return reason if isinstance(reason, OSError) else None


def _sync_folder(folder):
    """Make a renaming in `folder` outlast a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def cache_folder():
    """Where computed things are kept between runs: $QUA2SEDIMO_CACHE, else ~/.cache/qua2sedimo.

    Where there is no home, or it cannot be written to, a folder among the temporary files, which is said.
    """
    chosen = os.environ.get("QUA2SEDIMO_CACHE")
    return Path(chosen) if chosen and chosen.strip() else _own_cache_folder()


@functools.cache
def _own_cache_folder():
    with contextlib.suppress(RuntimeError, InputError):  # RuntimeError: no home
        folder = Path.home() / ".cache" / "qua2sedimo"
        check_writable(folder / "x")
        return folder
    user = os.getuid() if hasattr(os, "getuid") else "cache"
    folder = Path(tempfile.gettempdir()) / f"qua2sedimo-{user}"
    check_writable(folder / "x")
    log.warning("there is no home folder to write to: what is computed is kept in %s; set QUA2SEDIMO_CACHE", folder)
    return folder


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_pickle(path):
    """The plain Python data in the pickle at `path`; anything else in it is refused unexecuted."""
    _check_is_file(path)
    try:
        return plain_pickle.loads(Path(path).read_bytes())
    except (OSError, ValueError) as reason:
        raise InputError(f"{path}: not a readable pickle ({first_line(reason)})") from None


def _check_is_file(path):
    if not Path(path).is_file():
        raise InputError(f"{str(path) or 'an empty name'}: no such file")


def save_pickle(data, path):
    """Write plain data as a pickle, whole or not at all; see `atomic_write` for errors."""
    with atomic_write(path) as file:
        pickle.dump(data, file, protocol=4)


def save_text(text, path):
    """Write text in UTF-8, whole or not at all; see `atomic_write` for errors."""
    with atomic_write(path) as file:
        file.write(text.encode())


def save_png(image, path):
    """Write an image, an array uint8 [H, W, 3] or Pillow's own, whole or not at all."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with atomic_write(path) as file:
        image.save(file, "PNG")


def save_checkpoint(content, path):
    """Write tensors, numbers and strings as a torch file, whole or not at all; see `atomic_write` for errors.

    They are written to memory first: of an interrupt in the midst of it torch's writer would make an error of its own.
    """
    memory = io.BytesIO()
    torch.save(content, memory)
    with atomic_write(path) as file:
        file.write(memory.getbuffer())


def load_checkpoint(path, lazily=False):
    """The tensors, numbers and strings in the torch file at `path`; never runs code from it.

    `lazily` reads tensors when they are used.
    """
    _check_is_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=lazily and zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise InputError(f"{path}: not a readable checkpoint of tensors, numbers and strings alone") from None
    except Exception as reason:  # truncated archives raise many types
        raise InputError(f"{path}: not a readable checkpoint ({first_line(reason)})") from None
