"""Memory that nobody needs any more goes back to the system."""

import contextlib
import ctypes
import gc

import torch


def return_free_memory():
    """Give back what Python, the C library and CUDA's allocator keep of freed memory.

    What is in use lies scattered in it, so without this it would grow, and others could not have it.
    """
    gc.collect()  # a model and its layers refer to one another
    trim()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def trim():
    """Give back what the C library keeps of freed memory."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only GNU's C library has a call for that
        ctypes.CDLL(None).malloc_trim(0)
