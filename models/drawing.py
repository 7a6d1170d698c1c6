"""Images drawn by a sampler, each from its own noise, as many at a time as memory holds."""

import logging
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from errors import InputError, first_line, lacks_memory

log = logging.getLogger("qua2sedimo")


class BatchSize:
    """How many images are drawn together: half as many for good where memory runs out."""

    def __init__(self, images):
        self.images = images

    def halve(self, reason):
        """Take half of it from here on; raise `reason` if it is not a lack of memory."""
        if not lacks_memory(reason):
            raise reason
        if self.images == 1:
            raise InputError(f"out of memory with one image at a time ({first_line(reason)}); try a smaller --res") from None
        self.images //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("out of memory: going on with %d images at a time", self.images)


@dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn of prompts, or class numbers."""

    seed: int  # image i starts from the noise of seed + i
    steps: int
    guidance: float
    res: int | str | None  # pixels per side, or "HxW"; None is the model's own
    batch_size: BatchSize  # shared by all that draw with these settings
    published_noise: bool = False  # every image starts from the noise of `seed`
    hand_over: float | None = None  # the share of the steps before a refiner's, where those alone are taken


class Batch(NamedTuple):
    """Images drawn together; those of which a value is not a number are named and are black."""

    indices: range  # of their prompts
    images: np.ndarray  # uint8 [N, H, W, 3]
    latents: torch.Tensor  # float32 [N, C, h, w]
    broken: np.ndarray  # bool [N]


def noise_generators(seed, indices, published_noise=False):
    """One CPU generator per image: seed + index, so noise depends on neither batch size nor device.

    `published_noise` is the published protocol: every image starts from the same seed.
    """
    return [torch.Generator().manual_seed(seed + (0 if published_noise else index)) for index in indices]


@torch.no_grad()
def generate_batches(sampler, prompts, settings, name, first=0, last=None, show=True):
    """Yield the images of prompts, or class numbers, number `first` to `last`, a Batch at a time; `settings` say how."""
    last = len(prompts) if last is None else last

    def draw(indices):
        generators = noise_generators(settings.seed, indices, settings.published_noise)
        batch = prompts[indices.start : indices.stop]
        images, latents = sampler.draw(batch, generators, settings.steps, settings.guidance, settings.res)
        broken = ~np.isfinite(images).all(axis=(1, 2, 3))
        images = (np.where(broken[:, None, None, None], 0, images) * 255).round().astype(np.uint8)
        return Batch(indices, images, latents, broken)

    with tqdm(total=last - first, desc=name, unit="img", leave=False, disable=not show) as progress:
        for batch in in_batches(draw, range(first, last), settings.batch_size):
            yield batch
            progress.update(len(batch.indices))


def in_batches(make, numbers, batch_size):
    """Yield `make` of as many numbers of a range at a time as a BatchSize says, which is halved where memory runs out."""
    first = numbers.start
    while first < numbers.stop:
        batch = range(first, min(first + batch_size.images, numbers.stop))
        try:
            made = make(batch)
        except (RuntimeError, MemoryError) as reason:
            batch_size.halve(reason)
            continue
        yield made
        first = batch.stop


def generate(sampler, prompts, settings, name):
    """The images (uint8 [N, H, W, 3]) of all prompts, or class numbers; InputError if a value of one is not a number."""
    batches = list(generate_batches(sampler, prompts, settings, name))
    bad = np.flatnonzero(np.concatenate([batch.broken for batch in batches]))
    if len(bad):
        raise InputError(f"{name}: image {bad[0] + 1} of {len(prompts)} has values that are not numbers; try other flags")
    return np.concatenate([batch.images for batch in batches])
