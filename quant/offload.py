"""Layers whose weights stay on the host until they run: accelerate's hooks, and how to change a weight under one."""

import contextlib

from accelerate.hooks import add_hook_to_module, remove_hook_from_module


@contextlib.contextmanager
def at_home(layer):
    """The layer with its weights where they are kept, so that they can be read and replaced; offloaded again after."""
    hook = take_hook(layer)
    try:
        yield
    finally:
        put_hook(layer, hook)


def take_hook(layer):
    """Take a hook off the layer, whose weights come back from the meta device; None if there is none.

    The hooks of all layers share one dict of weights. The layer's leave it, so that a weight that is replaced is let go.
    """
    hook = layer.__dict__.get("_hf_hook")
    if hook is None:
        return None
    remove_hook_from_module(layer)
    kept = getattr(hook, "weights_map", None)
    for name in (*layer._parameters, *layer._buffers):
        if hasattr(kept, "dataset"):
            kept.dataset.pop(f"{kept.prefix}{name}", None)
    hook.weights_map = None  # made anew by `put_hook`
    return hook


def put_hook(layer, hook):
    """Put a hook that was taken off back, on this layer or on the one that takes its place."""
    if hook is not None:
        add_hook_to_module(layer, hook)
