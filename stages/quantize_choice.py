"""What quantize.py computes of a denoiser: fits of its weights, their sensitivities, the configuration within a size.

Both are kept as they come, each weight's under a fingerprint of it, so a run that was cut off goes on.
"""

import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from autobuild.exchanges import shortest_sum
from autobuild.limits import restricted
from autobuild.search import spare_bytes
from autobuild.space import SearchSpace
from errors import InputError
from quant.checked_files import load_content, save_content
from quant.entries import fingerprint, fit_entry, is_entry
from quant.registry import quantizer
from quant.slots import free_keys
from stages.units import as_time

SAVE_SECONDS = 20


class Kept:
    """A file of {denoiser: {file key: (fingerprint, what is known of the weight)}}, and what settings this depends on."""

    def __init__(self, path, settings, flag=None):
        self.path, self.settings, self.saved = Path(path), settings, time.monotonic()
        self.content = self._read(flag) if self.path.exists() else {}

    def _read(self, flag):
        """What the file holds; of other settings it is not gone on with, and refused if a `flag` named it."""
        way_out = f"name another file with {flag}, or delete it"
        try:
            content = load_content(self.path)
            if content is None:
                raise InputError("damaged, or of an earlier version")
            same = content["settings"] == self.settings
            kept = {name: dict(weights) for name, weights in content["weights"].items()}
        except (InputError, KeyError, TypeError, AttributeError, ValueError) as reason:
            if flag is None:
                return {}
            raise InputError(f"{self.path}: is not what this program has written ({reason}); {way_out}") from None
        if not same and flag is not None:
            raise InputError(f"{self.path}: was measured with {content['settings']}, not {self.settings}; {way_out}")
        return kept if same else {}

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


def choose(space, known, avg_bits):
    """(configuration, exchanges.Found) whose shifts, of `known` {key: (changes [M], shifts [M, K])}, have a short sum."""
    shifts = torch.stack([known[keys[0]][1] for keys in space.keys]).float().numpy()
    found = shortest_sum(space, shifts, avg_bits)
    return space.configuration(found.codes), found


def measure(model, name, space, replay, kept):
    """{key: (changes [M], shifts [M, K])} of the space's methods for each weight, asked one after another."""
    marks = {keys[0]: model.entries[keys[0]]["fingerprint"] for keys in space.keys}

    def known(key):
        return kept.get(name, model.slots[key], marks[key])

    left = [keys for keys in space.keys if known(keys[0]) is None]
    done = len(space.keys) - len(left)
    start = time.monotonic()
    for number, keys in enumerate(tqdm(left, desc=f"asking {name}", unit="weight", initial=done, total=len(space.keys))):
        kept.put(name, model.slots[keys[0]], marks[keys[0]], _measure_one(model, keys, replay, space.methods))
        if number == 0:
            told = as_time((time.monotonic() - start) * (len(left) - 1))
            tqdm.write(f"{name}: about {told} left for {len(left) - 1} weights; less with a lower --n_imgs or --calls")
            kept.save()
    kept.save()
    return {keys[0]: known(keys[0]) for keys in space.keys}


def _measure_one(model, keys, replay, methods):
    parts = [model.parts[key] for key in keys]
    found = []
    try:
        for word in methods:
            for part in parts:
                part.set_method(word, model.parameters(keys[0], word))
            found.append(replay.shift())
    finally:
        for part in parts:
            part.set_method(None)
    changes, shifts = zip(*found, strict=True)
    return torch.tensor(changes, dtype=torch.float64), torch.stack(shifts).half()
