"""The one exception that scripts show as a single line instead of a traceback."""


class InputError(Exception):
    """Something the user gave is wrong; the message names the file, layer or flag, and the way out."""
