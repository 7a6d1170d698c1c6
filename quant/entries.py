"""A slot's entry in a multiquantizer: all that six quantizers need beside the float weight."""

import hashlib
import math

import torch

from quant import methods


def fit_entry(weight, words=None):
    """Fit all six methods to `weight` [C, ...]."""
    return _entry(weight, *methods.fit_with_errors(weight))


def make_entry(weight, parameters):
    """The entry of `weight` under `parameters` {method: {name: tensor}}."""
    return _entry(weight, parameters, methods.errors(weight, parameters))


def _entry(weight, parameters, errors):
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
            math.isfinite(entry["errors"][name]) and _are_parameters(method, entry["parameters"][name], shape)
            for name, method in methods.METHODS.items()
        )
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError):
        return False


def _are_parameters(method, parameters, shape):
    """Whether the tensors are finite, one scale and zero point per channel or one ascending list of centroids."""
    channels = () if method.algorithm == "kmeans_all" else (shape[0],)
    if method.algorithm == "mse":
        scale, zero_point = parameters["scale"], parameters["zero_point"]
        integer = not zero_point.is_floating_point() and not zero_point.is_complex()
        fits = scale.is_floating_point() and integer and scale.shape == zero_point.shape == channels
        return fits and bool(scale.isfinite().all() and (scale > 0).all())
    centroids = parameters["centroids"]
    fits = centroids.is_floating_point() and centroids.ndim == len(channels) + 1 and centroids.shape[:-1] == channels
    few = 1 <= centroids.shape[-1] <= 2**method.bits
    return fits and few and bool(centroids.isfinite().all() and (centroids.diff(dim=-1) >= 0).all())


def fingerprint(weight):
    """A hash of a weight's values, precision and shape, the same on every device."""
    digest = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy())
    return digest.hexdigest()[:32]
