"""The one exception that scripts show as a single line instead of a traceback, and how to fit others into one."""

import errno
import reprlib

NO_MEMORY = (
    "out of memory",  # CUDA, HIP, XPU and MPS
    "not enough memory",
    "allocate memory",  # can't, cannot, could not, unable to, failed to
    "bad_alloc",
    "alloc_failed",  # cuBLAS and its like
    "error_out_of_memory",
)
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # not every system has quotas


RUST_PANIC = "PanicException"  # of tokenizers and safetensors: no Exception, and of no module that could be imported


class InputError(Exception):
    """Something the user gave is wrong; the message names the file, layer or flag, and the way out."""


def first_line(reason, limit=200):
    """The first line of an exception's message, or its type's name where it has none."""
    return (str(reason).strip() or type(reason).__name__).splitlines()[0][:limit]


SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxdict, SHORT.maxlist, SHORT.maxtuple, SHORT.maxstring, SHORT.maxother = 2, 3, 3, 3, 60, 60


def shown(value):
    """What a user's value is called in a message: its repr, shortened however much it holds."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"  # Python refuses to write out the longest
    try:
        return SHORT.repr(value)
    except (ValueError, RecursionError):  # of numbers in it
        return f"a {type(value).__name__}"


def named(value, limit=100):
    """What a file has for a name, in a message: as it is, if it is a text and not too long."""
    return value[:limit] if isinstance(value, str) else shown(value)


def system_reason(reason):
    """What the operating system says by an OSError, in a few words."""
    if reason.errno in DISK_FULL:
        return "the disk, or your share of it, is full"
    return reason.strerror or first_line(reason)


def lacks_memory(reason):
    """Whether an exception says that memory ran out, the host's or a device's, or came of one that does."""
    return lack_of_memory(reason) is not None


def lack_of_memory(reason):
    """The exception that says that memory ran out: this one, or one that it came of, however it hides it; else None."""
    while reason is not None and not _says_no_memory(reason):
        reason = reason.__cause__ or reason.__context__
    return reason


def _says_no_memory(reason):
    if isinstance(reason, MemoryError):
        return True
    if isinstance(reason, OSError) and reason.errno is not None:
        return reason.errno == errno.ENOMEM
    if isinstance(reason, ImportError):
        return "failed to map segment" in str(reason) and "permitted" not in str(reason)
    if any(each.__name__ == "OutOfMemoryError" for each in type(reason).__mro__):  # PyTorch's and Ray's
        return True
    return isinstance(reason, RuntimeError) and any(words in str(reason).lower() for words in NO_MEMORY)
