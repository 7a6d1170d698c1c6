"""Products of inputs with packed weights: operators of PyTorch's that decode, multiply and let go.

A weight is decoded into a buffer that all layers of a thread share and that is as large as the largest of them, then
multiplied by the library of the processor's maker; nothing of it leaves the operator. Where gradients are asked for, of
the input and the bias, the backward pass decodes it again, so a LoRA on top trains without decoded weights being kept.

    linear(input, codes, table, zero, bits, group, bias)
    linear_a8(input, codes, table, zero, bits, act_bits, bias)    the input quantized by token, see quant/kernels/int8.py
    convolution(input, codes, table, zero, bits, group, bias, shape, stride, padding, dilation, groups)

in `torch.ops.qua2sedimo`. The codes and tables are those of `decode`. On an NVIDIA GPU linear layers are computed by
quant/kernels/triton_fused.py and triton_int8.py, convolutions decode and take PyTorch's own.
"""

import importlib.util
import itertools
import math
import threading

import torch
import torch.nn.functional as F

from quant.activations import quantize_tokens
from quant.kernels import int8
from quant.kernels.decode import LIBRARY, decode, decode_into

LIBRARY.define("linear(Tensor input, Tensor codes, Tensor table, Tensor? zero, int bits, int group, Tensor? bias) -> Tensor")
LIBRARY.define(
    "linear_a8(Tensor input, Tensor codes, Tensor table, Tensor? zero, int bits, int act_bits, Tensor? bias) -> Tensor"
)
LIBRARY.define(
    "convolution(Tensor input, Tensor codes, Tensor table, Tensor? zero, int bits, int group, Tensor? bias, "
    "int[] shape, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor"
)
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
INPUT_GRADIENTS = (torch.nn.grad.conv1d_input, torch.nn.grad.conv2d_input, torch.nn.grad.conv3d_input)
FEW_ROWS, CACHED_BYTES = 16, 2**20
MIN_CHANNELS = 256  # multiplied at a time: of fewer, libraries may sum in another order than for all of them
_OWN = threading.local()


def linear(input, codes, table, zero, bits, group, bias=None):
    """`input` [..., n] times the packed weight [C, n], in the dtype of the input, plus `bias` [C]: [..., C]."""
    input, bias = _as_autocast(input, bias)
    if _needs_gradient(input, bias):
        return _Linear.apply(input, bias, codes, table, zero, bits, group)
    return torch.ops.qua2sedimo.linear(input, codes, table, zero, bits, group, bias)


def linear_a8(input, codes, table, zero, bits, act_bits, bias=None):
    """As `linear`, the input quantized by token to `act_bits`; by products of int8 where quant/kernels/int8.py takes it."""
    input, bias = _as_autocast(input, bias)
    if _needs_gradient(input, bias):
        return linear(quantize_tokens(input, act_bits), codes, table, zero, bits, 0, bias)
    return torch.ops.qua2sedimo.linear_a8(input, codes, table, zero, bits, act_bits, bias)


def convolution(input, codes, table, zero, bits, group, bias, shape, stride, padding, dilation, groups):
    """The convolution of one to three dimensions of `input` with the packed weight of that shape."""
    input, bias = _as_autocast(input, bias)
    geometry = (list(shape), list(stride), list(padding), list(dilation), groups)
    if input.ndim < len(shape):  # a sample without a batch
        return convolution(input[None], codes, table, zero, bits, group, bias, *geometry)[0]
    if _needs_gradient(input, bias):
        return _Convolution.apply(input, bias, codes, table, zero, bits, group, geometry)
    return torch.ops.qua2sedimo.convolution(input, codes, table, zero, bits, group, bias, *geometry)


def _needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _as_autocast(input, bias):
    """Both as PyTorch's own products take them while `torch.autocast` is on."""
    device = input.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device) or input.dtype == torch.float64:
        return input, bias
    dtype = torch.get_autocast_dtype(device)
    return input.to(dtype), None if bias is None else bias.to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, bias, codes, table, zero, bits, group):
        ctx.save_for_backward(codes, table, zero)
        ctx.form = bits, group, input.shape[-1]
        return torch.ops.qua2sedimo.linear(input, codes, table, zero, bits, group, bias)

    @staticmethod
    def backward(ctx, grad):
        codes, table, zero = ctx.saved_tensors
        bits, group, count = ctx.form
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = grad @ decode(codes, table, zero, bits, count, group).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0) if grad.ndim > 1 else grad
        return grad_input, grad_bias, None, None, None, None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, bias, codes, table, zero, bits, group, geometry):
        ctx.save_for_backward(codes, table, zero)
        ctx.form, ctx.geometry, ctx.input_shape = (bits, group), geometry, input.shape
        return torch.ops.qua2sedimo.convolution(input, codes, table, zero, bits, group, bias, *geometry)

    @staticmethod
    def backward(ctx, grad):
        codes, table, zero = ctx.saved_tensors
        (bits, group), (shape, *how) = ctx.form, ctx.geometry
        places = len(shape) - 2
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = decode(codes, table, zero, bits, math.prod(shape[1:]), group).to(grad.dtype).view(shape)
            grad_input = INPUT_GRADIENTS[places - 1](ctx.input_shape, weight, grad, *how)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.transpose(-1 - places, -1).flatten(0, -2).sum(0)
        return grad_input, grad_bias, None, None, None, None, None, None


