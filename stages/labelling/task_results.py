"""What has been measured of configurations in work: a file per task, so that nothing measured is lost.

The results of a configuration are dropped once its row is in `quant_cache.pkl`.
"""

import contextlib
import shutil

import numpy as np

from evaluation.proxies import PER_IMAGE
from quant.checked_files import are_arrays, load_arrays, save_arrays

KINDS = dict.fromkeys((*PER_IMAGE, "clip_score"), ("f", 1)) | {
    "features": ("f", 2),
    "constant": ("b", 1),
    "images": ("u", 4),
    "latents": ("f", 4),
}


class TaskResults:
    """The results of tasks, {name: array [images of the task, ...]} each, in a folder."""

    def __init__(self, folder):
        self.folder = folder

    def path(self, task):
        return self.folder / f"{task.name}_{task.first:05d}-{task.last:05d}.npz"

    def save(self, task, arrays):
        save_arrays(arrays, self.path(task))

    def load(self, task):
        """What was saved; None if nothing was, or it is damaged."""
        arrays = load_arrays(self.path(task))
        return arrays if are_arrays(arrays, KINDS, task.count) and "features" in arrays else None

    def load_all(self, tasks):
        """The arrays of several tasks, one after another, as far as all have them."""
        loaded = [self.load(task) for task in tasks]
        shared = [name for name in loaded[0] if all(name in arrays for arrays in loaded)]
        return {name: np.concatenate([arrays[name] for arrays in loaded]) for name in shared}

    def drop(self, tasks):
        for task in tasks:
            self.path(task).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others are left
            self.folder.rmdir()

    def clear(self):
        """Drop all, once every row is there: a run that died between a row and the dropping of its results left some."""
        shutil.rmtree(self.folder, ignore_errors=True)
