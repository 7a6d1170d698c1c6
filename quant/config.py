"""A quantization configuration: {key: method} for every weight slot of a denoiser.

In files the keys are those of quant/file_keys.py; `load` gives weights' own keys.
"""

import numpy as np

from errors import InputError, named, shown
from quant.entries import fitted
from quant.file_keys import by_file_key, by_weight, file_ties, tied_file_key
from quant.files import load_pickle, save_pickle
from quant.quantizer import fp_size_bytes
from quant.registry import ALGORITHMS, BITS, POSSIBLE, SEARCH_SPACE, quantizer
from quant.slots import ANY_MODULE, WeightKey, free_keys, ties_of

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
    return expand_ties(chosen, ties_of(slots))


def uniform(slots, method):
    """The configuration in which every slot takes `method`."""
    return dict.fromkeys(slots, method)


def expand_ties(configuration, ties):
    """The configuration with each key of `ties` {key: key of the weight it shares} that it leaves out as its tie."""
    expanded = dict(configuration)
    by_tie = {ties[key]: method for key, method in configuration.items() if key in ties}
    for key, tie in ties.items():
        if key not in expanded and tie in by_tie:
            expanded[key] = by_tie[tie]
    return {key: expanded.pop(key) for key in ties if key in expanded} | expanded


def check(configuration, ties, name="configuration"):
    """Raise InputError, naming the key, unless every key of `ties` has a known method, and that of its tie."""
    unknown = [key for key in configuration if key not in ties]
    if unknown:
        first = str(unknown[0]) if isinstance(unknown[0], WeightKey) else unknown[0]
        raise InputError(f"{name}: {len(unknown)} keys are not of this denoiser, first {named(first)}")
    missing = [key for key in ties if key not in configuration]
    if missing:
        raise InputError(f"{name}: {len(missing)} of {len(ties)} keys are missing, first {missing[0]}")
    for key, method in configuration.items():
        if not _is_known(method):
            raise InputError(f"{name}: unknown method {shown(method)} for {key}; {POSSIBLE}")
    for key, tie in ties.items():
        if configuration[key] != configuration[tie]:
            raise InputError(
                f"{name}: {key} is {configuration[key]}, but it shares the weights of {tie}, which is {configuration[tie]}"
            )


def _is_known(method):
    try:
        quantizer(method)
    except InputError:
        return False
    return True


def load(spec, slots, read=None):
    """The checked configuration that `spec` names: a file `name.pkl` holding {file key: method}, or `uniform:kmeans-4`.

    `read` gives the content of other specifications than these, {file key: method}; it is `read_file` by default.
    """
    return by_weight(_complete(str(spec), file_ties(slots), _told(str(spec), read)), slots)


def _told(spec, read):
    """{file key: method} of what `spec` names; nothing where it tells one method for all."""
    return {} if spec.startswith(UNIFORM) else (read or read_file)(spec)


def _complete(spec, ties, told):
    """The checked configuration {file key: method} that `told`, read of `spec`, means for the keys of `ties`."""
    is_uniform = spec.startswith(UNIFORM)
    configuration = uniform(ties, spec.removeprefix(UNIFORM)) if is_uniform else expand_ties(told, ties)
    check(configuration, ties, spec)
    return configuration


def check_file(spec, entries, rules=ANY_MODULE, read=None):
    """InputError if `load` is going to refuse what `spec` names for the denoiser of `entries` {file key: entry}.

    They have all of its slots but those that share others' weights, by the slot rules. None, where only weights tell
    them, are not asked.
    InputError also if a weight is to take a quantizer that its entry has not.
    """
    told = _told(str(spec), read)
    known = (told or ["every weight"]) if entries is None else entries
    ties = {key: tied_file_key(key, rules) for key in told}
    ties = {key: key for key in known} | {key: tie for key, tie in ties.items() if key not in known and tie in known}
    for key, method in _complete(str(spec), ties, told).items() if entries else ():
        fitted(entries[ties[key]], key, method)


def check_space(entries):
    """InputError unless all of the search space, which random configurations are of, is in a multiquantizer's entries."""
    for key, entry in entries.items():
        for word in SEARCH_SPACE:
            fitted(entry, key, word)


def save(configuration, slots, path):
    """Write a configuration, as `load` reads it."""
    save_pickle(by_file_key(configuration, slots), path)


def read_file(path):
    """{file key: method} of the file at `path`, its keys and methods unchecked; InputError if it holds anything else."""
    return methods_of(load_pickle(path), path)


def methods_of(content, path):
    """{file key: method} of what was read from `path`: that itself, or a {file key: [method, ...]} of labelled results."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: not a configuration {{key: method}}")
    # In a row of labelled results each value is [method, FP bytes, quantized bytes, error].
    return {key: value[0] if isinstance(value, list) and value else value for key, value in content.items()}


def describe(configuration, slots, entries, precision_bits):
    """{key: [method, FP bytes, quantized bytes with overhead, error]}; labelled results hold it by file key."""
    return {
        key: [
            method,
            fp_size_bytes(slots[key].shape, precision_bits),
            quantizer(method).size_bytes(slots[key].shape, precision_bits),
            fitted(entries.get(slots[key].tie), key, method, "errors"),
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
