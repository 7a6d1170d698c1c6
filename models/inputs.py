"""Arguments of pipelines and denoisers: by which name prompts go in, and tensors wherever they are in them."""

import inspect

import torch


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
