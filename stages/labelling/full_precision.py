"""Full precision's images, kept for a whole run: every configuration's are compared with them."""

import contextlib
from typing import NamedTuple

import numpy as np

from quant.files import atomic_write


class FullPrecision(NamedTuple):
    """What full precision draws for each prompt, number by number."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    latents: np.ndarray  # float32 [N, C, h, w]
    features: np.ndarray  # [N, F]


def load(folder, count):
    """What is kept of `count` images, read from disk as it is used; None if it is not there, or damaged."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        arrays = [np.load(_path(folder, name), mmap_mode="r", allow_pickle=False) for name in FullPrecision._fields]
        if all(len(array) == count for array in arrays):
            return FullPrecision(*arrays)
    return None


def save(folder, arrays):
    for name in FullPrecision._fields:
        with atomic_write(_path(folder, name)) as file:
            np.save(file, arrays[name])


def _path(folder, name):
    return folder / f"{name}.npy"
