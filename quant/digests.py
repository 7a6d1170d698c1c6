"""Digests of what files hold: kept in them, and compared when they are read, so that not one bit changes unnoticed.

BLAKE2b of 128 bits, which hashes about a gigabyte a second on each core. Files of safetensors keep those of their
tensors, {name: digest}, in their metadata.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors import safe_open

from errors import InputError, first_line

METADATA = "qua2sedimo_digests"
DIGEST_BYTES = 16
MOST_THREADS = 8


def digest_of(*values):
    """The digest (hexadecimal) of plain data: tensors, dictionaries, lists, numbers and strings, told apart by type."""
    running = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for value in values:
        _feed(running, value)
    return running.hexdigest()


def _feed(running, value):
    if torch.is_tensor(value):
        value = value.detach().cpu().contiguous()
        _feed(running, f"{value.dtype} {tuple(value.shape)}")
        running.update(value.reshape(-1).view(torch.uint8).numpy())
        return
    if isinstance(value, dict | list | tuple):
        _feed(running, f"{type(value).__name__} {len(value)}")
        for each in value.items() if isinstance(value, dict) else value:
            _feed(running, each)
        return
    text = repr(value).encode()
    running.update(f"{type(value).__name__} {len(text)} ".encode() + text)


def digests_of(tensors):
    """{name: digest of the name and the tensor} of {name: tensor}, several side by side."""
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(digest_of, tensors, tensors.values()), strict=True))


def metadata_of(tensors):
    """What a safetensors file of these tensors, or of some of them, is to have in its metadata."""
    return {METADATA: json.dumps(digests_of(tensors))}


def check_file(path):
    """InputError, naming it, if a tensor in a safetensors file is not what was saved; reads the file once, mapped."""
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get(METADATA, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dictionary
    except Exception as reason:  # of types of its own
        raise InputError(f"{path}: cannot be read ({first_line(reason)})") from None
    if not isinstance(told, dict):
        raise InputError(f"{path}: has no digests of its tensors; it is damaged, or no file of a packed model: get it again")
    for name, found in digests_of(tensors).items():
        if told.get(name) != found:
            raise InputError(f"{path}: {name[:200]} is damaged; get the file again")
