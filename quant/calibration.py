"""Calibration: second moments of what each weight's output channels are fed with, E[x x^T].

The squared error that quantizing a weight W [C, n] to W' brings to its layer's output is, on average over its inputs x,
tr((W - W') E[x x^T] (W - W')^T): quant/compensation.py rounds by it, and quantizers weigh their levels by its diagonal.

    calls = [functools.partial(denoiser, **arguments) for arguments in heard]   # what a pipeline asked its denoiser for
    moments = collect(denoiser, model.slots, calls, folder)
    model.calibrate(moments, configuration)

The module is heard as it is: in full precision, or quantized, when its inputs are those of its own way. Inputs of a
Linear are its rows; of a convolution, the patches that its kernel sees, padding included, in the order of
weight.reshape(C, -1). A part of a split weight has the moments of its own input channels; tied weights, those of the
layer whose weight is shared. Grouped convolutions have no moments: each of their output channels sees other inputs.
They, and layers that no call reaches, stay as they are rounded without.

What several layers are fed with, as the queries, keys and values of an attention, is summed once. Layers are taken
in groups whose matrices fit a budget of memory, each by all calls anew.
"""

import hashlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from errors import InputError
from quant.checked_files import load_content, save_content
from quant.slots import free_keys
from quant.text_tokens import by_name, layers_of_text, text_mask

BUDGET_BYTES = 2 * 2**30  # of matrices that are summed at a time
CHUNK_NUMBERS = 2**24  # of inputs that are multiplied at a time
FORMAT = "qua2sedimo input moments"


@dataclass(frozen=True)
class Moments:
    """Moments of the inputs x [n] that a weight's output channels see, in the order of weight.reshape(C, -1)."""

    second: torch.Tensor  # [n, n], E[x x^T], in float32 (float64 of float64 inputs)
    mean: torch.Tensor  # [n], E[x]
    count: int  # of inputs

    @property
    def diagonal(self):
        """E[x^2] [n]."""
        return self.second.diagonal()


class _Input(NamedTuple):
    """What a weight is fed with."""

    path: str  # of its layer
    channels: tuple | None  # of its part; None: all
    width: int  # n


@torch.no_grad()
def collect(module, slots, calls, folder=None, settings="", budget_bytes=BUDGET_BYTES, show=False):
    """{WeightKey: Moments} of the inputs of a module's weights `slots`, over `calls`, functions that each call the module.

    With a `folder`, they are written there, one file per weight, and read when they are asked for: of a run that was cut
    off, those that are there are kept. Files tell what they depend on: the `settings`, a string in which the caller tells
    what the calls are (prompts, seed, steps), and the module's weights; files of anything else are written anew.
    InputError if an input has NaN or infinite values.
    """
    inputs = {key: _Input(key.path, slots[key].inputs, slots[key].shape[1:].numel()) for key in free_keys(slots)}
    layers = {key.path: module.get_submodule(key.path) for key in inputs}
    inputs = {key: each for key, each in inputs.items() if getattr(layers[each.path], "groups", 1) == 1}
    store = _Memory() if folder is None else MomentsFolder(folder, slots, f"{settings} {_weights_mark(module)}")
    missing = [key for key in inputs if key not in store]
    if not missing or not calls:
        return store
    text = layers_of_text(module, layers, calls[0])
    leaders = _leaders(layers, inputs, calls[0])
    wanted = dict.fromkeys(leaders[key] for key in missing if key in leaders)
    wanted = [key for key in wanted if key not in store]
    done = tqdm(total=len(wanted), desc="calibrating", unit="input", leave=False, delay=2, disable=not show)
    for group in _groups(wanted, inputs, budget_bytes):
        for key, moments in _sum(module, layers, {key: inputs[key] for key in group}, text, calls):
            store.put(key, moments)
            done.update()
    done.close()
    for key in missing:
        if key in leaders and leaders[key] != key:
            store.put_same(key, leaders[key])
    return store


def _groups(keys, inputs, budget_bytes):
    """Lists of the keys whose matrices are together within the budget; one alone if it is larger."""
    group, used = [], 0
    for key in keys:
        size = 4 * inputs[key].width ** 2
        if group and used + size > budget_bytes:
            yield group
            group, used = [], 0
        group, used = [*group, key], used + size
    if group:
        yield group


def _leaders(layers, inputs, call):
    """{key: key of the first weight that is fed with the same}, by a call; without those that it does not reach."""
    heard, seen = {path: [] for path in layers}, {}

    def hook(path):
        def note(_layer, args):
            known = seen.get(id(args[0]))
            if known is None or known[0]() is not args[0] or known[1] != args[0]._version:
                known = seen[id(args[0])] = (weakref.ref(args[0]), args[0]._version, object())
            heard[path].append(known[2])

        return note

    _listen(call, [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()])
    first, leaders = {}, {}
    for key, (path, channels, _) in inputs.items():
        if heard[path]:
            leaders[key] = first.setdefault((tuple(heard[path]), channels, _geometry(layers[path])), key)
    return leaders


def _listen(call, handles):
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()


def _geometry(layer):
    """What, beside its input, tells what patches a layer sees."""
    if isinstance(layer, nn.Linear):
        return None
    return layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode


