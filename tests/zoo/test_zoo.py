"""The zoo's denoisers run and its pipelines draw, and both come back from disk as they were."""

import diffusers
import numpy as np
import pytest
import torch

from zoo import ZOO

pytestmark = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)


@torch.no_grad()
def output(entry, denoiser):
    """What one call of the denoiser gives, all samples in one tensor."""
    sample = denoiser(**entry.inputs(denoiser), return_dict=False)[0]
    return torch.cat([part.flatten() for part in sample])  # a tensor, or a list of tensors


def test_denoiser_is_the_same_when_built_again_or_loaded(entry, tmp_path):
    denoiser = entry.build_denoiser()
    denoiser.save_pretrained(tmp_path)
    loaded = diffusers.AutoModel.from_pretrained(str(tmp_path))
    expected = output(entry, denoiser)
    assert expected.isfinite().all() and 0.5 < expected.std() < 2
    assert type(loaded) is type(denoiser)
    assert torch.equal(output(entry, loaded), expected)
    assert torch.equal(output(entry, entry.build_denoiser()), expected)


def test_pipeline_draws_the_same_when_loaded(entry, tmp_path):
    pipeline = entry.build_pipeline()
    drawn = entry.draw(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert drawn.std() > 0.05
    assert np.array_equal(entry.draw(loaded), drawn)


def test_pipeline_draws_what_it_is_asked_for(entry):
    pipeline = entry.build_pipeline()
    other = {"class_labels": [4]} if "class_labels" in entry.call else {"prompt": "a green two"}
    assert not np.array_equal(entry.draw(pipeline), entry.draw(pipeline, **other))


def test_every_denoiser_of_the_pipeline_takes_part(entry):
    pipeline = entry.build_pipeline()
    drawn = entry.draw(pipeline)
    modules = {name for name, part in pipeline.components.items() if type(part) is type(entry.build_denoiser())}
    assert modules == set(entry.denoiser_names)
    for name in entry.denoiser_names:
        denoiser = getattr(pipeline, name)
        for parameter in denoiser.parameters():
            parameter.data *= 1.1
        changed = entry.draw(pipeline)
        assert not np.array_equal(changed, drawn)
        drawn = changed
