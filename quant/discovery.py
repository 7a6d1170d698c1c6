"""How a module uses its weight layers, found out by one call of it: which are called, which are only read.

A layer that replaces another in place takes part only where the module calls it. Some modules read a layer's
`weight` instead: HunyuanDiT's pooler hands those of four Linear layers to one function of PyTorch, as does
`nn.MultiheadAttention` with that of its last. Nothing in a module's structure tells.
"""

import contextlib
from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

from quant.slots import weight_layers

# What may be asked of a weight without reading its values: attributes and methods of `torch.Tensor`.
FORM = {
    *("device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_mps", "is_nested"),
    *("is_quantized", "is_sparse", "is_xpu", "itemsize", "layout", "nbytes", "ndim", "requires_grad", "shape"),
    *("__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point"),
    *("ndimension", "nelement", "numel", "size", "storage_offset", "stride"),
}


@dataclass(frozen=True)
class WeightUse:
    """Paths of weight layers by how a call of their module used them, each in the module's order.

    A layer may be in several of the first three, and is in `idle` if it is in none of the first two.
    """

    called: tuple[str, ...]  # their forward ran
    read: tuple[str, ...]  # their weight's values went into an operation outside of their forward
    asked: tuple[str, ...]  # of their weight the shape, precision or device was asked outside of their forward
    idle: tuple[str, ...]  # neither called nor read


def weight_use(module, call):
    """How `call()` used the weight layers in `module` (see `slots.weight_layers`): a `WeightUse`.

    `call` runs the module once, alone or in a pipeline; small inputs do, and the meta device if the module's
    code runs there. It must not be compiled, nor replace weights (as hooks that offload single layers do). A layer
    whose `forward` is called directly, past PyTorch's hooks, counts as read.
    """
    layers = dict(weight_layers(module))
    watch = _Watch(layers)
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for path, layer in layers.items():
            hooks.enter_context(_removed(layer.register_forward_pre_hook(watch.entering(path))))
            hooks.enter_context(_removed(layer.register_forward_hook(watch.leaving(path), always_call=True)))
        with watch:
            call()
    found = (watch.called, watch.read, watch.asked, layers.keys() - watch.called - watch.read)
    return WeightUse(*(tuple(path for path in layers if path in paths) for paths in found))


@contextlib.contextmanager
def _removed(handle):
    """A hook for as long as the context lasts."""
    try:
        yield
    finally:
        handle.remove()


class _Watch(TorchFunctionMode):
    """Notes every operation that takes a layer's weight while that layer's forward does not run."""

    def __init__(self, layers):
        super().__init__()
        self.owners = defaultdict(list)  # identity of a weight -> paths of the layers that have it
        for path, layer in layers.items():
            self.owners[id(layer.weight)].append(path)
        self.running = Counter()  # path -> calls of its layer that have not ended
        self.called, self.read, self.asked = set(), set(), set()

    def entering(self, path):
        def note(_layer, _inputs):
            self.called.add(path)
            self.running[path] += 1

        return note

    def leaving(self, path):
        def note(_layer, _inputs, _output):
            self.running[path] -= 1

        return note

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        noted = self.asked if _name(function) in FORM else self.read
        for tensor in _tensors((args, kwargs)):
            paths = self.owners.get(id(tensor), ())
            if not any(self.running[path] for path in paths):
                noted.update(paths)
        return function(*args, **kwargs)


def _name(function):
    """Name of a function or method, and of the attribute that a getter gets."""
    name = getattr(function, "__name__", "")
    return getattr(function.__self__, "__name__", "") if name == "__get__" else name


def _tensors(value):
    """The tensors in `value`, through dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
