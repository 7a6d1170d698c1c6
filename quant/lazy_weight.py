"""The weight of a packed layer, for whoever reads `layer.weight`: shape, dtype and device at once, values if asked."""

import torch
from torch.utils._pytree import tree_map_only

UNCHANGED = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class LazyWeight(torch.Tensor):
    """A stand-in of the layer's weight shape and computing dtype that decodes the codes when an operation needs values.

    RuntimeError for what would write to it: it would be lost.
    """

    @staticmethod
    def __new__(cls, layer):
        shape, device = layer.weight_shape, layer.codes.device
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=layer.compute_dtype, device=device)

    def __init__(self, layer):
        self.layer = layer

    def __repr__(self, **_):
        return f"LazyWeight(shape={list(self.shape)}, dtype={self.dtype}, {'+'.join(p.method for p in self.layer.parts)})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.data.__set__:
            raise _read_only()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in UNCHANGED:
            return args[0]
        written = [
            each
            for each, told in zip(args, func._schema.arguments, strict=False)
            if told.alias_info and told.alias_info.is_write
        ]
        if any(isinstance(each, LazyWeight) for each in (*written, kwargs.get("out"))):
            raise _read_only()
        args, kwargs = tree_map_only(LazyWeight, lambda weight: weight.layer.decoded(weight.dtype), (args, kwargs))
        return func(*args, **kwargs)


def _read_only():
    return RuntimeError(
        "the weight of a packed layer cannot be written to (fusing a LoRA, training): dequantize the model first, "
        "or leave the LoRA unfused"
    )
