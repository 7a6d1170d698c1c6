"""The six embedded pipelines at work, and Stable Diffusion XL's refiner."""

import functools

import numpy as np
import pytest
import torch
from no_network import no_network

from models.drawing import noise_generators
from models.embedded.captions import digit_and_colors, subject_prompts
from models.embedded.classifier import classify, load_classifier
from models.facts import native_pixels
from models.families import FAMILIES
from models.pipelines import Extras, load_denoiser, load_sampler, model_of, refiner_of

CPU = torch.device("cpu")
TOKENS = {  # of the published pipelines: argument -> length
    "pixart_alpha": {"encoder_hidden_states": 120, "encoder_attention_mask": 120},
    "pixart_sigma": {"encoder_hidden_states": 300, "encoder_attention_mask": 300},
    "hunyuan": {"encoder_hidden_states": 77, "encoder_hidden_states_t5": 256, "text_embedding_mask_t5": 256},
    "sdxl": {"encoder_hidden_states": 77},
    "sdv15": {"encoder_hidden_states": 77},
    "dit": {},
}
every_family = pytest.mark.parametrize("name", list(FAMILIES))


@functools.cache
def sampler(name):
    """The family's embedded sampler with all it has, loaded once and without network."""
    family = FAMILIES[name]
    with no_network() as hosts_asked:
        loaded = load_sampler(family, "embedded", CPU, Extras(refiner_of(family, "embedded")))
    assert hosts_asked == []
    return loaded


def two_prompts(name):
    return [3, 7] if FAMILIES[name].num_classes else ["a red seven on a blue background", "green 3, white background"]


def images(loaded, prompts, first=0, steps=2, guidance=3.0):
    return loaded.images(prompts, noise_generators(5, range(first, first + len(prompts))), steps, guidance, 64)


@every_family
def test_it_is_the_familys_pipeline_at_its_own_resolution(name):
    family, loaded = FAMILIES[name], sampler(name)
    assert type(loaded.pipeline).__name__ == family.pipeline
    assert loaded.denoiser is getattr(loaded.pipeline, family.denoiser)
    assert family.embedded.resolution == 64
    assert native_pixels(family, model_of(family, "embedded")) == (64, 64)
    assert loaded.takes_resolution == (name != "dit")
    refiner = family.refiner.pipeline if family.refiner else "NoneType"
    assert type(loaded.refiner).__name__ == refiner


@every_family
def test_images_depend_on_their_own_prompt_and_noise_alone(name):
    loaded, prompts = sampler(name), two_prompts(name)
    together = images(loaded, prompts)
    assert together.shape == (2, 64, 64, 3) and together.min() >= 0 and together.max() <= 1
    alone = np.concatenate([images(loaded, prompts[:1]), images(loaded, prompts[1:], first=1)])
    assert np.abs(together - alone).max() < 2e-3
    other_prompt, other_noise = images(loaded, prompts[1:]), images(loaded, prompts[:1], first=1)
    assert np.abs(other_prompt - together[0]).max() > 0.1 and np.abs(other_noise - together[0]).max() > 0.1


@every_family
def test_it_draws_what_it_is_asked_for(name):
    """Eight pictures by the classifier that knows real digits: the digit and, of a caption, both colours."""
    family, loaded = FAMILIES[name], sampler(name)
    pairs = subject_prompts(8)
    asked = np.array([digit_and_colors(subject) for subject, _ in pairs])
    prompts = asked[:, 0].tolist() if family.num_classes else [caption for _, caption in pairs]
    steps = 20 if name == "sdv15" else 10  # PLMS has a slow start
    pictures = images(loaded, prompts, steps=steps, guidance=family.embedded.guidance)
    shown = classify(load_classifier(), (pictures * 255).round().astype(np.uint8)).numpy()
    parts = 1 if family.num_classes else 3
    assert (shown == asked)[:, :parts].all(axis=1).mean() >= 0.6


@every_family
def test_the_denoiser_alone_has_the_same_weights(name, monkeypatch):
    sampler(name)  # loaded before loading is refused

    def refuse(*_arguments, **_named):
        pytest.fail("loads a text encoder or an autoencoder")

    for loaded_class in ("transformers.PreTrainedModel", "diffusers.AutoencoderKL"):
        monkeypatch.setattr(f"{loaded_class}.from_pretrained", refuse)
    alone = load_denoiser(FAMILIES[name], "embedded", CPU)
    ours, its = alone.state_dict(), sampler(name).denoiser.state_dict()
    assert type(alone) is type(sampler(name).denoiser) and not alone.training
    assert ours.keys() == its.keys() and all(torch.equal(ours[key], its[key]) for key in ours)


def nested_tensors(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in nested_tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


@every_family
def test_inputs_of_the_denoiser(name):
    """What it is called with: one picture, the real token counts, shapes alone."""
    loaded = sampler(name)
    taken = loaded.denoiser_inputs(64)
    tensors = nested_tensors(taken)
    assert all(tensor.is_meta for tensor in tensors)
    assert noisy_latents(taken).shape == (1, 4, 8, 8)
    assert {argument: taken[argument].shape[:2] for argument in TOKENS[name]} == {
        argument: (1, length) for argument, length in TOKENS[name].items()
    }
    if loaded.takes_resolution:
        assert noisy_latents(loaded.denoiser_inputs(128)).shape == (1, 4, 16, 16)


def noisy_latents(taken):
    return taken["sample" if "sample" in taken else "hidden_states"]


@pytest.fixture
def denoiser_calls():
    """Timesteps that the base's and the refiner's denoiser are called with."""
    loaded, calls = sampler("sdxl"), {"base": [], "refiner": []}
    handles = [
        unet.register_forward_pre_hook(lambda _module, given, name=name: calls[name].append(float(given[1])))
        for name, unet in (("base", loaded.denoiser), ("refiner", loaded.refiner.unet))
    ]
    yield calls
    for handle in handles:
        handle.remove()


def test_the_refiner_takes_the_last_fifth_of_the_steps(denoiser_calls):
    images(sampler("sdxl"), two_prompts("sdxl"), steps=10)
    assert [len(timesteps) for timesteps in denoiser_calls.values()] == [8, 2]
    timesteps = denoiser_calls["base"] + denoiser_calls["refiner"]
    assert timesteps == sorted(timesteps, reverse=True) and min(denoiser_calls["base"]) >= 200 > denoiser_calls["refiner"][0]


def test_the_refiner_changes_the_image_a_little():
    whole = sampler("sdxl")
    base = load_sampler(FAMILIES["sdxl"], "embedded", CPU)
    assert base.refiner is None
    change = np.abs(images(whole, two_prompts("sdxl"), steps=5) - images(base, two_prompts("sdxl"), steps=5))
    assert 1e-4 < change.mean() < 0.1


def test_the_refiner_shares_parts_with_the_base():
    base, refiner = sampler("sdxl").pipeline, sampler("sdxl").refiner
    assert refiner.vae is base.vae and refiner.text_encoder_2 is base.text_encoder_2
    assert refiner.unet is not base.unet
