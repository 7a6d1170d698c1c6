"""What a pipeline gives its denoiser: the arguments of the denoiser's first call, taken without running it."""

import inspect

import torch


class Taken(Exception):
    """Ends a pipeline's call once the denoiser's arguments are known."""


@torch.no_grad()
def first_call(pipeline, denoiser, **arguments):
    """The arguments {name: value} of the denoiser's first call in `pipeline(**arguments)`."""
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
    taken = {}

    def take(_module, positional, named):
        taken.update(zip(names, positional, strict=False))
        taken.update(named)
        raise Taken

    handle = denoiser.register_forward_pre_hook(take, with_kwargs=True)
    try:
        pipeline(**arguments, output_type="latent")
    except Taken:
        return taken
    finally:
        handle.remove()
    raise RuntimeError(f"{type(pipeline).__name__} did not call its {type(denoiser).__name__}")


def prompt_argument(pipeline):
    """Name of the argument that tells a pipeline what to draw: prompts, or class numbers."""
    return "class_labels" if "class_labels" in inspect.signature(pipeline.__call__).parameters else "prompt"


def map_tensors(function, value):
    """`value` with `function` applied to every tensor in it, through dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: map_tensors(function, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, item) for item in value)
    return value
