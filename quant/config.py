"""A quantization configuration: {key: method} for every weight slot of a denoiser."""

import numpy as np
import torch

from errors import InputError
from quant.entries import fitted
from quant.files import load_pickle, save_pickle
from quant.registry import ALGORITHMS, BITS, POSSIBLE, SEARCH_SPACE, fp_size_bytes, quantizer
from quant.slots import ANY_MODULE, WeightSlot, free_keys, tied_key

UNIFORM = "uniform:"


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
        if not _is_known(method):
            raise InputError(f"{name}: unknown method {method!r} for {key}; {POSSIBLE}")
    for key, slot in slots.items():
        if configuration[key] != configuration[slot.tie]:
            raise InputError(
                f"{name}: {key} is {configuration[key]}, but it shares the weights of {slot.tie}, "
                f"which is {configuration[slot.tie]}"
            )


def _is_known(method):
    try:
        quantizer(method)
    except InputError:
        return False
    return True


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


def check_file(spec, entries, rules=ANY_MODULE, read=None):
    """InputError if `load` is going to refuse what `spec` names for the denoiser of a multiquantizer's entries.

    They have all of its slots but those that share others' weights, by the slot rules. None, where only weights tell
    them, are not asked.
    InputError also if a weight is to take a quantizer that its entry has not.
    """
    spec = str(spec)
    if spec.startswith(UNIFORM):
        slots = _slots(entries or ["every weight"])
        configuration = uniform(slots, spec.removeprefix(UNIFORM))
    else:
        configuration = (read or read_file)(spec)
        slots = _slots(configuration if entries is None else entries)
        ties = {key: tied_key(key, rules) for key in configuration if key not in slots}
        slots |= {key: WeightSlot(key, "", torch.Size(), tie) for key, tie in ties.items() if tie in slots}
        configuration = expand_ties(configuration, slots)
    check(configuration, slots, spec)
    for key, method in configuration.items() if entries else ():
        fitted(entries, slots[key], method)


def check_space(entries):
    """InputError unless all of the search space, which random configurations are of, is in a multiquantizer's entries."""
    for slot in _slots(entries).values():
        for word in SEARCH_SPACE:
            fitted(entries, slot, word)


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


def describe(configuration, slots, entries, precision_bits):
    """{key: [method, FP bytes, quantized bytes with overhead, error]}, as labelled results hold it."""
    return {
        key: [
            method,
            fp_size_bytes(slots[key].shape, precision_bits),
            quantizer(method).size_bytes(slots[key].shape, precision_bits),
            fitted(entries, slots[key], method, "errors"),
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
