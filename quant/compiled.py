"""Kernels compiled by Numba and kept for the next run wherever there is a place to keep them."""

import contextlib
import hashlib

from numba import njit
from numba.core.caching import FunctionCache


class _Cache(FunctionCache):
    """Numba's own, in which a compiled function that cannot be read or kept is no error: it is compiled anew.

    Of a kernel made inside a function, what it takes from there tells it from others; where that is another kernel, what
    that one is made of: Numba would take its identity, which no other process has.
    """

    def _index_key(self, sig, codegen):
        return sig, codegen.magic_tuple(), _made_of(self._py_func)

    def load_overload(self, *args):
        try:
            return super().load_overload(*args)
        except Exception:  # a damaged file raises almost anything
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, *args):
        with contextlib.suppress(OSError):  # a full disk
            super().save_overload(*args)


def _made_of(function):
    taken = [cell.cell_contents for cell in function.__closure__ or ()]
    parts = tuple(_made_of(each.py_func) if hasattr(each, "py_func") else repr(each) for each in taken)
    return function.__qualname__, hashlib.sha256(function.__code__.co_code).hexdigest(), parts


def kernel(**options):
    """`numba.njit` with a cache; without one where neither the source's folder nor the user's can be written to."""

    def compiled(function):
        dispatcher = njit(**options)(function)
        with contextlib.suppress(RuntimeError):  # no place
            dispatcher._cache = _Cache(function)
        return dispatcher

    return compiled
