"""The one exception that scripts show as a single line instead of a traceback, and how to fit others into one."""


class InputError(Exception):
    """Something the user gave is wrong; the message names the file, layer or flag, and the way out."""


def first_line(reason, limit=200):
    """The first line of an exception's message, or its type's name where it has none."""
    return (str(reason).strip() or type(reason).__name__).splitlines()[0][:limit]
