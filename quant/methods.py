"""The table of the six weight quantizers: {UAQ, K-Means-C, K-Means-A} at 4 and 3 bits.

What a quantizer needs beside the weights is its *parameters*: a dict of tensors, kept in the
weights' own precision. Codes and quantized weights are always recomputed from the float weights
and the parameters, so applying a method twice, or after any other, gives the same weights.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from quant import kmeans, sorted_errors, uaq
from quant.rows import sorted_rows


@dataclass(frozen=True)
class Method:
    """One quantizer; `name` is its word on disk, such as `mse-4`."""

    algorithm: str
    bits: int

    @property
    def name(self):
        return f"{self.algorithm}-{self.bits}"


ALGORITHMS = ("mse", "kmeans", "kmeans_all")  # UAQ, K-Means-C, K-Means-A
BITS = (4, 3)
METHODS = {m.name: m for m in (Method(algorithm, b) for algorithm in ALGORITHMS for b in BITS)}


def fit(weight):
    """Parameters of all six methods for `weight` [C, ...]: {name: {parameter: tensor}}."""
    return fit_with_errors(weight)[0]


def fit_with_errors(weight):
    """Parameters of all six methods for `weight` [C, ...], as `fit`, and their errors {name: float}."""
    if weight.device.type == "cpu" and weight.dtype in sorted_errors.DROPPED_BITS:
        rows = sorted_rows(weight)
        uniform = uaq.fit_rows(rows, BITS)
        per_channel, whole = (f(weight, BITS, rows) for f in (kmeans.fit_per_channel, kmeans.fit_whole))
        parameters = _parameters(weight, uniform, per_channel, whole)
        return parameters, {name: _error_of_rows(name, rows, p) for name, p in parameters.items()}
    with ThreadPoolExecutor(1) as pool:  # K-Means-A on the CPU, while a GPU is at the others
        whole = pool.submit(kmeans.fit_whole, weight.cpu(), BITS)
        uniform = {b: uaq.fit(weight, b) for b in BITS}
        per_channel = kmeans.fit_per_channel(weight, BITS)
        whole = {b: centroids.to(weight.device) for b, centroids in whole.result().items()}
    parameters = _parameters(weight, uniform, per_channel, whole)
    return parameters, errors(weight, parameters)


def _parameters(weight, uniform, per_channel, whole):
    parameters = {"mse": {b: _uaq_parameters(weight, *uniform[b]) for b in BITS}}
    for algorithm, centroids in (("kmeans", per_channel), ("kmeans_all", whole)):
        parameters[algorithm] = {b: {"centroids": centroids[b].to(weight.dtype)} for b in BITS}
    return {name: parameters[method.algorithm][method.bits] for name, method in METHODS.items()}


def _error_of_rows(name, rows, parameters):
    if METHODS[name].algorithm == "mse":
        return sorted_errors.of_uaq(rows, **parameters, bits=METHODS[name].bits)
    return sorted_errors.of_kmeans(rows, **parameters)


def fit_uaq(weight, bits):
    """Parameters of UAQ for `weight` [C, ...]."""
    return _uaq_parameters(weight, *uaq.fit(weight, bits))


def _uaq_parameters(weight, scale, zero_point):
    stored = storable_scale(scale, weight.dtype)
    # A scale that rounding moves far (a subnormal one) must not move the channel's offset with it.
    return {"scale": stored, "zero_point": whole_numbers((zero_point * scale / stored).round())}


def storable_scale(scale, dtype):
    """The scale in the weights' precision; one too small for it becomes its smallest number, not 0."""
    rounded = scale.to(dtype)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return torch.where(rounded > 0, rounded, smallest)


def whole_numbers(zero_point):
    """Zero points as the smallest integer type that holds them: 0 ... 2^b - 1 where weights straddle 0."""
    for dtype in (torch.int8, torch.int16, torch.int32):
        if zero_point.abs().max() <= torch.iinfo(dtype).max:
            return zero_point.to(dtype)
    return zero_point.clamp(-(2**31) + 1, 2**31 - 1).to(torch.int32)


def quantize(name, weight, parameters):
    """Codes (uint8, shape of `weight`) under the method `name`."""
    if METHODS[name].algorithm == "mse":
        codes = uaq.quantize(weight, parameters["scale"], parameters["zero_point"], METHODS[name].bits)
        return codes.to(torch.uint8)
    if "boundaries" in parameters:
        return kmeans.assign_by_boundaries(weight, parameters["boundaries"])
    return kmeans.assign(weight, parameters["centroids"])


def decoding_parameters(name):
    """Names of the parameters that turn codes back into weights."""
    return ("scale", "zero_point") if METHODS[name].algorithm == "mse" else ("centroids",)


def dequantize(name, codes, parameters):
    """Weights, in the parameters' precision, that the codes stand for."""
    if METHODS[name].algorithm == "mse":
        return uaq.dequantize(codes, parameters["scale"], parameters["zero_point"])
    return kmeans.dequantize(codes, parameters["centroids"])


def apply(name, weight, parameters):
    """`weight` [C, ...] as the method `name` represents it, in the precision of `weight`."""
    if METHODS[name].algorithm == "mse":
        return dequantize(name, quantize(name, weight, parameters), parameters)
    return kmeans.apply(weight, **parameters)


def error(weight, quantized):
    """Quantization error of a slot: sum over output channels of the channel's mean |w - w'|^2.4."""
    return uaq.mean_error(weight, quantized).double().sum().item()


def errors(weight, parameters):
    """The error of each method on `weight` with its `parameters`: {name: float}."""
    return {name: error(weight, apply(name, weight, p)) for name, p in parameters.items()}


def fp_size_bytes(shape, precision_bits):
    """Size of the float weight."""
    return _numel(shape) * precision_bits // 8


def quantized_size_bytes(name, shape, precision_bits):
    """Size of the codes and of what decodes them; `precision_bits` is the float weights' own.

    Overhead: UAQ a scale and a zero point per output channel, K-Means-C 2^b centroids per output
    channel, K-Means-A 2^b centroids.
    """
    method, channels = METHODS[name], shape[0]
    numbers = {"mse": 2 * channels, "kmeans": 2**method.bits * channels, "kmeans_all": 2**method.bits}
    overhead_bits = numbers[method.algorithm] * precision_bits
    return _numel(shape) * method.bits // 8 + overhead_bits // 8


def _numel(shape):
    return torch.Size(shape).numel()
