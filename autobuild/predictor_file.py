"""Trained predictors on disk: plain tensors, numbers and strings, with all that a search needs beside the family's name."""

import hashlib

import numpy as np
import torch

from autobuild import space as spaces
from autobuild.training import FOLDS, Fold
from errors import InputError
from quant.files import atomic_write, load_checkpoint

FORMAT, VERSION = "qua2sedimo predictor", 1
ARRAYS = ("fp_bytes", "size_bytes", "errors")


def key_of(space, setup):
    """Says what a training run learns from and how: runs with the same one go on from each other's folds."""
    said = hashlib.sha256(f"{space.family} {setup.loss} {setup.epochs} {setup.seed}".encode())
    for array in (setup.codes, setup.targets, *(getattr(space, name) for name in ARRAYS)):
        said.update(np.ascontiguousarray(array).tobytes())
    return said.hexdigest()[:32]


def save(path, space, key, told, folds):
    """Write the folds {number: Fold} trained so far; `told` {name: value} says how, for people."""
    content = {"format": FORMAT, "version": VERSION, "family": space.family, "key": key, "told": told}
    content["weights"] = [keys[0] for keys in space.keys]
    content |= {name: torch.from_numpy(getattr(space, name)) for name in ARRAYS}
    content["precision_bits"] = space.precision_bits
    content["folds"] = {number: fold._asdict() for number, fold in folds.items()}
    with atomic_write(path) as file:
        torch.save(content, file)


def load_folds(path, key):
    """The folds {number: Fold} that a run with the same key has trained; none if there is no such file."""
    if not path.exists():
        return {}
    try:
        content = _read(path)
    except InputError:  # damaged, or something else: trained anew
        return {}
    return {number: Fold(**fold) for number, fold in content["folds"].items()} if content["key"] == key else {}


def load(path, family):
    """(search space, the folds' states, what is told of the training); InputError if it is not of this family."""
    content = _read(path)
    if content["family"] != family:
        raise InputError(f"{path}: is a predictor of {content['family']}, not of {family}; --family names the denoiser")
    if len(content["folds"]) < FOLDS:
        raise InputError(f"{path}: its training was interrupted; the same train_predictor.py command goes on")
    graph, keys = spaces.graph_and_keys(family)
    if [each[0] for each in keys] != content["weights"]:
        raise InputError(f"{path}: was trained on another graph of {family}; train it again with train_predictor.py")
    arrays = (content[name].numpy() for name in ARRAYS)
    space = spaces.SearchSpace(family, graph, keys, *arrays, content.get("precision_bits"))
    return space, [content["folds"][number]["state"] for number in range(FOLDS)], content["told"]


def _read(path):
    content = load_checkpoint(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: is not a predictor; make one with train_predictor.py")
    if content["version"] != VERSION:
        raise InputError(f"{path}: has version {content['version']}, this program reads {VERSION}; train it again")
    return content