def _sum(module, layers, inputs, text, calls):
    """Yield (key, Moments) of `inputs` {key: _Input}, over all calls."""
    sums, keep = {}, []

    def before(module, args, kwargs):
        _, mask = text_mask(by_name(module, args, kwargs))
        keep[:] = [None if mask is None else mask.bool()]

    def hook(key):
        def add(layer, args):
            mask = keep[0] if inputs[key].path in text else None
            for rows in input_rows(layer, args[0], inputs[key].channels, mask):
                sums.setdefault(key, _Sum(rows)).add(rows)

        return add

    handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layers[each.path].register_forward_pre_hook(hook(key)) for key, each in inputs.items()]

    def all_calls():
        for call in calls:
            call()

    _listen(all_calls, handles)
    for key in inputs:
        if key in sums:
            yield key, sums.pop(key).moments(key)


class _Sum:
    """Sums over inputs, on their device."""

    def __init__(self, rows):
        self.second = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.total = rows.new_zeros(rows.shape[1], dtype=torch.float64)
        self.count = 0

    def add(self, rows):
        """Take in inputs [r, n]."""
        self.second.addmm_(rows.T, rows)
        self.total += rows.sum(dim=0)
        self.count += len(rows)

    def moments(self, key):
        """Moments of what was taken in; InputError if it had values that are not numbers."""
        if not self.second.isfinite().all():
            raise InputError(f"{key}: its inputs have NaN or infinite values; calibrate in another precision (float32)")
        count = max(self.count, 1)
        return Moments((self.second / count).cpu(), (self.total / count).to(self.second.dtype).cpu(), self.count)


def input_rows(layer, input, channels=None, keep=None):
    """Yield the inputs [r, n] that the output channels of a Linear or convolution see in `input`, some at a time.

    `channels` (first, before last) are those of a part of the weight, `keep` [B, T] tells which tokens of an input
    [B, T, n] count. In float32, or float64 as the input.
    """
    dtype = torch.promote_types(input.dtype, torch.float32)
    if isinstance(layer, nn.Linear):
        input = input if channels is None else input[..., slice(*channels)]
        rows = input.reshape(-1, input.shape[-1]) if keep is None else input[keep]
        for some in rows.split(max(1, CHUNK_NUMBERS // rows.shape[1])):
            yield some.to(dtype)
        return
    batched = input if input.ndim == layer.weight.ndim else input[None]
    batched = batched if channels is None else batched[:, slice(*channels)]
    for sample in batched.split(1):
        yield _patches(layer, sample.to(dtype))


def _patches(layer, input):
    """The patches [r, n] of an input [N, channels, ...] that a convolution's kernel is laid on."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    patches = F.pad(input, layer._reversed_padding_repeated_twice, mode=mode)
    dims = len(layer.kernel_size)
    for dim, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2):
        patches = patches.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    places = range(2, 2 + dims)
    patches = patches.permute(0, *places, 1, *range(2 + dims, 2 + 2 * dims))  # [N, places, channels, kernel]
    return patches.reshape(patches.shape[: 1 + dims].numel(), -1)


class _Memory(dict):
    """Moments by weight, in memory."""

    def put(self, key, moments):
        self[key] = moments

    def put_same(self, key, other):
        self[key] = self[other]


class MomentsFolder(Mapping):
    """{WeightKey: Moments} in a folder: one file per weight, read when it is asked for.

    `depends_on` tells what the moments are of; files that tell otherwise, or are damaged, are not there.
    """

    def __init__(self, folder, slots, depends_on):
        self.folder, self.slots, self.depends_on = Path(folder), slots, depends_on
        self.found = {}  # key: whether its file is sound

    def _path(self, file_key):
        return self.folder / f"{file_key}.pt"

    def __contains__(self, key):
        if key not in self.found:
            self.found[key] = key in self.slots and self._read(self.slots[key].file_key) is not None
        return self.found[key]

    def __iter__(self):
        return (key for key in self.slots if key in self)

    def __len__(self):
        return sum(1 for _ in self)

    def __getitem__(self, key):
        content = self._read(self.slots[key].file_key) if key in self else None
        if content is None:
            raise KeyError(key)
        return Moments(content["second"], content["mean"], content["count"])

    def _read(self, file_key):
        """The content of a weight's file, or of the one with the same inputs; None if it is not there or not sound."""
        try:
            content = load_content(self._path(file_key))
            if content["format"] != FORMAT or content["depends_on"] != self.depends_on:
                return None
            if "same" in content:
                return self._read(content["same"]) if content["same"] != file_key else None
            width = len(content["mean"])
            return content if content["second"].shape == (width, width) else None
        except (KeyError, TypeError, AttributeError):
            return None

    def put(self, key, moments):
        """Write the moments of a weight's inputs."""
        self._write(key, {"second": moments.second, "mean": moments.mean, "count": moments.count})

    def put_same(self, key, other):
        """Write that a weight is fed with the same as another."""
        self._write(key, {"same": self.slots[other].file_key})

    def _write(self, key, content):
        save_content({"format": FORMAT, "depends_on": self.depends_on} | content, self._path(self.slots[key].file_key))
        self.found[key] = True


class Averaged(Mapping):
    """{WeightKey: Moments} over the inputs of several collections together, of as many calls each."""

    def __init__(self, *collections):
        self.collections = collections

    def __contains__(self, key):
        return all(key in each for each in self.collections)

    def __iter__(self):
        return (key for key in self.collections[0] if key in self)

    def __len__(self):
        return sum(1 for _ in self)

    def __getitem__(self, key):
        parts = [each[key] for each in self.collections]
        count = sum(part.count for part in parts)
        second = sum(part.second * (part.count / count) for part in parts)
        return Moments(second, sum(part.mean * (part.count / count) for part in parts), count)


def _weights_mark(module):
    """A hash of all that a module's outputs depend on beside its inputs."""
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
