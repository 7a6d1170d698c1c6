"""A slot's entry in a multiquantizer: all that some quantizers need beside the float weight."""

import hashlib
import math

import torch

from errors import InputError
from quant.quantizer import FLOAT
from quant.registry import SEARCH_SPACE, fit_with_errors, quantizer


def fit_entry(weight, words=SEARCH_SPACE):
    """Fit the quantizers of these words, by default the search space's six, to `weight` [C, ...]."""
    return _entry(weight, *fit_with_errors(weight, words))


def make_entry(weight, parameters):
    """The entry of `weight` under `parameters` {word: {name: tensor}}."""
    return _entry(weight, parameters, {word: quantizer(word).error(weight, own) for word, own in parameters.items()})


def _entry(weight, parameters, errors):
    return {
        "shape": list(weight.shape),
        "fingerprint": fingerprint(weight),
        "errors": errors,
        "parameters": {word: {k: v.cpu() for k, v in p.items()} for word, p in parameters.items()},
    }


def is_entry(entry):
    """Whether `entry`, read from a file, has all the parts of one, of the right kinds and shapes, for one word or more."""
    try:
        shape, errors, parameters = torch.Size(entry["shape"]), entry["errors"], entry["parameters"]
        return (
            entry.keys() == {"shape", "fingerprint", "errors", "parameters"}
            and isinstance(entry["fingerprint"], str)
            and len(parameters) > 0
            and errors.keys() == parameters.keys()
            and all(isinstance(error, float) and math.isfinite(error) for error in errors.values())
            and all(quantizer(word).check(own, shape) for word, own in parameters.items())
        )
    except (InputError, KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError):
        return False


def has_words(entry, words=SEARCH_SPACE):
    """Whether the quantizers of all these words are in the entry."""
    return set(words) <= entry["parameters"].keys()


def fitted(entry, key, word, part="parameters"):
    """What a weight's entry holds of a word: its parameters or, `part` being "errors", its error.

    InputError, naming the weight by its `key` and what there is, where it was not fitted. Full precision needs no fit, and
    no entry.
    """
    if word == FLOAT:
        return {"parameters": {}, "errors": 0.0}[part]
    held = entry[part]
    if word not in held:
        raise InputError(
            f"{key}: the multiquantizer has only {', '.join(held)}, not {word}; choose one of these, "
            "or fit it (fit_entry in quant/entries.py)"
        )
    return held[word]


def fingerprint(weight):
    """A hash of a weight's values, precision and shape, the same on every device."""
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy())
    return digest.hexdigest()[:32]
