"""What has been measured of configurations in work: a file per task, so that nothing measured is lost.

The results of a configuration are dropped once its row is in `quant_cache.pkl`.
"""

import contextlib
import shutil
import zipfile
import zlib

import numpy as np

from quant.files import atomic_write

DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class TaskResults:
    """The results of tasks, {name: array [images of the task, ...]} each, in a folder."""

    def __init__(self, folder):
        self.folder = folder

    def path(self, task):
        return self.folder / f"{task.name}_{task.first:05d}-{task.last:05d}.npz"

    def save(self, task, arrays):
        with atomic_write(self.path(task)) as file:
            np.savez(file, **arrays)

    def load(self, task):
        """What was saved; None if nothing was, or it is damaged."""
        with contextlib.suppress(*DAMAGED), np.load(self.path(task), allow_pickle=False) as stored:
            arrays = dict(stored)
            if "features" in arrays and all(len(array) == task.count for array in arrays.values()):
                return arrays
        return None

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
