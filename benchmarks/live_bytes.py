"""Peak memory of a module's activations, reckoned from shapes: it runs on the meta device, where tensors have no values."""

import weakref

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@torch.no_grad()
def peak_bytes(module, call):
    """Bytes of tensors alive at once, at most, while `call` runs `module`; its weights and the arguments are not counted.

    Attention is counted as kernels do it that keep no scores. What kernels take for themselves is not known.
    """
    with _FusedAttention(), _LiveBytes(module) as live:
        call()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators make, until they are let go."""

    def __init__(self, module):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()
        for tensor in (*module.parameters(), *module.buffers()):
            self.known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self.known.add(tensor.untyped_storage())
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            self._see(tensor.untyped_storage())
        return made

    def _see(self, storage):
        if storage in self.known:
            return
        self.known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._let_go, storage.nbytes())

    def _let_go(self, count):
        self.now -= count


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        called = _fused if func is F.scaled_dot_product_attention else func
        return called(*args, **(kwargs or {}))


def _fused(query, key, value, *_args, **_kwargs):
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _tensors(tree):
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
