"""Shim until the registry is merged."""

import functools
from dataclasses import dataclass

from quant import methods
from quant.methods import METHODS

SEARCH_SPACE = tuple(METHODS)


@dataclass(frozen=True)
class Quantizer:
    name: str
    group: int | None = None

    @property
    def bits(self):
        return METHODS[self.name].bits

    @property
    def algorithm(self):
        return METHODS[self.name].algorithm

    @property
    def tables(self):
        return methods.decoding_parameters(self.name)

    def fit(self, weight, statistics=None):
        return methods.fit(weight)[self.name]

    def encode(self, weight, parameters):
        return methods.quantize(self.name, weight, parameters)

    def decode(self, codes, parameters):
        return methods.dequantize(self.name, codes, parameters)

    def apply(self, weight, parameters):
        return methods.apply(self.name, weight, parameters)

    def error(self, weight, parameters):
        return methods.error(weight, self.apply(weight, parameters))

    def size_bytes(self, shape, precision_bits):
        return methods.quantized_size_bytes(self.name, shape, precision_bits)

    def table_shape(self, shape):
        c = shape[0]
        import torch

        k = min(2**self.bits, torch.Size(shape).numel() // (1 if self.algorithm == "kmeans_all" else c))
        return {"mse": (c,), "kmeans": (c, k), "kmeans_all": (k,)}[self.algorithm]

    def check(self, parameters, shape):
        from quant.entries import _are_parameters

        return _are_parameters(METHODS[self.name], parameters, shape)


@functools.cache
def quantizer(word):
    return Quantizer(word)