def _convolve(input, weight, bias, stride, padding, dilation, groups):
    return CONVOLUTIONS[weight.ndim - 3](input, weight, bias, stride, padding, dilation, groups)


# On any device


def _linear_anywhere(input, codes, table, zero, bits, group, bias):
    return F.linear(input, decode(codes, table, zero, bits, input.shape[-1], group).to(input.dtype), bias)


def _linear_a8_anywhere(input, codes, table, zero, bits, act_bits, bias):
    input = quantize_tokens(input, act_bits)
    return torch.ops.qua2sedimo.linear(input, codes, table, zero, bits, 0, bias)


def _convolution_anywhere(input, codes, table, zero, bits, group, bias, shape, *how):
    weight = decode(codes, table, zero, bits, math.prod(shape[1:]), group).to(input.dtype)
    return _convolve(input, weight.view(shape), bias, *how)


# On the CPU


def _linear_cpu(input, codes, table, zero, bits, group, bias):
    """A few rows are bound by the weight's way through memory: they are multiplied while a part of it is in the cache."""
    count = input.shape[-1]
    step = len(codes)
    if input.numel() <= FEW_ROWS * count:
        step = max(MIN_CHANNELS, CACHED_BYTES // (count * input.itemsize) // 64 * 64)
    starts = list(range(0, max(len(codes) - step // 2, 1), step))
    outputs = []
    for start, stop in itertools.pairwise([*starts, len(codes)]):
        some = slice(start, stop)
        packed = (
            codes[some],
            table if zero is None and table.ndim == 1 else table[some],
            None if zero is None else zero[some],
        )
        weight = decode_into(room((stop - start, count), input.dtype), *packed, bits, group)
        outputs.append(F.linear(input, weight, None if bias is None else bias[some]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _linear_a8_cpu(input, codes, table, zero, bits, act_bits, bias):
    if not int8.takes(input, zero, bits):
        return _linear_a8_anywhere(input, codes, table, zero, bits, act_bits, bias)
    return int8.linear(input, room, codes, table, zero, bits, act_bits, bias)


def _convolution_cpu(input, codes, table, zero, bits, group, bias, shape, *how):
    weight = room((shape[0], math.prod(shape[1:])), input.dtype)
    weight = decode_into(weight, codes, table, zero, bits, group)
    return _convolve(input, weight.view(shape), bias, *how)


# On an NVIDIA GPU


def _linear_cuda(*args):
    from quant.kernels import triton_fused  # imported late: where there is no GPU, Triton is not needed

    return triton_fused.linear_cuda(*args)


def _linear_a8_cuda(*args):
    from quant.kernels import triton_int8

    return triton_int8.linear_a8_cuda(*args)


def room(shape, dtype, use="weight"):
    """An uninitialised tensor in this thread's buffer of that use: whoever asks for it next overwrites it.

    New memory at each call would cost more: the system has to hand it out page by page.
    """
    size_bytes = math.prod(shape) * dtype.itemsize
    buffer = vars(_OWN).get(use)
    if buffer is None or buffer.numel() < size_bytes:
        vars(_OWN)[use] = buffer = None  # let go before the larger one is there
        with torch.inference_mode(False):
            vars(_OWN)[use] = buffer = torch.empty(size_bytes, dtype=torch.uint8)
    return buffer[:size_bytes].view(dtype).view(shape)


@torch.library.register_fake("qua2sedimo::linear", lib=LIBRARY)
def _linear_fake(input, codes, table, zero, bits, group, bias):
    return F.linear(input, input.new_empty(codes.shape[0], input.shape[-1]), bias)


@torch.library.register_fake("qua2sedimo::linear_a8", lib=LIBRARY)
def _linear_a8_fake(input, codes, table, zero, bits, act_bits, bias):
    return _linear_fake(input, codes, table, zero, bits, 0, bias)


@torch.library.register_fake("qua2sedimo::convolution", lib=LIBRARY)
def _convolution_fake(input, codes, table, zero, bits, group, bias, shape, *how):
    return _convolve(input, input.new_empty(shape), bias, *how)


for _name, _anywhere, _cpu in (
    ("linear", _linear_anywhere, _linear_cpu),
    ("linear_a8", _linear_a8_anywhere, _linear_a8_cpu),
    ("convolution", _convolution_anywhere, _convolution_cpu),
):
    LIBRARY.impl(_name, _anywhere, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _cpu, "CPU")
if importlib.util.find_spec("triton"):
    LIBRARY.impl("linear", _linear_cuda, "CUDA")
    LIBRARY.impl("linear_a8", _linear_a8_cuda, "CUDA")
