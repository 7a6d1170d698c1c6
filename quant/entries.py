"""A slot's entry in a multiquantizer: all that six quantizers need beside the float weight."""

import hashlib

import torch

from quant import methods


def fit_entry(weight):
    """Fit all six methods to `weight` [C, ...]."""
    return make_entry(weight, methods.fit(weight))


def make_entry(weight, parameters):
    """The entry of `weight` under `parameters` {method: {name: tensor}}."""
    errors = {name: methods.error(weight, methods.apply(name, weight, p)) for name, p in parameters.items()}
    return {
        "shape": list(weight.shape),
        "fingerprint": fingerprint(weight),
        "errors": errors,
        "parameters": {name: {k: v.cpu() for k, v in p.items()} for name, p in parameters.items()},
    }


def fingerprint(weight):
    """A hash of a weight's values, precision and shape, the same on every device."""
    data = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    head = f"{weight.dtype} {tuple(weight.shape)}"
    return hashlib.sha256(head.encode() + data.tobytes()).hexdigest()[:32]
