"""First-order shifts of a denoiser's output under all methods of all weights at once.

Let J be the derivative of the guided output by a weight, and dW = W' - W what a method changes of it. The output shifts by
J dW, to first order. For a direction r of random signs, one backward pass gives r' J dW of every weight under every method:
the inner product of dW with the gradient of r' times the output, layer by layer, each gradient let go of at once. Since
E[r r'] is the identity, the products of such numbers estimate inner products of shifts without bias. (Hutchinson, 1989.)

Each image at each step has directions of its own: a backward pass is of a batch of images, but the gradients of its images
are told apart. With N of them and K directions each, the inner product of shifts a and b, which is a sum over the N, is
estimated with a variance of about |a|^2 |b|^2 / (N K), where directions of all images together would leave 1 / K.
"""

import contextlib
import math
from typing import NamedTuple

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import nn

from quant.registry import quantizer

GRADIENT_NUMBERS = 2**25  # of the gradients of several images that are held together
MEMORY_SHARE = 0.25  # of the free memory, for differences that are kept, and for what a backward pass needs
MEMORY_BOUND = 4  # how much longer reading a number takes than a product
LEAST_SCALE = 2.0**-24  # of directions, in half precision
WEIGHT_GRADIENTS = {1: nn.grad.conv1d_weight, 2: nn.grad.conv2d_weight, 3: nn.grad.conv3d_weight}


class Weight(NamedTuple):
    """A weight in all places where it stands, and the parameters of its methods."""

    parts: list  # of quant.exchangeable.WeightPart
    parameters: dict  # {word: {name: tensor}}


class FirstOrder:
    """The first-order shifts of a denoiser's output under the methods `words` of W `weights`, in random directions.

    `budget_bytes` is what may be kept of differences between weights; a share of the free memory by default. Rest is
    computed anew in each backward pass.
    """

    def __init__(self, denoiser, weights, words, budget_bytes=None):
        self.denoiser, self.weights, self.words = denoiser, weights, words
        self.device = weights[0].parts[0].layer.weight.device
        self.dtype = torch.promote_types(weights[0].parts[0].layer.weight.dtype, torch.float32)
        self.left_bytes = free_bytes(self.device) * MEMORY_SHARE if budget_bytes is None else budget_bytes
        self.kept = {}  # number of a weight -> its differences
        self.scale = 1.0  # of directions; less where gradients overflow in half precision
        self.checkpoints = None  # whether activations are computed again in the backward pass; None: not known yet

    def products(self, ask, rows, directions):
        """r' J dW [W, M, N, K] of a batch of N images, and their guided outputs [N, ...], both on the CPU.

        `ask()` gives the guided outputs [N, ...]; the denoiser is called with `rows` rows in it, the images in turn as
        often as there are copies of them. `directions` [K, N, ...] are of the form of the outputs.
        """
        if self.checkpoints is None:
            self._choose_checkpoints(ask, len(directions[0]))
        while True:
            found, guided = self._products(ask, rows, directions)
            if bool(found.isfinite().all()) or self.scale <= LEAST_SCALE or not bool(guided.isfinite().all()):
                return found, guided
            self.scale /= 16

    def _products(self, ask, rows, directions):
        taps = _Taps(self, rows, len(directions[0]), len(directions))
        found = []
        with torch.enable_grad(), self._checkpointing(), taps:
            guided = ask()
            for number, direction in enumerate(directions):
                taps.found.zero_()
                direction = (direction * self.scale).to(guided.device, guided.dtype)
                left = number + 1 < len(directions)
                torch.autograd.grad(guided, taps.anchor, direction, retain_graph=left, allow_unused=True)
                found.append(taps.found.cpu() / self.scale)
        return torch.stack(found, dim=-1), guided.detach().cpu()

    def _choose_checkpoints(self, ask, images):
        """Have activations computed again if those of a backward pass take more than their share of the free memory."""
        self.checkpoints = False
        if getattr(self.denoiser, "_supports_gradient_checkpointing", False):
            with torch.enable_grad(), _Taps(self, images, images, 1):
                self.checkpoints = saves_more_than(MEMORY_SHARE * free_bytes(self.device), self.denoiser, ask)

    @contextlib.contextmanager
    def _checkpointing(self):
        if self.checkpoints:
            self.denoiser.enable_gradient_checkpointing()
        try:
            yield
        finally:
            if self.checkpoints:
                self.denoiser.disable_gradient_checkpointing()

    def differences(self, number):
        """W' - W [M, n] of the weight with that number under all methods."""
        if number in self.kept:
            return self.kept[number]
        parts, parameters = self.weights[number]
        original = parts[0].original
        found = original.new_empty(len(self.words), original.numel(), dtype=self.dtype)
        for place, word in enumerate(self.words):
            tables = {name: tensor.to(original.device) for name, tensor in parameters.get(word, {}).items()}
            found[place] = (quantizer(word).apply(original, tables).to(self.dtype) - original.to(self.dtype)).flatten()
        if found.nbytes <= self.left_bytes:
            self.left_bytes -= found.nbytes
            self.kept[number] = found
        return found


