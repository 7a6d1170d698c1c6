"""Files that survive a crash and pickles that cannot run code."""

import contextlib
import io
import os
import pickle
import tempfile
import zipfile
from pathlib import Path

import torch

from errors import InputError, first_line

TEMPORARY = ".tmp"


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that takes the place of `path` once written and synced, or not at all: InputError, naming it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as reason:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(reason, OSError):
            raise InputError(f"{path}: cannot be written ({reason.strerror}); what was there before is kept") from None
        raise


def check_writable(path):
    """InputError unless a file can be written at `path`: told before the work that is to be kept there."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as reason:
        raise InputError(f"{path}: cannot be written ({reason.strerror})") from None


def remove_leftovers(folder):
    """Delete what writers that were killed have left below `folder`, where nothing else is writing."""
    for path in Path(folder).rglob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _PlainUnpickler(pickle.Unpickler):
    """Admits containers, numbers and strings, which need no imports, and nothing else."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only plain Python data is read")


def load_pickle(path):
    """The plain Python data in the pickle at `path`; anything else in it is refused unexecuted."""
    _check_is_file(path)
    try:
        return _PlainUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    except Exception as reason:  # a damaged pickle can raise almost anything
        raise InputError(f"{path}: not a readable pickle ({first_line(reason)})") from None


def _check_is_file(path):
    if not Path(path).is_file():
        raise InputError(f"{str(path) or 'an empty name'}: no such file")


def save_pickle(data, path):
    with atomic_write(path) as file:
        pickle.dump(data, file, protocol=4)


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
