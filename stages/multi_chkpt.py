"""The multiquantizer that --multi_chkpt names, read for a family's denoiser."""

import hashlib
from pathlib import Path

from errors import InputError
from quant import multiquantizer
from quant.model import QuantizedModel


def load(path, family, denoiser):
    """The denoiser as a QuantizedModel with the multiquantizer at `path`; see `multiquantizer.load`."""
    check_exists(path, family)
    model = QuantizedModel(denoiser, **family.quantization)
    try:
        return multiquantizer.load(path, model)
    except InputError as reason:
        raise InputError(f"{reason}; make its own with `{command(family)}`") from None


def read(path, family):
    """The entries in the file, of whatever weights; see `multiquantizer.read`."""
    check_exists(path, family)
    return multiquantizer.read(path, family.name)


def key(path, family):
    """A hash of the file's bytes."""
    check_exists(path, family)
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def check_exists(path, family):
    if not Path(path).is_file():
        raise InputError(
            f"{path}: no such multiquantizer; make it with `{command(family)}` (and the same --model_id), or name another "
            "with --multi_chkpt"
        )


def command(family):
    return f"python scripts/{family.name}_multiquantizer.py"
