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


def is_entry(entry):
    """Whether `entry`, read from a file, has all the parts of one, of the right kinds and shapes."""
    try:
        shape = torch.Size(entry["shape"])
        return isinstance(entry["fingerprint"], str) and all(
            isinstance(entry["errors"][name], float) and _are_parameters(name, entry["parameters"][name], shape)
            for name in methods.METHODS
        )
    except (KeyError, TypeError, AttributeError, IndexError):
        return False


def _are_parameters(name, parameters, shape):
    """Whether the tensors are one number, or one ascending list of centroids, per channel or slot."""
    channels = [] if methods.METHODS[name].algorithm == "kmeans_all" else [shape[0]]
    names = methods.decoding_parameters(name)
    if names == ("centroids",):
        centroids = parameters["centroids"]
        return list(centroids.shape[:-1]) == channels and 1 <= centroids.shape[-1] <= 2 ** methods.METHODS[name].bits
    return all(list(parameters[n].shape) == channels for n in names)


def fingerprint(weight):
    """A hash of a weight's values, precision and shape, the same on every device."""
    data = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    head = f"{weight.dtype} {tuple(weight.shape)}"
    return hashlib.sha256(head.encode() + data.tobytes()).hexdigest()[:32]
