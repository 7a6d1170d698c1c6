"""Images from a sampler, each from its own noise."""

import logging

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from errors import InputError, first_line

log = logging.getLogger("qua2sedimo")


def noise_generators(seed, indices, published_noise=False):
    """One CPU generator per image: seed + index, so noise depends on neither batch size nor device.

    `published_noise` is the published protocol: every image starts from the same seed.
    """
    return [torch.Generator().manual_seed(seed + (0 if published_noise else index)) for index in indices]


@torch.no_grad()
def generate(sampler, prompts, settings, name, keep_bar=True):
    """Yield an image (uint8 [H, W, 3]) of each of the prompts, or class numbers, a batch at a time.

    An image with values that are not numbers is None. `settings` has seed, steps, guidance, res, batch_size and,
    if it likes, published_noise; where memory runs out its batch_size is halved for good.
    """
    first = 0
    with tqdm(total=len(prompts), desc=name, unit="img", leave=keep_bar) as progress:
        while first < len(prompts):
            batch = prompts[first : first + settings.batch_size]
            indices = range(first, first + len(batch))
            generators = noise_generators(settings.seed, indices, getattr(settings, "published_noise", False))
            try:
                images = sampler.images(batch, generators, settings.steps, settings.guidance, settings.res)
            except (torch.OutOfMemoryError, RuntimeError) as reason:
                halve_batch(settings, reason)
                continue
            for image in images:
                yield (image * 255).round().astype(np.uint8) if np.isfinite(image).all() else None
            first += len(batch)
            progress.update(len(batch))


def stack(images, name):
    """The images [N, H, W, 3]; InputError if one of them has values that are not numbers."""
    images = list(images)
    bad = [number for number, image in enumerate(images, start=1) if image is None]
    if bad:
        raise InputError(f"{name}: image {bad[0]} of {len(images)} has values that are not numbers; try other flags")
    return np.stack(images)


def halve_batch(settings, reason):
    """Take half the batch size from here on; raise `reason` if it is not a lack of memory."""
    lack_of_memory = isinstance(reason, torch.OutOfMemoryError) or "not enough memory" in str(reason)
    if not lack_of_memory:
        raise reason
    if settings.batch_size == 1:
        raise InputError(f"out of memory with one image at a time ({first_line(reason)}); try a smaller --res") from None
    settings.batch_size //= 2
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    log.warning("out of memory: going on with %d images at a time", settings.batch_size)


def save_png(image, path):
    Image.fromarray(image).save(path)
