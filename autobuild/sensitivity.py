"""Sensitivity without labels: how far a denoiser's output moves when one weight alone takes a method.

For those who have hours, not weeks. A few images are drawn in full precision; what the denoiser was asked at some of
their steps is asked again with each weight under each method, and the shift of its guided output taken. Shifts are
small, so those of several weights add up, to first order: not their squares but they themselves. Where weights push the
output the same way it goes far, where they push against one another it stays. The best configuration is the one whose
shifts have the shortest sum.
"""

import functools
import inspect
from typing import NamedTuple

import numpy as np
import torch

from evaluation.images import noise_generators
from models.inputs import map_tensors

SKETCH = 8192  # numbers that a shift is kept as


class Call(NamedTuple):
    """One call of the denoiser in a pipeline, and what became of its output, of N images."""

    arguments: dict
    output: torch.Tensor  # [copies * N, C', h, w]; guidance asks for two copies of each image
    guided: torch.Tensor  # [N, C, h, w] what the sampler was given; channels of C' beyond C tell the variance


@torch.no_grad()
def record_calls(sampler, prompts, settings, count):
    """The denoiser's calls at `count` steps, evenly spaced, of the prompts' way from noise to images."""
    denoiser, scheduler = sampler.denoiser, sampler.pipeline.scheduler
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
    asked, guided = [], []
    step = scheduler.step

    def asking(_module, positional, named, output):
        arguments = dict(zip(names, positional, strict=False)) | named
        asked.append((map_tensors(torch.clone, arguments), output[0].clone()))

    @functools.wraps(step)
    def stepping(model_output, *args, **kwargs):
        if len(guided) < len(asked):  # a refiner may step by the same sampler
            guided.append(model_output[: len(prompts)].clone())
        return step(model_output, *args, **kwargs)

    handle = denoiser.register_forward_hook(asking, with_kwargs=True)
    scheduler.step = stepping
    try:
        generators = noise_generators(settings.seed, range(len(prompts)))
        sampler.images(prompts, generators, settings.steps, settings.guidance, settings.res)
    finally:
        handle.remove()
        del scheduler.step
    calls = [Call(*question, answer) for question, answer in zip(asked, guided, strict=True)]
    return [calls[place] for place in np.unique(np.linspace(0, len(calls) - 1, count).round().astype(int))]


class Probe:
    """Asks a denoiser the same again and tells how its guided output has shifted; `together` calls at a time."""

    def __init__(self, denoiser, calls, together):
        self.denoiser = denoiser
        self.groups = [calls[first : first + together] for first in range(0, len(calls), together)]
        self.arguments = [merged([call.arguments for call in group], len(group[0].output)) for group in self.groups]
        self.guidance = [guidance_weights(call) for call in calls]
        self.before = [after for place in range(len(self.groups)) for after in self._ask(place)]
        self.norm = torch.cat([each.flatten() for each in self.before]).norm()
        self.sketch = Sketch(sum(each.numel() for each in self.before), self.norm.device)

    @torch.no_grad()
    def shift(self):
        """(change, shift): the shift of the guided output over its norm at first, as a sketch; its exact squared norm."""
        after = [each for place in range(len(self.groups)) for each in self._ask(place)]
        shifts = torch.cat([(now - then).flatten() for now, then in zip(after, self.before, strict=True)]) / self.norm
        return float(shifts.double().square().sum()), self.sketch(shifts).cpu()

    @torch.no_grad()
    def _ask(self, place):
        """Guided outputs [N, C, h, w] of a group's calls."""
        group = self.groups[place]
        outputs = self.denoiser(**self.arguments[place])[0].chunk(len(group))
        first = sum(len(each) for each in self.groups[:place])
        return [
            torch.einsum("k,k...->...", self.guidance[first + number], copies(output, call.guided))
            for number, (output, call) in enumerate(zip(outputs, group, strict=True))
        ]


class Sketch:
    """Brings a vector down to SKETCH numbers by a linear map that about keeps inner products: each number goes to a place
    and with a sign drawn at random (Charikar et al., 2002). Vectors no longer than that are kept as they are.
    """

    def __init__(self, length, device):
        self.length = length
        if length > SKETCH:
            generator = torch.Generator().manual_seed(0)
            self.places = torch.randint(SKETCH, (length,), generator=generator).to(device)
            self.signs = (torch.randint(2, (length,), generator=generator) * 2 - 1).to(device, torch.float32)

    def __call__(self, vector):
        if self.length <= SKETCH:
            return vector
        return vector.new_zeros(SKETCH).index_add_(0, self.places, vector * self.signs)


def copies(output, guided):
    """A call's output as float32 [copies, N, C, h, w]."""
    return output.float().view(-1, len(guided), *output.shape[1:])[:, :, : guided.shape[1]]


def guidance_weights(call):
    """How the pipeline weights the copies of an image: guidance is a linear combination of them. By least squares."""
    known = copies(call.output, call.guided).flatten(1).double().cpu()
    weights = torch.linalg.lstsq(known.T, call.guided.flatten().double().cpu()[:, None]).solution[:, 0]
    return weights.to(call.output.device, torch.float32)


def merged(arguments, count):
    """The arguments of several calls of `count` rows each as those of one."""
    first = arguments[0]
    if isinstance(first, dict):
        return {name: merged([each[name] for each in arguments], count) for name in first}
    if isinstance(first, list | tuple):
        return type(first)(merged(list(each), count) for each in zip(*arguments, strict=True))
    if not isinstance(first, torch.Tensor):
        return first
    if first.ndim == 0:  # a timestep
        return torch.stack(arguments).repeat_interleave(count)
    if len(first) in (1, count):
        return torch.cat([each.expand(count, *each.shape[1:]) for each in arguments])
    return first  # the same for every image, such as rotary embeddings
