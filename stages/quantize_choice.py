"""What quantize.py computes of a denoiser: fits of its weights, their sensitivities, the configuration within a size.

All is kept as it comes, under fingerprints of the weights, so a run that was cut off goes on.
"""

import hashlib
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from autobuild.exchanges import shortest_sum
from autobuild.first_order import Weight
from autobuild.limits import restricted
from autobuild.search import spare_bytes
from autobuild.space import SearchSpace
from errors import InputError
from quant.checked_files import load_content, save_content
from quant.entries import fingerprint, fit_entry, is_entry
from quant.registry import quantizer
from quant.slots import free_keys
from stages.sensitivities import Measured

SAVE_SECONDS = 20


class Kept:
    """A file of {denoiser: {file key: (fingerprint, what is known of the weight)}}, and what settings this depends on.

    One that is damaged, or of other settings, is not gone on with.
    """

    def __init__(self, path, settings):
        self.path, self.settings, self.saved = Path(path), settings, time.monotonic()
        self.content = self._read() if self.path.exists() else {}

    def _read(self):
        try:
            content = load_content(self.path) or {}
            kept = {name: dict(weights) for name, weights in content["weights"].items()}
            return kept if content["settings"] == self.settings else {}
        except (InputError, KeyError, TypeError, AttributeError, ValueError):
            return {}

    def get(self, name, slot, mark):
        """What is known of a slot's weight; None if nothing is, or it was another weight."""
        found = self.content.get(name, {}).get(slot.file_key)
        is_pair = isinstance(found, list | tuple) and len(found) == 2
        return found[1] if is_pair and found[0] == mark else None

    def put(self, name, slot, mark, known):
        """Keep what is known of a slot's weight; it is written now and then, and by `save`."""
        self.content.setdefault(name, {})[slot.file_key] = (mark, known)
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def save(self):
        save_content({"settings": self.settings, "weights": self.content}, self.path)
        self.saved = time.monotonic()


def fit(model, name, words_of, kept, device):
    """Fit to each of the model's weights the words `words_of(key)`, a weight at a time on `device`."""
    keys = free_keys(model.slots)
    total = sum(model.slots[key].shape.numel() for key in keys)
    with tqdm(total=total, desc=f"fitting {name}", unit=" weights", unit_scale=True, delay=2) as progress:
        try:
            for key in keys:
                _fit_one(model, name, key, tuple(words_of(key)), kept, device)
                progress.update(model.slots[key].shape.numel())
        finally:
            kept.save()


def _fit_one(model, name, key, words, kept, device):
    weight = model.weight(key)
    mark = fingerprint(weight)
    entry = kept.get(name, model.slots[key], mark)
    if not is_entry(entry) or not set(words) <= entry["parameters"].keys():
        try:
            entry = fit_entry(weight.to(device), words)
        except ValueError as reason:
            raise InputError(f"{name}.{key}: {reason}") from None
        kept.put(name, model.slots[key], mark, entry)
    model.entries[key] = entry


def space_of(slots, precision_bits, name, methods, min_bits=(), fix=()):
    """The search space of a denoiser's slots, of which no graph is known, as `restricted` by what is asked for."""
    sharing = {}
    for key, slot in slots.items():
        sharing.setdefault(slot.tie, []).append(key)
    shapes = [slots[keys[0]].shape for keys in sharing.values()]
    sizes = [[quantizer(word).size_bytes(shape, precision_bits) for word in methods] for shape in shapes]
    counts = np.array([len(keys) for keys in sharing.values()])
    fp_bytes = counts * np.array([shape.numel() * precision_bits // 8 for shape in shapes])
    sizes = counts[:, None] * np.array(sizes)
    keys, known = list(sharing.values()), np.zeros(sizes.shape)
    return restricted(SearchSpace(name, None, keys, fp_bytes, sizes, known, precision_bits, tuple(methods)), min_bits, fix)


def check_avg_bits(space, avg_bits):
    """InputError if no configuration has so few average bits."""
    spare_bytes(space, avg_bits, space.smallest_bytes)


def choose(space, measured, avg_bits):
    """(configuration, exchanges.Found) whose shifts, of a complete Measured, are found to have the shortest sum."""
    _, shifts, shrinkage = measured.result()
    found = shortest_sum(space, shifts.numpy(), avg_bits, shrinkage)
    return space.configuration(found.codes), found


def known_of(records, model, name, space):
    """The Measured of what a RecordFile tells of a denoiser: of weights as they are, by their fingerprints."""
    marks = [model.entries[keys[0]]["fingerprint"] for keys in space.keys]
    names = [[name, model.slots[keys[0]].file_key, mark] for keys, mark in zip(space.keys, marks, strict=True)]
    return Measured(records, names, [name, "sketch", hashlib.sha256(" ".join(marks).encode()).hexdigest()[:32]])


def weights_of(model, space):
    """The Weights [W] of a model in a search space."""
    return [
        Weight([model.parts[key] for key in keys], {word: model.parameters(keys[0], word) for word in space.methods})
        for keys in space.keys
    ]
