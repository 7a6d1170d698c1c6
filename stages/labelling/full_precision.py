"""Full precision's images, kept for a whole run: every configuration's are compared with them."""

from typing import NamedTuple

import numpy as np

from quant.checked_files import are_arrays, load_array, save_array

KINDS = {"images": ("u", 4), "latents": ("f", 4), "features": ("f", 2)}


class FullPrecision(NamedTuple):
    """What full precision draws for each prompt, number by number."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    latents: np.ndarray  # float32 [N, C, h, w]
    features: np.ndarray  # [N, F]


def load(folder, count):
    """What is kept of `count` images, read from disk as it is used; None if it is not there, or damaged."""
    arrays = {name: load_array(_path(folder, name)) for name in FullPrecision._fields}
    there = all(array is not None for array in arrays.values())
    return FullPrecision(**arrays) if there and are_arrays(arrays, KINDS, count) else None


def save(folder, arrays):
    for name in FullPrecision._fields:
        save_array(arrays[name], _path(folder, name))


def _path(folder, name):
    return folder / f"{name}.npy"
