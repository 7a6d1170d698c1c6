"""Prompt embeddings are computed once, and are the pipeline's own."""

import functools

import numpy as np
import pytest
import torch

from models.families import FAMILIES
from models.pipelines import load_sampler, refiner_of
from models.prompt_memo import PromptMemo

PROMPTS = ["a red seven on a blue background", "a handwritten 3, black on white", "a red seven on a blue background"]
TEXT_FAMILIES = [name for name, family in FAMILIES.items() if not family.num_classes]
CPU = torch.device("cpu")


def draw(sampler):
    generators = [torch.Generator().manual_seed(index) for index in range(len(PROMPTS))]
    return sampler.images(PROMPTS, generators, sampler.family.least_steps + 2, 2.0, 64)


def remember(sampler, folder, key="model"):
    return [PromptMemo(pipeline, folder / f"{n}.pt", key) for n, pipeline in enumerate(sampler.pipelines)]


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_images_are_the_same_without_text_encoders(name, tmp_path):
    family = FAMILIES[name]
    sampler = load_sampler(family, "embedded", CPU, refiner_of(family, "embedded"))
    expected = draw(sampler)
    memos = remember(sampler, tmp_path)
    first = draw(sampler)
    assert np.abs(first - expected).max() < 0.02  # encoded one by one: a rounding at most
    for memo in memos:
        memo.save()
        memo.release()
    assert all(getattr(pipeline, "text_encoder", None) is None for pipeline in sampler.pipelines)
    assert np.array_equal(draw(sampler), first)
    # Another process: the embeddings come from the file, and the encoders are not asked.
    again = load_sampler(family, "embedded", CPU, refiner_of(family, "embedded"))
    for memo in remember(again, tmp_path):
        memo.encode = lambda *_, **__: pytest.fail("encoded again")
    assert np.array_equal(draw(again), first)


def test_each_prompt_is_encoded_once(tmp_path, monkeypatch):
    sampler = load_sampler(FAMILIES["pixart_alpha"], "embedded", CPU)
    asked = []
    encode = sampler.pipeline.encode_prompt

    @functools.wraps(encode)
    def counted(*args, **kwargs):
        asked.append(kwargs["prompt"])
        return encode(*args, **kwargs)

    monkeypatch.setattr(sampler.pipeline, "encode_prompt", counted)
    PromptMemo(sampler.pipeline, tmp_path / "memo.pt", "model")
    draw(sampler)
    draw(sampler)
    assert asked == [[PROMPTS[0]], [PROMPTS[1]]]


def test_a_new_prompt_after_release_is_refused(tmp_path):
    sampler = load_sampler(FAMILIES["pixart_alpha"], "embedded", CPU)
    (memo,) = remember(sampler, tmp_path)
    memo.release()
    with pytest.raises(RuntimeError, match="never encoded"):
        draw(sampler)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"nothing"), lambda path: None])
def test_a_file_of_another_model_or_a_damaged_one_is_not_used(tmp_path, damage):
    sampler = load_sampler(FAMILIES["pixart_alpha"], "embedded", CPU)
    (memo,) = remember(sampler, tmp_path)
    draw(sampler)
    memo.save()
    damage(tmp_path / "0.pt")
    other = load_sampler(FAMILIES["pixart_alpha"], "embedded", CPU)
    assert remember(other, tmp_path, "another model")[0].known == {}
