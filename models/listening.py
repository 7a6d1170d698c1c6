"""Listening in on a pipeline: what it asks its denoiser, its sampler, its decoder and its text encoders for.

diffusers' pipelines call their parts by attributes: `denoiser.forward`, `scheduler.step`, `vae.decode`, `encode_prompt`,
`prepare_latents`. There is one way to hear such a call, and to answer in its place: `StandIn`.
"""

import contextlib
import functools
import inspect

import torch

_ABSENT = object()


class StandIn(contextlib.AbstractContextManager):
    """While it is entered, `answer(original, *args, **kwargs)` is what calls of `owner.name` return.

    Shows the original's signature. On exit, whatever happened, `owner` is as it was before; one entered inside another
    hears first, and its original is the other's. `put` is for one that stays as long as its owner.
    """

    def __init__(self, owner, name, answer):
        self.owner, self.name, self.answer = owner, name, answer

    def put(self):
        original, answer = getattr(self.owner, self.name), self.answer

        @functools.wraps(original)
        def call(*args, **kwargs):
            return answer(original, *args, **kwargs)

        self._before = vars(self.owner).get(self.name, _ABSENT)  # absent where the class has it
        setattr(self.owner, self.name, call)
        return self

    __enter__ = put

    def __exit__(self, *_reason):
        if self._before is _ABSENT:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._before)


class Taken(Exception):
    """Ends a pipeline's call once what was listened for is known."""


def stopping(owner, name):
    """A StandIn that raises Taken where `owner.name` is called."""

    def stop(*_args, **_kwargs):
        raise Taken

    return StandIn(owner, name, stop)


def timed(watch, phase, owner, name):
    """A StandIn whose calls are counted in a phase of a Stopwatch."""

    def answer(original, *args, **kwargs):
        with watch.phase(phase):
            return original(*args, **kwargs)

    return StandIn(owner, name, answer)


@contextlib.contextmanager
def latents_taken(vae):
    """The list that latents [N, C, h, w] are added to, as they are given to the decoder, until the block ends."""
    taken = []

    def answer(decode, latents, *args, **kwargs):
        taken.append(latents)
        return decode(latents, *args, **kwargs)

    with StandIn(vae, "decode", answer):
        yield taken


def _by_name(denoiser, args, kwargs):
    """{name: value} of the arguments of a call of the denoiser."""
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def first_call(pipeline, denoiser, **arguments):
    """The arguments {name: value} of the denoiser's first call in `pipeline(**arguments)`, taken without running it."""
    taken = first_of(pipeline, {"denoiser": denoiser}, **arguments, output_type="latent")
    if taken is None:
        raise RuntimeError(f"{type(pipeline).__name__} did not call its {type(denoiser).__name__}")
    return taken[1]


@torch.no_grad()
def first_of(pipeline, denoisers, **arguments):
    """(name, arguments {name: value}) of the first call of one of `denoisers` {name: module} in `pipeline(**arguments)`.

    Taken without running it; None if none of them is called.
    """
    taken = []

    def taking(name, denoiser):
        def take(_forward, *args, **kwargs):
            taken.append((name, _by_name(denoiser, args, kwargs)))
            raise Taken

        return StandIn(denoiser, "forward", take)

    with contextlib.suppress(Taken), contextlib.ExitStack() as listening:
        for name, denoiser in denoisers.items():
            listening.enter_context(taking(name, denoiser))
        pipeline(**arguments)
    return taken[0] if taken else None


@torch.no_grad()
def until_latents(pipeline, **arguments):
    """Run a pipeline until it asks for its first latents: all prompts are encoded by then."""
    with contextlib.suppress(Taken), stopping(pipeline, "prepare_latents"):
        pipeline(**arguments, output_type="latent")
        raise RuntimeError(f"{type(pipeline).__name__} did not ask for latents")


@contextlib.contextmanager
def overheard(scheduler, on_step, *heard):
    """Hear what a pipeline asks: on_step(model output) of its sampler, and of each of `heard` (denoiser, on_call) its
    on_call({name: argument}, output).
    """

    def stepping(step, model_output, *args, **kwargs):
        on_step(model_output)
        return step(model_output, *args, **kwargs)

    with contextlib.ExitStack() as listening:
        for denoiser, on_call in heard:
            listening.enter_context(_calls(denoiser, on_call))
        listening.enter_context(StandIn(scheduler, "step", stepping))
        yield


def _calls(denoiser, on_call):
    def called(forward, *args, **kwargs):
        output = forward(*args, **kwargs)
        on_call(_by_name(denoiser, args, kwargs), output[0])
        return output

    return StandIn(denoiser, "forward", called)


def answering_once(denoiser):
    """A StandIn by which the denoiser computes its first answer and gives the same ever after."""
    answers = []

    def first_answer(forward, *args, **kwargs):
        if not answers:
            answers.append(forward(*args, **kwargs))
        return answers[0]

    return StandIn(denoiser, "forward", first_answer)
