"""Kernels compiled by Numba and kept for the next run wherever there is a place to keep them.

A compiled function is a file of its own, whose name tells what it was compiled from and for: Numba's own files are numbered
through an index, in which one process may name the file that another has just overwritten with another kernel.
"""

import contextlib
import glob
import hashlib
import os
import pickle
import uuid
from pathlib import Path

from numba import njit
from numba.core.caching import FunctionCache
from numba.core.serialize import dumps

DIGEST_BYTES = 32


class _Cache(FunctionCache):
    """Numba's own, in which a compiled function that cannot be read or kept is no error: it is compiled anew.

    Of a kernel made inside a function, what it takes from there tells it from others; where that is another kernel, what
    that one is made of: Numba would take its identity, which no other process has.
    """

    def __init__(self, function):
        super().__init__(function)
        self._cache_file = _Files(Path(self._cache_path), self._impl.filename_base, self._impl.locator.get_source_stamp())

    def _index_key(self, sig, codegen):
        return sig, codegen.magic_tuple(), _made_of(self._py_func)

    def load_overload(self, *args):
        try:
            return super().load_overload(*args)
        except Exception:  # what was kept by another version of Numba raises almost anything
            return None

    def save_overload(self, *args):
        with contextlib.suppress(OSError):  # a full disk
            super().save_overload(*args)


class _Files:
    """A function's files in `folder`, one for each key, each a SHA-256 and what it is of."""

    def __init__(self, folder, name, stamp):
        self.folder, self.name, self.start = folder, name, f"{name}.{_mark(stamp)}."

    def _path(self, key):
        return self.folder / f"{self.start}{_mark(key)}.nbc"

    def load(self, key):
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        data = content[DIGEST_BYTES:]
        return pickle.loads(data) if hashlib.sha256(data).digest() == content[:DIGEST_BYTES] else None

    def save(self, key, data):
        path, data = self._path(key), dumps(data)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:16]}")
        try:
            temporary.write_bytes(hashlib.sha256(data).digest() + data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        for other in self.folder.glob(f"{glob.escape(self.name)}.*.nbc"):
            if not other.name.startswith(self.start):  # of the source as it was before
                other.unlink(missing_ok=True)

    def flush(self):
        """Nothing: what is damaged is overwritten."""


def _mark(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:24]


def _made_of(function):
    taken = [cell.cell_contents for cell in function.__closure__ or ()]
    parts = tuple(_made_of(each.py_func) if hasattr(each, "py_func") else repr(each) for each in taken)
    return function.__qualname__, hashlib.sha256(function.__code__.co_code).hexdigest(), parts


def kernel(**options):
    """`numba.njit` with a cache; without one where neither the source's folder nor the user's can be written to."""

    def compiled(function):
        if function.__closure__:
            # Or what two processes have kept of two variants would have the same symbols, and one be linked to the other's.
            mark = _mark(_made_of(function))
            function.__name__, function.__qualname__ = f"{function.__name__}_{mark}", f"{function.__qualname__}_{mark}"
        dispatcher = njit(**options)(function)
        with contextlib.suppress(RuntimeError):  # no place
            dispatcher._cache = _Cache(function)
        return dispatcher

    return compiled
