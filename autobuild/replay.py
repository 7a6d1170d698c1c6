"""Sensitivity of any denoiser's weights, as autobuild/sensitivity.py has it for the families.

What a pipeline asked of its denoiser on the way of a few images is asked again with one weight at a time quantized. How
far the output moves tells how sensitive the weight is. Where the sampler is given a linear combination of what the
denoiser answered at a step, as guidance is, it is that combination whose move counts; where not, the answers themselves.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch

from autobuild.prefix import Prefix
from autobuild.sensitivity import sketch
from autobuild.sketching import Question
from errors import InputError
from models.drawing import BatchSize
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
        self.batch_size = BatchSize(1)
        self.before = None  # the outputs, and where calls start, once shifts are asked for
        self.prefix = None

    def start_at(self, layers):
        """Compute calls from the block of the first of some layers on, in what follows; all weights are float now.

        Returns how many blocks run before it: layers are best visited in that order.
        """
        if self.before is None:
            self.before = self._ask()
            self.prefix = Prefix(self.denoiser, self._look)
        place = self.prefix.place_of(layers)
        self.prefix.move(place, self._ask)
        return place

    def shift(self, put, method):
        """(change, shift) of the output by `put(method)`: the shift in units of its norm, sketched; the change its exact
        squared norm. `start_at` comes before it.
        """
        put(method)
        shifts = (self._ask() - self.before) / self.before.norm().clamp(min=1e-30)
        return float(shifts.double().square().sum()), sketch(shifts)

    def questions(self):
        """The steps as Questions of a sketch."""
        for number, (step, weights) in enumerate(zip(self.steps, self.guidance, strict=True)):
            shape = (sum(tensor.numel() for _, tensors in step.calls for tensor in tensors),)
            shape = shape if weights is None else (step.guided.numel(),)
            yield Question(1, 0, number, shape, 1, functools.partial(self._differentiable, number))

    def _differentiable(self, number, _indices):
        return self._at(number, self._output)[None]

    @torch.no_grad()
    def _look(self):
        self._output((0, 0), self.steps[0].calls[0][0])

    @torch.no_grad()
    def _ask(self):
        """The outputs at all steps, one after another, as float32 numbers [K] on the CPU."""

        def output(key, arguments):
            run = functools.partial(self._output, key, arguments)
            return self.prefix.run(key, run) if self.prefix else run()

        return torch.cat([self._at(number, output) for number in range(len(self.steps))])

    def _at(self, number, output_of):
        step, weights = self.steps[number], self.guidance[number]
        answers = []
        for place, (arguments, _) in enumerate(step.calls):
            output = output_of((number, place), arguments)
            answers.append([tensor.cpu() for tensor in tensors_of(output)])
        if weights is None:
            return torch.cat([tensor.float().flatten() for tensors in answers for tensor in tensors])
        return weights @ torch.cat([copies(tensors, step.guided) for tensors in answers])

    def _output(self, _key, arguments):
        return self.denoiser(**map_tensors(lambda tensor: tensor.to(self.device), arguments))[0]


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