class _Taps(contextlib.ExitStack):
    """While it is entered, backward passes add to `found` [W, M, N] what gradients are along the differences of weights."""

    def __init__(self, owner, rows, images, directions):
        super().__init__()
        self.owner, self.rows, self.images = owner, rows, images
        self.directions = 1 if owner.checkpoints else directions  # backward passes by the same activations
        self.left_bytes = MEMORY_SHARE * free_bytes(owner.device)  # for what differences make of inputs
        shape = (len(owner.weights), len(owner.words), images)
        self.found = torch.zeros(shape, dtype=owner.dtype, device=owner.device)
        self.anchor = torch.zeros((), device=owner.device, requires_grad=True)  # what all outputs depend on
        self.of_layer = {}
        for number, weight in enumerate(owner.weights):
            for part in weight.parts:
                self.of_layer.setdefault(part.layer, []).append((number, part.slot))

    def __enter__(self):
        for layer in self.of_layer:
            self.callback(layer.register_forward_hook(self._tap, prepend=True).remove)
        return super().__enter__()

    def _tap(self, layer, inputs, output):
        return _Tap.apply(output, inputs[0].detach(), self.anchor, layer, self)

    @torch.no_grad()
    def add(self, layer, input, gradient, moved):
        """Add what the gradients of one call of a layer, by its weight, are along the differences, image by image.

        `moved` {number of a weight: input times its differences} is for all backward passes of the call.
        """
        input, gradient = self._by_image(input), self._by_image(gradient)
        if moved or self._moves(layer, input):
            self._add_moved(layer, input, gradient, moved)
            return
        size = max(1, GRADIENT_NUMBERS // layer.weight.numel())
        for first in range(0, self.images, size):
            some = slice(first, first + size)
            of_weight = weight_gradients(layer, input[some], gradient[some])
            for number, slot in self.of_layer[layer]:
                part = of_weight if slot.inputs is None else of_weight[:, :, slice(*slot.inputs)]
                along = part.flatten(1).to(self.owner.dtype) @ self.owner.differences(number).T
                self.found[number, :, some] += along.T

    def _moves(self, layer, input):
        """Whether it is less work to multiply a layer's input by the differences, once for all directions, than to compute
        a gradient for each; and there is memory for it.
        """
        if not isinstance(layer, nn.Linear):
            return False
        count, tokens = len(self.owner.words), input[0].numel() // layer.in_features
        by_gradients = self.directions * (tokens + count)
        by_inputs = count * tokens * (1 + MEMORY_BOUND * self.directions / layer.in_features)
        size = self.images * tokens * layer.out_features * count * input.element_size() * len(self.of_layer[layer])
        if by_inputs > by_gradients or size > self.left_bytes:
            return False
        self.left_bytes -= size
        return True

    def _add_moved(self, layer, input, gradient, moved):
        rows = input.flatten(1, -2)  # [N, T, n]
        for number, slot in self.of_layer[layer]:
            if number not in moved:
                part = rows if slot.inputs is None else rows[..., slice(*slot.inputs)]
                differences = self.owner.differences(number).view(len(self.owner.words), -1, part.shape[-1])
                outputs = part @ differences.flatten(0, 1).T.to(part.dtype)  # [N, T, M * C]
                moved[number] = outputs.unflatten(-1, (len(differences), -1)).transpose(1, 2).flatten(2)  # [N, M, T * C]
            along = moved[number] @ gradient.flatten(1)[..., None]
            self.found[number] += along[..., 0].T

    def _by_image(self, tensor):
        """[L, ...] as [N, L / N, ...], all rows of an image together; the rows come copy by copy."""
        if self.images == 1:
            return tensor[None]
        if len(tensor) % self.rows:
            raise RuntimeError(f"a layer was given {len(tensor)} rows where the denoiser was given {self.rows}")
        shape = (self.rows // self.images, self.images, len(tensor) // self.rows)
        return tensor.reshape(*shape, *tensor.shape[1:]).transpose(0, 1).flatten(1, 2)


class _Tap(torch.autograd.Function):
    """The output of a layer as it is; the backward pass takes the gradient by it and the layer's input to `taps.add`.

    The input is saved by autograd, so that checkpointing has it computed again.
    """

    @staticmethod
    def forward(ctx, output, input, _anchor, layer, taps):
        ctx.layer, ctx.taps, ctx.moved = layer, taps, {}
        ctx.save_for_backward(input)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        ctx.taps.add(ctx.layer, *ctx.saved_tensors, gradient, ctx.moved)
        return gradient, None, None, None, None


def weight_gradients(layer, input, gradient):
    """Gradients [N, C, ...] by a layer's weight of N images, of its input [N, L, ...] and that by its output [N, L, ...]."""
    if isinstance(layer, nn.Linear):
        return gradient.flatten(1, -2).transpose(1, 2) @ input.flatten(1, -2)
    padding, gradients = layer.padding, WEIGHT_GRADIENTS[layer.weight.ndim - 2]
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(input.flatten(0, 1), layer._reversed_padding_repeated_twice, mode)
        input, padding = padded.unflatten(0, input.shape[:2]), 0
    how = layer.stride, padding, layer.dilation, layer.groups
    each = zip(input, gradient, strict=True)
    return torch.stack([gradients(x, layer.weight.shape, y, *how) for x, y in each])


def random_signs(shape, number, *seeds):
    """Direction `number` of those of the seeds, int8 [*shape]: random signs, but for rounding up to a power of two at right
    angles to the others.

    They are rows of a Hadamard matrix in a random order, their columns times random signs, so that r r' is the identity on
    average over directions and, exactly, over all of them. (Ailon and Chazelle, 2009.)
    """
    size = math.prod(shape)
    bits = max(1, (size - 1).bit_length())
    rng = np.random.default_rng(seeds)
    signs = rng.integers(2, size=size, dtype=np.uint8)
    start, step = (int(each) for each in rng.integers(2**bits, size=2))
    row = (start + number * (step | 1)) % 2**bits  # an odd step comes to all rows
    columns = np.arange(size, dtype=np.uint64) & np.uint64(row)
    parity = (np.bitwise_count(columns) + signs) % 2
    return torch.from_numpy((1 - 2 * parity.astype(np.int8)).reshape(tuple(shape)))


def free_bytes(device):
    """Free memory of a device, or of the host."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def saves_more_than(limit_bytes, module, ask):
    """Whether a backward pass of `ask()`, which calls `module`, would need activations of more bytes."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved = {}  # address -> tensor, which keeps it from being used again

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.data_ptr() not in saved:
            saved[storage.data_ptr()] = tensor
            if sum(each.untyped_storage().nbytes() for each in saved.values()) > limit_bytes:
                raise _TooMany
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            ask()
    except _TooMany:
        return True
    return False


class _TooMany(Exception):
    """Activations take more memory than they may."""
