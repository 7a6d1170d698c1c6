"""A module none of whose layers has its weight where it was: anything that reads it there gets no number."""

import contextlib
import copy

from quant.slots import weight_layers


def weights_elsewhere(module, except_for=()):
    """Let each weight layer in the module, those of `except_for` apart, compute with a copy; its own weight is NaN."""
    for path, layer in weight_layers(module):
        if path not in except_for:
            layer.forward = copy.deepcopy(layer).forward
            layer.weight.data.fill_(float("nan"))


@contextlib.contextmanager
def poison(layer):
    """A layer's weight is NaN for as long as the context lasts."""
    weight = layer.weight.data.clone()
    layer.weight.data.fill_(float("nan"))
    yield
    layer.weight.data.copy_(weight)
