import numpy as np
import pytest
import torch

from errors import InputError
from models.drawing import BatchSize, SamplingSettings, generate, generate_batches, noise_generators
from models.families import FAMILIES
from models.pipelines import Extras, load_sampler, refiner_of

PROMPTS = {
    "dit": [0, 1, 2],
    "pixart_alpha": ["a red seven on a blue background", "a handwritten 3, black on white", "a green sheet with a red 0"],
}


@pytest.fixture(scope="module", params=list(PROMPTS))
def sampler(request):
    return load_sampler(FAMILIES[request.param], "embedded", torch.device("cpu"))


def pictures(sampler, batch_size, published_noise=False, prompts=None, **settings):
    prompts = prompts or PROMPTS[sampler.family.name]
    settings = {"seed": 1, "steps": 3, "guidance": 2.0, "res": 64} | settings
    settings = SamplingSettings(**settings, batch_size=BatchSize(batch_size), published_noise=published_noise)
    return generate(sampler, prompts, settings, "pictures")


def test_noise_is_each_images_own():
    first, second = (torch.randn(4, generator=g) for g in noise_generators(42, [0, 1]))
    assert torch.equal(second, torch.randn(4, generator=torch.Generator().manual_seed(43)))
    assert not torch.equal(first, second)
    same = [torch.randn(4, generator=g) for g in noise_generators(42, [0, 1], published_noise=True)]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], first)


@pytest.mark.parametrize("published_noise", [False, True])
def test_batch_size_changes_no_image(sampler, published_noise):
    runs = [pictures(sampler, size, published_noise) for size in (3, 2, 1)]
    for images in runs:
        assert len(images) == 3 and images[0].shape == (64, 64, 3) and images[0].dtype == np.uint8
        assert np.abs(images.astype(int) - runs[0]).max() <= 1  # a rounding at most


def test_published_noise_is_the_same_for_every_image(sampler):
    prompts = PROMPTS[sampler.family.name][:1] * 2
    same, own = pictures(sampler, 2, True, prompts), pictures(sampler, 2, False, prompts)
    assert np.abs(same[0].astype(int) - same[1]).max() <= 1 and np.array_equal(same[0], own[0])
    assert np.abs(own[0].astype(int) - own[1]).max() > 20


def test_images_are_made_a_batch_at_a_time(sampler, monkeypatch):
    """Nothing is drawn before it is asked for."""
    batches = []

    def draw(prompts, generators, steps, guidance, resolution):
        batches.append((list(prompts), [generator.initial_seed() for generator in generators], steps, guidance, resolution))
        return np.full((len(prompts), 4, 4, 3), 0.5, np.float32), torch.zeros(len(prompts), 4, 1, 1)

    monkeypatch.setattr(sampler, "draw", draw)
    prompts = PROMPTS[sampler.family.name]
    stream = generate_batches(sampler, prompts, settings(2), "")
    assert batches == []
    first = next(stream)
    assert first.images.tolist() == [[[[128] * 3] * 4] * 4] * 2 and first.indices == range(2)
    assert batches == [(prompts[:2], [7, 8], 3, 2.0, 64)]
    assert len(list(stream)) == 1 and batches[1:] == [(prompts[2:], [9], 3, 2.0, 64)]


def settings(batch_size):
    return SamplingSettings(seed=7, steps=3, guidance=2.0, res=64, batch_size=BatchSize(batch_size))


class Drawer:
    """A sampler that draws each prompt's number, out of memory with more than `most` images at a time."""

    def __init__(self, most, error=None):
        self.most, self.error = most, error or torch.OutOfMemoryError("CUDA out of memory")

    def draw(self, prompts, generators, *_):
        if len(prompts) > self.most:
            raise self.error
        images = np.stack([np.full((2, 2, 3), prompt / 100, np.float32) for prompt in prompts])
        return images, torch.zeros(len(prompts), 4, 1, 1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_out_of_memory_halves_the_batch(error, caplog):
    run = settings(8)
    images = generate(Drawer(3, error), list(range(10)), run, "")
    assert [image[0, 0, 0] for image in images] == [round(number * 2.55) for number in range(10)]
    assert run.batch_size.images == 2 and caplog.text.count("out of memory: going on with") == 2


def test_out_of_memory_with_one_image_ends_in_a_line():
    with pytest.raises(InputError, match=r"one image at a time.*--res"):
        generate(Drawer(0), [1, 2], settings(2), "")


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        generate(Drawer(0, RuntimeError("shapes differ")), [1, 2], settings(2), "")


def test_a_part_of_the_prompts():
    """Images number 3 to 7 are those of a whole run, whatever was drawn before."""
    batches = generate_batches(Drawer(9), list(range(10)), settings(2), "", first=3, last=8)
    assert [batch.indices for batch in batches] == [range(3, 5), range(5, 7), range(7, 8)]


def test_an_image_of_no_numbers_is_told_and_black():
    (batch,) = generate_batches(Drawer(9), [1, np.nan, 3], settings(3), "")
    assert batch.broken.tolist() == [False, True, False] and not batch.images[1].any() and batch.images[2].all()
    with pytest.raises(InputError, match=r"mine: image 2 of 3"):
        generate(Drawer(9), [1, np.nan, 3], settings(3), "mine")


@pytest.mark.parametrize("name", ["dit", "pixart_alpha", "sdxl"])
def test_latents_are_those_of_the_images(name):
    """Decoded again they give the images, at the scale that the denoiser sees."""
    sampler = load_sampler(FAMILIES[name], "embedded", torch.device("cpu"), Extras(refiner_of(FAMILIES[name], "embedded")))
    prompts = PROMPTS.get(name, PROMPTS["pixart_alpha"])
    images, latents = sampler.draw(prompts, noise_generators(1, range(3)), 3, 2.0, 64)
    assert latents.shape == (3, 4, 8, 8) and latents.dtype == torch.float32
    vae = sampler.pipeline.vae
    with torch.no_grad():
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    assert np.abs((decoded.permute(0, 2, 3, 1).numpy() / 2 + 0.5).clip(0, 1) - images).max() < 1e-3
    assert np.array_equal(images, sampler.images(prompts, noise_generators(1, range(3)), 3, 2.0, 64))
