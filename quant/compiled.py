"""Kernels compiled by Numba and kept for the next run wherever there is a place to keep them."""

import contextlib

from numba import njit
from numba.core.caching import FunctionCache


class _Cache(FunctionCache):
    """Numba's own, in which a compiled function that cannot be read or kept is no error: it is compiled anew."""

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


def kernel(**options):
    """`numba.njit` with a cache; without one where neither the source's folder nor the user's can be written to."""

    def compiled(function):
        dispatcher = njit(**options)(function)
        with contextlib.suppress(RuntimeError):  # no place
            dispatcher._cache = _Cache(function)
        return dispatcher

    return compiled
