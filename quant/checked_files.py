"""Files with a digest of their content: what a run keeps so that it can go on, and what is cached between runs.

The content is followed by FOOTER and the SHA-256 of the content in hexadecimal digits. A reader gives what was written, or
None: for a file that is not there, is damaged, or was written by something else. Bytes whose digest is wrong reach neither
NumPy nor torch, and of arrays this program reads the headers itself.

JSON, which people read, has its digest in the object, under DIGEST.
"""

import hashlib
import io
import json
import logging
import math
import mmap
import re
import zipfile
from pathlib import Path

import numpy as np
import torch

from quant.files import atomic_write

FOOTER = b"\nsha256 "
DIGEST = "digest"
DIGEST_DIGITS = 16  # of a JSON object's
LARGEST_JSON_BYTES = 2**24
log = logging.getLogger("qua2sedimo")
HEADER = re.compile(
    rb"\{'descr': '([<|](?:b1|u1|i4|i8|f2|f4|f8))', 'fortran_order': (True|False), 'shape': \(([0-9, ]{0,80})\), \} *\n"
)
MAGIC = b"\x93NUMPY\x01\x00"


def write(path, *pieces):
    """Write bytes and their digest, whole or not at all; see `atomic_write` for errors."""
    digest = hashlib.sha256()
    with atomic_write(path) as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
        file.write(FOOTER + digest.hexdigest().encode())


def read(path):
    """The content of a file that `write` wrote, mapped from disk; None for anything else."""
    try:
        with Path(path).open("rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError):  # the second of an empty file
        return None
    content, footer = mapped[: -len(FOOTER) - 64], bytes(mapped[-len(FOOTER) - 64 :])
    if footer != FOOTER + hashlib.sha256(content).hexdigest().encode():
        log.warning("%s: is damaged, or not by this version of the program, and does not count", path)
        return None
    return content


def save_array(array, path):
    """Write an array, as `.npy` files have it."""
    array = np.asarray(array, order="C")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    write(path, header.getbuffer(), array.reshape(-1).view(np.uint8))


def load_array(path):
    """The array that `save_array` wrote, mapped from disk; None for anything else."""
    content = read(path)
    return None if content is None else _array(content)


def save_arrays(arrays, path):
    """Write {name: array}, as `.npz` files have it."""
    memory = io.BytesIO()
    np.savez(memory, **arrays)
    write(path, memory.getbuffer())


def load_arrays(path):
    """{name: array} that `save_arrays` wrote; None for anything else."""
    content = read(path)
    if content is None:
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            arrays = {name.removesuffix(".npy"): _array(memoryview(archive.read(name))) for name in archive.namelist()}
    except Exception:  # of archives that are none, whatever zipfile raises
        return None
    return None if any(array is None for array in arrays.values()) else arrays


def _array(content):
    """The array in the bytes of an `.npy` file; None if they are not as `numpy.save` writes plain numbers."""
    start = len(MAGIC) + 2
    values = start + int.from_bytes(content[len(MAGIC) : start], "little")
    header = HEADER.fullmatch(bytes(content[start:values]))
    if bytes(content[: len(MAGIC)]) != MAGIC or header is None:
        return None
    dtype = np.dtype(header[1].decode())
    shape = tuple(int(length) for length in header[3].split(b",") if length.strip())
    if len(content) - values != math.prod(shape) * dtype.itemsize:
        return None
    return np.frombuffer(content, dtype, offset=values).reshape(shape, order="F" if header[2] == b"True" else "C")


def are_arrays(arrays, kinds, count=None):
    """Whether each of `arrays` {name: array} is of the kind that `kinds` {name: (kind of dtype, dimensions)} says.

    Each has `count` rows if that is given, and names beyond `kinds` are none of ours.
    """
    return isinstance(arrays, dict) and all(
        name in kinds
        and (array.dtype.kind, array.ndim) == kinds[name]
        and (count is None or (array.ndim > 0 and len(array) == count))
        for name, array in arrays.items()
    )


def save_content(content, path):
    """Write tensors, numbers and strings, as torch files have them."""
    memory = io.BytesIO()
    torch.save(content, memory)
    write(path, memory.getbuffer())


def load_content(path):
    """What `save_content` wrote; None for anything else. Never runs code from the file."""
    content = read(path)
    if content is None:
        return None
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # whatever torch raises
        return None


def with_digest(told):
    """The JSON object `told` with its digest, which `from_json` checks."""
    return told | {DIGEST: _digest(told)}


def from_json(text):
    """The object in JSON text without its digest; None if that is wrong, or the text no object at all.

    Objects of earlier versions have none, nor any other text in them than their names.
    """
    try:
        told = json.loads(text) if len(text) <= LARGEST_JSON_BYTES else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(told, dict):
        return None
    if DIGEST not in told:
        return told if all(value is None or is_number(value) for value in told.values()) else None
    digest = told.pop(DIGEST)
    try:
        return told if digest == _digest(told) else None
    except (ValueError, RecursionError):
        return None


def _digest(told):
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:DIGEST_DIGITS]


def is_number(value):
    """Whether a value from a file is a number of a size that floats have, or NaN."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)
