"""Which tokens of a denoiser's text are padding, and which of its layers are fed with text.

Pipelines pad texts to a common length and tell by a mask which tokens count. A layer that is fed with text sees the
padding too, but what it makes of that is masked in the attention behind it: statistics of inputs leave it out. Where a
model attends to padding, as Hunyuan-DiT does to a learned embedding in its place, it has no such mask.
"""

import inspect

import torch
import torch.nn.functional as F

TEXT = "encoder_hidden_states"  # [B, T, D]
MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask", "attention_mask")  # [B, T], 0 for padding


def by_name(module, args, kwargs):
    """The arguments of a call of `module` {name: value}."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def text_mask(arguments):
    """(name, mask [B, T]) of a call's text; (None, None) where it has none."""
    text = arguments.get(TEXT)
    if torch.is_tensor(text) and text.ndim == 3:
        for name in MASKS:
            mask = arguments.get(name)
            if torch.is_tensor(mask) and mask.shape == text.shape[:2]:
                return name, mask
    return None, None


@torch.no_grad()
def layers_of_text(module, layers, call):
    """Paths of those of `layers` {path: module} whose inputs [B, T, n] are the tokens of the text.

    The module is called twice, the second time with a masked token more: T grows by one in these layers alone, whatever
    number of tokens a picture has. None of them where the text has no mask; where the module takes no longer text, those
    whose inputs are as many as its tokens.
    """
    plain = _token_counts(module, layers, call, more=0)
    if plain is None:
        return frozenset()
    try:
        longer = _token_counts(module, layers, call, more=1)
    except Exception:  # whatever a forward does with a length that it does not expect
        return frozenset(path for path, count in plain.items() if count == plain[TEXT])
    return frozenset(path for path in plain if path != TEXT and longer.get(path) == plain[path] + 1)


def _token_counts(module, layers, call, more):
    """{path: T} of the layers with inputs [B, T, n], in a call whose text has so many `more` tokens, T of which is there
    too as TEXT, before any is added; None where the text has no mask."""
    counts = {}

    def lengthen(module, args, kwargs):
        arguments = by_name(module, args, kwargs)
        name, mask = text_mask(arguments)
        if name is None:
            return None
        counts[TEXT] = arguments[TEXT].shape[1]
        changes = {TEXT: F.pad(arguments[TEXT], (0, 0, 0, more)), name: F.pad(mask, (0, more))}
        return (), arguments | changes

    def count(path):
        def hook(_layer, args):
            counts[path] = args[0].shape[1] if args[0].ndim == 3 else -1

        return hook

    handles = [module.register_forward_pre_hook(lengthen, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(count(path)) for path, layer in layers.items()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return counts if TEXT in counts else None
