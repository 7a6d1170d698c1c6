"""Digests of what files hold: kept in them, and compared when they are read, so that not one bit changes unnoticed.

BLAKE2b of 128 bits, which hashes about a gigabyte a second on each core. Packed models keep those of their tensors as
one tensor more, the bytes of a JSON {name: digest}: metadata would be written in another order every time.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors import safe_open

from errors import InputError, first_line
from quant.files import load_checkpoint

NAME = "qua2sedimo_digests"
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


def with_digests(tensors):
    """The tensors {name: tensor} of a model and, last, their digests."""
    told = json.dumps(digests_of(tensors), sort_keys=True).encode()
    return {**tensors, NAME: torch.frombuffer(bytearray(told), dtype=torch.uint8)}


def check_files(files):
    """InputError, naming it, if a tensor in the files of one model is not what was saved; reads them once, mapped."""
    tensors, origin = {}, {}
    for file in files:
        found = _read(file)
        again = next((name for name in found if name in origin), None)
        if again is not None:
            raise InputError(f"{file}: {again[:200]} is in {origin[again]} too; get the whole folder again")
        tensors |= found
        origin |= dict.fromkeys(found, file)
    told = _told(tensors.pop(NAME, None), origin.pop(NAME, files[0]))
    lost = next((name for name in told if name not in tensors), None)
    if lost is not None:
        raise InputError(f"{files[0]}: {lost[:200]} is not in the files; get the whole folder again")
    for name, found in digests_of(tensors).items():
        if told.get(name) != found:
            raise InputError(f"{origin[name]}: {name[:200]} is damaged; get the file again")


def _read(file):
    """The tensors {name: tensor} of a file of safetensors, or of a pickled one."""
    try:
        if not str(file).endswith(".safetensors"):
            return load_checkpoint(file, lazily=True)
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, no dictionary
    except Exception as reason:  # of types of its own
        if isinstance(reason, InputError):
            raise
        raise InputError(f"{file}: cannot be read ({first_line(reason)})") from None


def _told(digests, file):
    """{name: digest} of the tensor that holds them."""
    try:
        told = json.loads(digests.numpy().tobytes())
    except (AttributeError, ValueError, TypeError, RecursionError):  # no such tensor, or no JSON
        told = None
    if not isinstance(told, dict):
        raise InputError(f"{file}: has no digests of its tensors; it is damaged, or no file of a packed model: get it again")
    return told
