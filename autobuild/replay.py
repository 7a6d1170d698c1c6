"""Sensitivity of any denoiser's weights, as autobuild/sensitivity.py has it for the families.

What a pipeline asked of its denoiser on the way of a few images is asked again with one weight at a time quantized. How
far the output moves tells how sensitive the weight is. Where the sampler is given a linear combination of what the
denoiser answered at a step, as guidance is, it is that combination whose move counts; where not, the answers themselves.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

from autobuild.sensitivity import sketch
from errors import InputError
from models.inputs import map_tensors
from models.listening import overheard

LARGEST_RESIDUAL = 0.01  # relative, of what is taken for a linear combination; rounding leaves less


class Step(NamedTuple):
    """What a denoiser was asked between two steps of the sampler, for one image; all on the CPU."""

    calls: list  # [(arguments, tensors of the answer)]
    guided: torch.Tensor  # what the sampler was given


@torch.no_grad()
def record_steps(pipeline, names, calls, count):
    """{denoiser's name: [Step]} of about `count` steps, evenly spaced, of an image's way; one for each of the `calls`.

    Every denoiser is heard at least once an image, whenever it has its turn. InputError where the sampler is not heard.
    """
    heard = {name: [] for name in names}
    for call in calls:
        steps = _Steps(pipeline.scheduler, names, count)
        calls_of = ((getattr(pipeline, name), functools.partial(steps.called, name)) for name in names)
        with overheard(pipeline.scheduler, steps.stepped, *calls_of):
            pipeline(**call)
        for name in names:
            heard[name] += steps.taken[name]
    silent = [name for name in names if not heard[name]]
    if silent:
        raise InputError(
            f"{type(pipeline).__name__}: its {silent[0]} is not asked between steps of its sampler, so that sensitivities "
            "cannot be measured; choose by --config, or give more --steps"
        )
    return heard


class _Steps:
    """Those that are taken of the steps of one image's way, as the denoisers' calls and the sampler's steps are heard."""

    def __init__(self, scheduler, names, count):
        self.scheduler, self.count, self.number = scheduler, count, 0
        self.calls = {name: [] for name in names}  # since the last step
        self.taken = {name: [] for name in names}

    def called(self, name, arguments, output):
        if self._is_chosen(name):
            self.calls[name].append((map_tensors(kept, arguments), [kept(tensor) for tensor in tensors_of(output)]))

    def _is_chosen(self, name):
        chosen = np.linspace(0, len(self.scheduler.timesteps) - 1, self.count).round().astype(int)
        return self.number in chosen or not self.taken[name]

    def stepped(self, model_output):
        for name, calls in self.calls.items():
            if calls:
                self.taken[name].append(Step(list(calls), kept(model_output)))
                calls.clear()
        self.number += 1


def kept(tensor):
    return tensor.detach().to("cpu", copy=True)


def tensors_of(output):
    """The tensors of a denoiser's output, which is one, or a list of them."""
    return [output] if torch.is_tensor(output) else list(output)


class Replay:
    """Asks a denoiser the same steps again: tells how its output has shifted from what it was."""

    def __init__(self, denoiser, steps, device):
        self.denoiser, self.device, self.steps = denoiser, device, steps
        self.guidance = [guidance_weights(step) for step in steps]
        self.before = self._ask()

    def shift(self):
        """(change, shift) of the output: the shift in units of its norm, sketched; the change its exact squared norm."""
        shifts = (self._ask() - self.before) / self.before.norm().clamp(min=1e-30)
        return float(shifts.double().square().sum()), sketch(shifts)

    @torch.no_grad()
    def _ask(self):
        """The outputs at all steps, one after another, as float32 numbers [K] on the CPU."""
        return torch.cat([self._at(step, weights) for step, weights in zip(self.steps, self.guidance, strict=True)])

    def _at(self, step, weights):
        answers = []
        for arguments, _ in step.calls:
            output = self.denoiser(**map_tensors(lambda tensor: tensor.to(self.device), arguments))
            answers.append([tensor.cpu() for tensor in tensors_of(output[0])])
        if weights is None:
            return torch.cat([tensor.float().flatten() for tensors in answers for tensor in tensors])
        return weights @ torch.cat([copies(tensors, step.guided) for tensors in answers])


def guidance_weights(step):
    """How what the sampler was given is made of the answers, by least squares [copies]; None if it is not linear."""
    rows = [copies(tensors, step.guided) for _, tensors in step.calls]
    if any(each is None for each in rows):
        return None
    rows, guided = torch.cat(rows).double(), step.guided.double().flatten()
    weights = torch.linalg.lstsq(rows.T, guided[:, None], driver="gelsd").solution[:, 0]
    residual = (weights @ rows - guided).norm()
    return weights.float() if residual <= LARGEST_RESIDUAL * guided.norm() else None


def copies(tensors, guided):
    """An answer as float32 rows [copies, K] of the form of `guided` [N, C, ...]; None if it has another.

    Channels of the answer beyond C tell the variance.
    """
    output = tensors[0].float() if len(tensors) == 1 else torch.stack([tensor.float() for tensor in tensors])
    if output.ndim == guided.ndim and output.shape[2:] == guided.shape[2:] and output.shape[1] >= guided.shape[1]:
        output = output[:, : guided.shape[1]]
    return output.reshape(-1, guided.numel()) if output.numel() % guided.numel() == 0 else None
