"""Sensitivity without labels: how far a denoiser's output moves when one weight alone takes a method.

For those who have hours, not weeks. A few images are brought from noise to latents in full precision; what the denoiser
was asked at some of their steps is asked again with each weight under each method, and the shift of its guided output
taken. Shifts are small, so those of several weights add up, to first order: not their squares but they themselves. Where
weights push the output the same way it goes far, where they push against one another it stays. The best configuration is
the one whose shifts have the shortest sum.
"""

import contextlib
import functools
from typing import NamedTuple

import numpy as np
import torch

from autobuild.prefix import Prefix
from autobuild.sketching import Question
from errors import InputError
from models.drawing import in_batches, noise_generators
from models.inputs import map_tensors
from models.listening import Taken, answering_once, overheard, stopping

SKETCH = 8192  # numbers that a shift is kept as


class Call(NamedTuple):
    """One call of the denoiser in a pipeline, and what became of its output, of N images; on the CPU."""

    arguments: dict
    output: torch.Tensor  # [copies * N, C', h, w]; guidance asks for two copies of each image
    guided: torch.Tensor  # [N, C, h, w] what the sampler was given; channels of C' beyond C tell the variance


class Recording(NamedTuple):
    """The calls at some steps on the way of some images."""

    steps: list  # of each step the calls, one for the images that were drawn together
    lengths: dict  # of the arguments' tensors in a call for one image
    device: torch.device  # of the denoiser


@torch.no_grad()
def record_calls(sampler, prompts, settings, count):
    """The denoiser's calls at `count` steps, evenly spaced, of the prompts' way from noise to latents.

    `settings` are SamplingSettings. Nothing is decoded, and nothing drawn beyond the last of those steps.
    """
    calls, lengths, device = rehearse(sampler, prompts[0], settings)
    chosen = np.unique(np.linspace(0, calls - 1, count).round().astype(int)).tolist()
    take = functools.partial(take_calls, sampler, prompts, settings, chosen)
    batches = list(in_batches(take, range(len(prompts)), settings.batch_size))
    return Recording(list(zip(*batches, strict=True)), lengths, device)


def rehearse(sampler, prompt, settings):
    """(number of the denoiser's calls on an image's way, lengths of their arguments, device of their outputs).

    The denoiser is asked once, and its answer taken for all later ones. InputError if calls and steps do not alternate.
    """
    heard, found = [], []

    def on_call(arguments, output):
        heard.append("call")
        found.append((map_tensors(_length, arguments), output.device))

    denoiser, scheduler = sampler.denoiser, sampler.pipeline.scheduler
    with answering_once(denoiser), overheard(scheduler, lambda _: heard.append("step"), (denoiser, on_call)):
        draw(sampler, [prompt], range(1), settings)
    calls = len(heard) // 2
    if heard != ["call", "step"] * calls:
        name = type(sampler.pipeline).__name__
        raise InputError(
            f"{name}: asks its denoiser {heard.count('call')} times in {heard.count('step')} steps of its sampler, not once "
            "in each, so that it cannot be asked without labels; label configurations with *_eval_random.py"
        )
    return calls, *found[0]


def take_calls(sampler, prompts, settings, chosen, indices):
    """The calls with the numbers `chosen` on the way of the prompts with the numbers `indices`."""
    calls, number = [], -1

    def on_call(arguments, output):
        nonlocal number
        number += 1
        if number in chosen:
            calls.append(Call(map_tensors(_kept, arguments), _kept(output), None))

    def on_step(guided):
        if number in chosen:
            calls[-1] = calls[-1]._replace(guided=_kept(guided[: len(indices)]))
        if number == chosen[-1]:
            raise Taken

    with overheard(sampler.pipeline.scheduler, on_step, (sampler.denoiser, on_call)):
        draw(sampler, prompts[indices.start : indices.stop], indices, settings)
    return calls


def draw(sampler, prompts, indices, settings):
    """Take the pipeline through its steps from noise to latents, of the images with the numbers `indices`."""
    call = sampler.arguments(prompts, settings.res)
    call |= {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance, "output_type": "latent"}
    if settings.hand_over:
        call["denoising_end"] = settings.hand_over
    # Some pipelines decode whatever they are asked for.
    with contextlib.suppress(Taken), stopping(sampler.pipeline.vae, "decode"):
        sampler.pipeline(**call, generator=noise_generators(settings.seed, indices))


def _length(tensor):
    return len(tensor) if tensor.ndim else 0


def _kept(tensor):
    return tensor.detach().to("cpu", copy=True)


