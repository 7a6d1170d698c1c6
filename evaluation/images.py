"""Images from a sampler, each from its own noise."""

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm


def noise_generators(seed, indices, published_noise=False):
    """One CPU generator per image: seed + index, so noise depends on neither batch size nor device.

    `published_noise` is the published protocol: every image starts from the same seed.
    """
    return [torch.Generator().manual_seed(seed + (0 if published_noise else index)) for index in indices]


@torch.no_grad()
def generate(sampler, prompts, settings, name, keep_bar=True):
    """Yield an image (uint8 [H, W, 3]) of each of the prompts, or class numbers, a batch at a time.

    `settings` has seed, steps, guidance, res, batch_size and, if it likes, published_noise.
    """
    with tqdm(total=len(prompts), desc=name, unit="img", leave=keep_bar) as progress:
        for first in range(0, len(prompts), settings.batch_size):
            batch = prompts[first : first + settings.batch_size]
            indices = range(first, first + len(batch))
            generators = noise_generators(settings.seed, indices, getattr(settings, "published_noise", False))
            images = sampler.images(batch, generators, settings.steps, settings.guidance, settings.res)
            yield from (images * 255).round().astype(np.uint8)
            progress.update(len(batch))


def save_png(image, path):
    Image.fromarray(image).save(path)
