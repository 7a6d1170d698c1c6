"""Trained predictors on disk: plain tensors, numbers and strings, with all that a search needs beside the family's name."""

import hashlib

import numpy as np
import torch

from autobuild import space as spaces
from autobuild.training import FOLDS, Fold
from errors import InputError
from quant.checked_files import load_content, save_content
from quant.files import load_checkpoint

FORMAT, VERSION = "qua2sedimo predictor", 2
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
    save_content(content, path)


def load_folds(path, key):
    """The folds {number: Fold} that a run with the same key has trained; none if there is no such file."""
    content = load_content(path)
    if not _is_predictor(content) or content["key"] != key:
        return {}
    return {number: Fold(**fold) for number, fold in content["folds"].items()}


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
    content = load_content(path)
    if content is None:
        load_checkpoint(path)  # says what is wrong with files that are none
        raise InputError(
            f"{path}: is not a predictor, damaged, or of an earlier version; train it again by train_predictor.py"
        )
    if not _is_predictor(content):
        raise InputError(f"{path}: is not a predictor; make one with train_predictor.py")
    return content


def _is_predictor(content):
    """Whether it is what `save` writes, of this version."""
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        return False
    folds, arrays = content.get("folds"), [content.get(name) for name in ARRAYS]
    return (
        all(isinstance(content.get(name), str) for name in ("family", "key"))
        and all(isinstance(content.get(name), kind) for name, kind in (("weights", list), ("told", dict)))
        and all(map(torch.is_tensor, arrays))
        and isinstance(folds, dict)
        and all(number in range(FOLDS) and _is_fold(each) for number, each in folds.items())
    )


def _is_fold(content):
    return isinstance(content, dict) and content.keys() == set(Fold._fields) and isinstance(content["state"], dict)
