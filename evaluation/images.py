"""Images from a pipeline, each from its own noise."""

import numpy as np
import torch
from PIL import Image


def noise_generators(seed, indices, published_noise=False):
    """One CPU generator per image: seed + index, so noise depends on neither batch size nor device.

    `published_noise` is the published protocol: every image starts from the same seed.
    """
    return [torch.Generator().manual_seed(seed + (0 if published_noise else index)) for index in indices]


@torch.no_grad()
def generate(pipeline, conditions, generators, steps, guidance):
    """Images (uint8 [N, H, W, 3]) of the conditions, {name of a pipeline argument: list of N}."""
    images = pipeline(
        **conditions,
        generator=generators,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)


def save_png(image, path):
    Image.fromarray(image).save(path)