class Probe:
    """Asks a denoiser the same again, a BatchSize of images at a time: tells how its guided output has shifted."""

    def __init__(self, denoiser, recording, batch_size):
        self.denoiser, self.recording, self.batch_size = denoiser, recording, batch_size
        self.guidance = [guidance_weights(calls) for calls in recording.steps]
        self.together = None  # images that `before` was asked with
        self.prefix = None
        self._ask_before()
        self.prefix = Prefix(denoiser, self._look)

    @torch.no_grad()
    def _look(self):
        self._output(self.recording.steps[0][0], range(1))

    def start_at(self, layers):
        """Compute calls from the block of the first of some layers on, in what follows; all weights are float now.

        Returns how many blocks run before it: layers are best visited in that order.
        """
        place = self.prefix.place_of(layers)
        self.prefix.move(place, self._ask)
        return place

    def shift(self, put, method):
        """(change, shift) of the guided output by `put(method)`; `put(None)` puts full precision back.

        The shift is in units of the output's norm, and is a sketch; the change is its exact squared norm. Both sides are
        asked with equally many images at a time, for kernels round differently: where memory runs out, both anew.
        """
        put(method)
        after = self._ask()
        if self.batch_size.images != self.together:
            put(None)
            self._ask_before()
            return self.shift(put, method)
        shifts = (after - self.before) / self.before.norm()
        return float(shifts.double().square().sum()), sketch(shifts)

    def _ask_before(self):
        while self.together != self.batch_size.images:  # it may be halved meanwhile
            self.together = self.batch_size.images
            if self.prefix is not None:
                self.prefix.forget()
            self.before = self._ask()

    @torch.no_grad()
    def _ask(self):
        """The guided outputs at all steps of all images, one after another, as float32 numbers [K] on the CPU."""
        answers = []
        for step, calls in enumerate(self.recording.steps):
            for number, call in enumerate(calls):
                answer = functools.partial(self._answer, step, number)
                answers += in_batches(answer, range(len(call.guided)), self.batch_size)
        return torch.cat(answers)

    def _answer(self, step, number, indices):
        """Guided outputs of some images of a call at a step, one after another."""
        call = self.recording.steps[step][number]
        run = functools.partial(self._output, call, indices)
        output = self.prefix.run((step, number, indices), run) if self.prefix else run()
        return self._guided(step, output.cpu(), len(indices)).flatten()

    def questions(self):
        """The calls as Questions of a sketch."""
        for step, calls in enumerate(self.recording.steps):
            first = 0
            for call in calls:
                count = len(call.guided)
                ask = functools.partial(self._differentiable, step, call)
                yield Question(count, first, step, call.guided.shape[1:], len(self.guidance[step]), ask)
                first += count

    def _differentiable(self, step, call, indices):
        return self._guided(step, self._output(call, indices), len(indices))

    def _output(self, call, indices):
        lengths, device = self.recording.lengths, self.recording.device
        arguments = rows_of(call.arguments, lengths, len(call.guided), indices)
        return self.denoiser(**map_tensors(lambda tensor: tensor.to(device), arguments))[0]

    def _guided(self, step, output, images):
        """The guided outputs [N, C, h, w] that the outputs of N images are combined to."""
        guided = self.recording.steps[step][0].guided[:1].expand(images, -1, -1, -1)
        return torch.einsum("k,k...->...", self.guidance[step].to(output.device), copies(output, guided))


def sketch(vector):
    """A vector brought down to SKETCH numbers by a linear map that about keeps inner products: each number goes to a place
    and with a sign drawn at random (Charikar et al., 2002). Vectors no longer than that are kept as they are.
    """
    if len(vector) <= SKETCH:
        return vector
    places, signs = _places_and_signs(len(vector))
    return vector.new_zeros(SKETCH).index_add_(0, places, vector * signs)


@functools.lru_cache(maxsize=1)
def _places_and_signs(length):
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(SKETCH, (length,), generator=generator)
    return places, (torch.randint(2, (length,), generator=generator) * 2 - 1).float()


def copies(output, guided):
    """A call's output as float32 [copies, N, C, h, w]."""
    return output.float().view(-1, len(guided), *output.shape[1:])[:, :, : guided.shape[1]]


def guidance_weights(calls):
    """How the pipeline weights the copies of an image at a step: guidance is a linear combination. By least squares."""
    known = torch.cat([copies(call.output, call.guided).flatten(1) for call in calls], dim=1).double()
    guided = torch.cat([call.guided.flatten() for call in calls]).double()
    return torch.linalg.lstsq(known.T, guided[:, None]).solution[:, 0].float()


def rows_of(arguments, lengths, count, indices):
    """The arguments of a call for `count` images as those of a call for some of them.

    Tensors as long as in a call for one image, whose `lengths` are given, are the same for all images, such as rotary
    embeddings; the others hold the images in turn, as often as there are copies of them.
    """
    if isinstance(arguments, dict):
        return {name: rows_of(value, lengths[name], count, indices) for name, value in arguments.items()}
    if isinstance(arguments, list | tuple):
        pairs = zip(arguments, lengths, strict=True)
        return type(arguments)(rows_of(value, length, count, indices) for value, length in pairs)
    if not isinstance(arguments, torch.Tensor) or _length(arguments) == lengths:
        return arguments
    return arguments.unflatten(0, (lengths, count))[:, indices.start : indices.stop].flatten(0, 1).contiguous()
