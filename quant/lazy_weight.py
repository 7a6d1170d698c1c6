"""The weight of a packed layer, for whoever reads `layer.weight`: shape, dtype and device at once, values if asked."""

import functools
import logging

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
UNCHANGED = (aten.detach.default, aten.alias.default)
SETTERS = (torch.Tensor.data.__set__, torch.Tensor.__setitem__)
# They would give the address of memory that a stand-in has not.
OF_MEMORY = (torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.storage)
log = logging.getLogger("qua2sedimo")


class LazyWeight(torch.Tensor):
    """A stand-in of the layer's weight shape and computing dtype that decodes the codes when an operation needs values.

    RuntimeError for what would write to it, or to a view of it: it would be lost.
    """

    @staticmethod
    def __new__(cls, layer):
        return cls._of_form(layer.weight_shape, layer.compute_dtype, layer.tensors(layer.parts[0])[0].device)

    @classmethod
    def _of_form(cls, shape, dtype, device):
        """One NaN in every place: `other.data = weight` takes the memory as it is, and would crash if there were none."""
        return torch.Tensor._make_subclass(cls, torch.full((), torch.nan, dtype=dtype, device=device).expand(shape))

    def __init__(self, layer):
        self.layer = layer

    def values(self):
        """The decoded weight, a tensor of the stand-in's shape and dtype."""
        return self.layer.decoded(self.dtype)

    def __repr__(self, **_):
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo):
        return self.values().clone()

    def __reduce_ex__(self, protocol):
        return self.values().clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in OF_MEMORY:
            raise RuntimeError("the weight of a packed layer has no memory of its own: take `weight.clone()`")
        if func in SETTERS and isinstance(args[0], LazyWeight):
            raise read_only()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in UNCHANGED:
            return args[0]
        if any(isinstance(each, LazyWeight) for each in tree_leaves(_written(func, args, kwargs))):
            raise read_only()
        if func is aten.cat.default:
            _warn_of_growth()
        given = func(*_decoded(args), **_decoded(kwargs))
        is_view = any(told.alias_info and not told.alias_info.is_write for told in func._schema.returns)
        return tree_map_only(torch.Tensor, ViewOfLazyWeight, given) if is_view else given


class ViewOfLazyWeight(LazyWeight):
    """A view of a packed layer's weight, decoded: it can be read, and writing to it is refused as to the weight."""

    @staticmethod
    def __new__(cls, view):
        return cls._of_form(view.shape, view.dtype, view.device)

    def __init__(self, view):
        self.view_values = view

    def values(self):
        """The view as a plain tensor."""
        return self.view_values


def _decoded(arguments):
    return tree_map_only(LazyWeight, lambda weight: weight.values(), arguments)


def _written(func, args, kwargs):
    """The arguments that an operator writes to."""
    told = func._schema.arguments
    positional = [each for each, argument in zip(args, told, strict=False) if _is_written(argument)]
    return positional + [kwargs[argument.name] for argument in told if argument.name in kwargs and _is_written(argument)]


def _is_written(argument):
    return argument.alias_info is not None and argument.alias_info.is_write


def read_only():
    """The RuntimeError for whoever writes to the weight of a packed layer."""
    return RuntimeError(
        "the weight of a packed layer cannot be written to or replaced (fusing a LoRA, training): dequantize the model "
        "first, or leave the LoRA unfused"
    )


@functools.cache
def _warn_of_growth():
    log.warning("packed weights are joined into a float one (as by fusing projections): what holds it grows by that")
