"""`fuse_qkv_projections` of diffusers' on packed layers, which stay as they are.

diffusers makes one float Linear of the weights of several projections of one input. Packed ones may have as many methods,
and a float copy of them would undo what packing saves. So the layer that is made calls them, and holds nothing itself.
"""

import copy
import weakref

import torch
from torch import nn

from quant.layers import PackedLayer

# {name in an attention module of the layer that is made: the projections that it stands for, in the order of its output}
JOINED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


class Owner:
    """The module that something is a part of: copied and pickled with it, and not kept alive by it."""

    def __init__(self, module):
        self.get = weakref.ref(module)

    def __deepcopy__(self, memo):
        return type(self)(copy.deepcopy(self.get(), memo))

    def __reduce__(self):
        return type(self), (self.get(),)


class Joined(nn.Module):
    """The outputs of several layers of `attention` side by side, [..., sum of their features]."""

    def __init__(self, attention, names):
        super().__init__()
        self.owner, self.names = Owner(attention), names

    def forward(self, input):
        """The outputs of the layers for one input [..., n], side by side: [..., sum of their features]."""
        attention = self.owner.get()
        return torch.cat([getattr(attention, name)(input) for name in self.names], dim=-1)


class Joining(Owner):
    """What stands for `fuse_projections` of an attention module; diffusers' own where no projection is packed."""

    def __call__(self, *args, **kwargs):
        attention = self.get()
        projections = {name: getattr(attention, name, None) for names in JOINED.values() for name in names}
        supports = getattr(attention, "_supports_qkv_fusion", True)
        if not supports or not any(isinstance(layer, PackedLayer) for layer in projections.values()):
            type(attention).fuse_projections(attention, *args, **kwargs)
            return
        for made, names in JOINED.items():
            if all(projections[name] is not None for name in names):
                setattr(attention, made, Joined(attention, names))
        attention.fused_projections = True


def join_instead_of_fusing(model):
    """Let the attention modules of a packed model join the projections that they are asked to fuse."""
    for module in model.modules():
        if hasattr(type(module), "fuse_projections"):
            module.fuse_projections = Joining(module)


def is_fused(path, state_dict):
    """Whether the layer at `path` is one that diffusers has made of others, which are in the state dictionary, too."""
    parent, _, made = path.rpartition(".")
    first = f"{parent}.{JOINED[made][0]}" if made in JOINED else None
    return any(f"{first}.{leaf}" in state_dict for leaf in ("codes", "weight"))
