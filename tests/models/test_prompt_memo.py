"""Prompt embeddings are computed once, and are the pipeline's own."""

import functools

import numpy as np
import pytest
import torch

from models import prompt_memo
from models.families import FAMILIES
from models.pipelines import ANY_PROMPT, Extras, load_sampler, refiner_of

PROMPTS = ["a red seven on a blue background", "a handwritten 3, black on white", "a red seven on a blue background"]
TEXT_FAMILIES = [name for name, family in FAMILIES.items() if not family.num_classes]
CPU = torch.device("cpu")


def draw(sampler):
    generators = [torch.Generator().manual_seed(index) for index in range(len(PROMPTS))]
    return sampler.images(PROMPTS, generators, sampler.family.least_steps + 2, 2.0, 64)


def loaded(name, text_encoders=True):
    family = FAMILIES[name]
    return load_sampler(family, "embedded", CPU, Extras(refiner_of(family, "embedded")), text_encoders)


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_images_are_the_same_without_text_encoders(name, tmp_path):
    sampler = loaded(name)
    expected = draw(sampler)
    embeddings = prompt_memo.encode_prompts(sampler, PROMPTS, 2.0, 64)
    assert all(getattr(pipeline, "text_encoder", None) is None for pipeline in sampler.pipelines)
    first = draw(sampler)
    assert np.abs(first - expected).max() < 0.02  # encoded one by one: a rounding at most
    # Another process: the embeddings come from the file, and the encoders are not loaded.
    prompt_memo.save(embeddings, tmp_path / "prompts.pt", "model")
    again = loaded(name, text_encoders=False)
    assert all(getattr(pipeline, "text_encoder", None) is None for pipeline in again.pipelines)
    prompt_memo.remember(again, prompt_memo.load(tmp_path / "prompts.pt", "model"))
    assert np.array_equal(draw(again), first)
    shapes = [
        {name: value.shape for name, value in each.denoiser_inputs(64).items() if torch.is_tensor(value)}
        for each in (again, loaded(name))
    ]
    assert shapes[0] == shapes[1] and shapes[0]


def test_each_prompt_is_encoded_once(monkeypatch):
    sampler = loaded("pixart_alpha")
    asked = []
    encode = sampler.pipeline.encode_prompt

    @functools.wraps(encode)
    def counted(*args, **kwargs):
        asked.append(kwargs["prompt"])
        return encode(*args, **kwargs)

    monkeypatch.setattr(sampler.pipeline, "encode_prompt", counted)
    prompt_memo.encode_prompts(sampler, PROMPTS, 2.0, 64)
    draw(sampler)
    draw(sampler)
    assert asked == [[ANY_PROMPT], [PROMPTS[0]], [PROMPTS[1]]]


def test_a_new_prompt_after_release_is_refused():
    sampler = loaded("pixart_alpha")
    prompt_memo.encode_prompts(sampler, PROMPTS[:1], 2.0, 64)
    with pytest.raises(RuntimeError, match="never encoded"):
        draw(sampler)


def test_a_file_of_another_run_or_a_damaged_one_is_not_used(tmp_path):
    path = tmp_path / "prompts.pt"
    assert prompt_memo.load(path, "a") is None
    prompt_memo.save([{"hash": [torch.ones(2), None]}], path, "a")
    (known,) = prompt_memo.load(path, "a")
    assert torch.equal(known["hash"][0], torch.ones(2)) and known["hash"][1] is None
    assert prompt_memo.load(path, "b") is None
    path.write_bytes(path.read_bytes()[:-100])
    assert prompt_memo.load(path, "a") is None
