"""Calls of a denoiser repeated with a changed weight, without computing again what lies before it.

A denoiser's blocks run one after another. While a weight changes, the blocks that ran before its layer give what they gave
before, bit for bit. So their outputs are kept on the host, those that something still reads, and given again. As weights
are visited in the order in which their layers run, few outputs need be kept: of a plain transformer the last block's.
"""

import contextlib
import functools
from typing import NamedTuple

import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.inputs import map_tensors
from models.listening import StandIn
from quant.slots import is_weight_layer

MEMORY_SHARE = 0.25  # of the host's free memory, for outputs that are kept
BLOCK_WEIGHTS = 4  # a module in a list of modules that has as many weight layers is a block, not a part of one
ALWAYS = float("inf")


class Output(NamedTuple):
    """What a block gave: its tensors on the host, or, where nothing reads them any more, empty ones of their shapes."""

    is_read: bool
    value: object


class Prefix:
    """Outputs of the blocks that run before a place in a denoiser, in each of several calls of it.

    `run()` is a call of the denoiser. The first, in `look_at`, tells in what order blocks and layers run.
    """

    def __init__(self, denoiser, look_at, limit_bytes=None):
        self.limit_bytes = psutil.virtual_memory().available * MEMORY_SHARE if limit_bytes is None else limit_bytes
        self.blocks, self.device = blocks_of(denoiser), next(denoiser.parameters()).device
        self.start, self.kept = 0, {}  # key of a call -> [Output] of the blocks before `start`
        self.moving_to, self.moved, self.is_full = None, {}, False
        with _Watch(self.blocks, [each for each in denoiser.modules() if is_weight_layer(each)]) as watch:
            look_at()
        self.order, self.readers, self.places = watch.order, watch.readers, watch.places

    def place_of(self, layers):
        """How many blocks have run before the first of some layers does."""
        return min((self.places.get(layer, 0) for layer in layers), default=0)

    def move(self, place, ask):
        """Have calls start at `place`: `ask()` makes all of them, no weight changed, and what they need is kept.

        It stays at a place before where that is too much for the memory, or blocks run in another order.
        """
        if place < self.start:
            self.forget()
        if place == self.start or self.is_full:
            return
        self.moving_to, self.moved = place, {}
        ask()
        if self.moving_to is not None:
            self.start, self.kept = place, self.moved
        self.is_full = self.moving_to is None
        self.moving_to, self.moved = None, {}

    def forget(self):
        """Compute whole calls again from now on."""
        self.start, self.kept = 0, {}

    def run(self, key, run):
        """What `run()` gives, the call of the denoiser with that key, the blocks before `start` not computed again."""
        known = self.kept.get(key, [])
        if not known and self.moving_to is None:
            return run()
        ran, outputs = [], []

        def answer(block, forward, *args, **kwargs):
            place = len(ran)
            ran.append(block)
            output = self._again(known[place]) if place < len(known) else forward(*args, **kwargs)
            if self.moving_to is not None and place < self.moving_to:
                outputs.append(self._keep(place, known[place] if place < len(known) else Output(True, output)))
            return output

        with contextlib.ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                stack.enter_context(StandIn(block, "forward", functools.partial(answer, number)))
            result = run()
        self._check(key, ran, outputs)
        return result

    def _again(self, output):
        if not output.is_read:
            return output.value
        return map_tensors(lambda tensor: tensor.to(self.device, copy=True), output.value)

    def _keep(self, place, output):
        if output.is_read and self.readers[place] >= self.moving_to:
            return Output(True, map_tensors(_on_host, output.value))
        return Output(False, map_tensors(functools.partial(_empty, self.device), output.value))

    def _check(self, key, ran, outputs):
        """Add the outputs to what is kept; if blocks ran in another order, or all is too much, move no further."""
        if self.moving_to is None:
            return
        self.moved[key] = outputs
        if ran != self.order or sum(map(_host_bytes, self.moved.values())) > self.limit_bytes:
            self.moving_to, self.moved = None, {}


def _on_host(tensor):
    return tensor.detach().to("cpu", copy=True)


def _empty(device, tensor):
    return torch.empty((), dtype=tensor.dtype, device=device).expand(tensor.shape)


def _host_bytes(outputs):
    tensors = tree_leaves([output.value for output in outputs if output.is_read])
    return sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor))


def blocks_of(module):
    """The blocks of a denoiser: modules with weights in a list of modules that have no blocks in them."""
    found = []
    for child in module.children():
        for each in child if isinstance(child, nn.ModuleList) else ():
            found += [each] if _weights(each) > 1 and not _has_blocks(each) else blocks_of(each)
        if not isinstance(child, nn.ModuleList):
            found += blocks_of(child)
    return found


def _weights(module):
    return sum(map(is_weight_layer, module.modules()))


def _has_blocks(module):
    lists = [each for each in module.modules() if isinstance(each, nn.ModuleList)]
    return any(_weights(each) >= BLOCK_WEIGHTS for some in lists for each in some)


class _Watch(TorchDispatchMode):
    """While it is entered: in what `order` blocks run; the last that reads the output of each, ALWAYS if what lies between
    blocks does; and how many blocks have run when each of `layers` first does.
    """

    def __init__(self, blocks, layers):
        super().__init__()
        self.blocks, self.layers = blocks, layers
        self.order, self.readers, self.places = [], {}, {}
        self.running, self.outputs = None, []  # outputs are held, so that their memory is not used again
        self.made_by = {}  # memory of a tensor -> numbers of the blocks that gave it

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                stack.enter_context(StandIn(block, "forward", functools.partial(self._block, number)))
            for layer in self.layers:
                stack.callback(layer.register_forward_pre_hook(self._layer).remove)
            self.listening = stack.pop_all()
        return super().__enter__()

    def __exit__(self, *reason):
        self.listening.close()
        self.outputs.clear()
        return super().__exit__(*reason)

    def _layer(self, layer, _inputs):
        self.places.setdefault(layer, len(self.order) - (self.running is not None))

    def _block(self, number, forward, *args, **kwargs):
        place = self.running = len(self.order)
        self.order.append(number)
        self.readers[place] = -1
        output = forward(*args, **kwargs)
        self.running = None
        self.outputs.append(output)
        for tensor in filter(torch.is_tensor, tree_leaves(output)):
            self.made_by.setdefault(_memory(tensor), []).append(place)
        return output

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in filter(torch.is_tensor, tree_leaves((args, kwargs))):
            for place in self.made_by.get(_memory(tensor), ()):
                self.readers[place] = ALWAYS if self.running is None else max(self.readers[place], self.running)
        return function(*args, **kwargs)


def _memory(tensor):
    return tensor.untyped_storage()._cdata
