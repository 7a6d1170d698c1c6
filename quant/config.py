"""A quantization configuration: {key: method} for every weight slot of a denoiser."""

import numpy as np
import torch
from tqdm import tqdm

from errors import InputError
from quant.files import load_pickle, save_pickle
from quant.memory import return_free_memory
from quant.methods import ALGORITHMS, BITS, METHODS, fp_size_bytes, quantized_size_bytes
from quant.slots import WeightSlot, free_keys, tied_key

UNIFORM = "uniform:"
SHOWN_AFTER_SECONDS = 2  # a bar, while weights are packed


def draw_random(slots, seed, index, a_l=0.0, a_u=1.0):
    """Random configuration number `index` of the run `seed`; depends on nothing else.

    The share of 3-bit weights p is uniform in [a_l, a_u]; each slot is 3-bit with probability p and
    takes one of the three algorithms at random. (Mills et al., 2025.)
    """
    rng = np.random.default_rng([seed, index])
    keys = free_keys(slots)
    share = rng.uniform(a_l, a_u)
    bits = np.where(rng.random(len(keys)) < share, min(BITS), max(BITS))
    algorithms = rng.integers(len(ALGORITHMS), size=len(keys))
    chosen = {key: f"{ALGORITHMS[a]}-{b}" for key, a, b in zip(keys, algorithms, bits, strict=True)}
    return expand_ties(chosen, slots)


def uniform(slots, method):
    """The configuration in which every slot takes `method`."""
    return dict.fromkeys(slots, method)


def expand_ties(configuration, slots):
    """The configuration with each tied slot that it leaves out taking its tie's method."""
    expanded = dict(configuration)
    by_tie = {slots[key].tie: method for key, method in configuration.items() if key in slots}
    for key, slot in slots.items():
        if key not in expanded and slot.tie in by_tie:
            expanded[key] = by_tie[slot.tie]
    return {key: expanded.pop(key) for key in slots if key in expanded} | expanded


def check(configuration, slots, name="configuration"):
    """Raise InputError, naming the key, unless every slot has a known method and ties agree."""
    unknown = [key for key in configuration if key not in slots]
    if unknown:
        raise InputError(f"{name}: {len(unknown)} keys are not of this denoiser, first {unknown[0]}")
    missing = [key for key in slots if key not in configuration]
    if missing:
        raise InputError(f"{name}: {len(missing)} of {len(slots)} keys are missing, first {missing[0]}")
    for key, method in configuration.items():
        if not isinstance(method, str) or method not in METHODS:
            raise InputError(f"{name}: unknown method {method!r} for {key}; known are {', '.join(METHODS)}")
    for key, slot in slots.items():
        if configuration[key] != configuration[slot.tie]:
            raise InputError(
                f"{name}: {key} is {configuration[key]}, but it shares the weights of {slot.tie}, "
                f"which is {configuration[slot.tie]}"
            )


def load(spec, slots, read=None):
    """The checked configuration that `spec` names: a file `name.pkl` holding {key: method}, or `uniform:kmeans-4`.

    `read` gives the content of other specifications than these, {key: method}; it is `read_file` by default.
    """
    spec = str(spec)
    if spec.startswith(UNIFORM):
        configuration = uniform(slots, spec.removeprefix(UNIFORM))
    else:
        configuration = expand_ties((read or read_file)(spec), slots)
    check(configuration, slots, spec)
    return configuration


def check_file(spec, entries, family, read=None):
    """InputError if `load` is going to refuse what `spec` names for the denoiser of a multiquantizer's entries.

    They have all of its slots but those that share others' weights. None, where only weights tell them, are not asked.
    """
    spec = str(spec)
    if spec.startswith(UNIFORM):
        slots = _slots(entries or ["every weight"])
        return check(uniform(slots, spec.removeprefix(UNIFORM)), slots, spec)
    configuration = (read or read_file)(spec)
    slots = _slots(configuration if entries is None else entries)
    ties = {key: tied_key(key, family.slot_rules) for key in configuration if key not in slots}
    slots |= {key: WeightSlot(key, "", torch.Size(), tie) for key, tie in ties.items() if tie in slots}
    return check(expand_ties(configuration, slots), slots, spec)


def _slots(keys):
    """{key: slot} of weights of which nothing but the key is known."""
    return {key: WeightSlot(key, "", torch.Size(), key) for key in keys}


def save(configuration, path):
    save_pickle(configuration, path)


def read_file(path):
    """{key: method} of the file at `path`, its keys and methods unchecked; InputError if it holds anything else."""
    return methods_of(load_pickle(path), path)


def methods_of(content, path):
    """{key: method} of what was read from `path`: that itself, or a {key: [method, ...]} of labelled results."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: not a configuration {{key: method}}")
    # In a row of labelled results each value is [method, FP bytes, quantized bytes, error].
    return {key: value[0] if isinstance(value, list) and value else value for key, value in content.items()}


def apply(configuration, parts, slots, entries):
    """Put the quantized weights of a checked configuration into `parts`; unchanged ones are not touched."""
    for key, part in parts.items():
        if part.method != configuration[key]:
            part.set_method(configuration[key], entries[slots[key].tie]["parameters"][configuration[key]])


def restore(parts):
    """Put the float weights back."""
    for part in parts.values():
        if part.method is not None:
            part.set_method(None)


def pack(configuration, parts, slots, entries):
    """Turn the float weights into the packed low-bit form of a checked configuration, one after the other, for good."""
    for key, part in tqdm(parts.items(), desc="packing", unit="weight", leave=False, delay=SHOWN_AFTER_SECONDS):
        part.pack(configuration[key], entries[slots[key].tie]["parameters"][configuration[key]])
    return_free_memory()


def describe(configuration, slots, entries, precision_bits):
    """{key: [method, FP bytes, quantized bytes with overhead, error]}, as labelled results hold it."""
    return {
        key: [
            method,
            fp_size_bytes(slots[key].shape, precision_bits),
            quantized_size_bytes(method, slots[key].shape, precision_bits),
            entries[slots[key].tie]["errors"][method],
        ]
        for key, method in configuration.items()
    }


def describe_full_precision(slots, precision_bits):
    """The same of the float weights: no method, no error."""
    sizes = {key: fp_size_bytes(slot.shape, precision_bits) for key, slot in slots.items()}
    return {key: [None, size, size, 0.0] for key, size in sizes.items()}


def quantized_size(description):
    """Bytes of all quantized weights of a `describe`d configuration."""
    return sum(row[2] for row in description.values())


def avg_bits(description, precision_bits):
    """P x quantized bytes / FP bytes."""
    return precision_bits * quantized_size(description) / sum(row[1] for row in description.values())
