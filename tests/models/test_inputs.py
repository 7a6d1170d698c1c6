import functools

import pytest
import torch
from conftest import tiny_dit
from diffusers import DDIMScheduler, DiTPipeline

from models.embedded.denoisers import build_vae
from models.inputs import first_call, map_tensors


@pytest.fixture
def pipeline():
    pipeline = DiTPipeline(transformer=tiny_dit(), vae=build_vae(), scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_first_call_s_arguments_by_name(pipeline, monkeypatch):
    forward = type(pipeline.transformer).forward
    refuse = functools.wraps(forward)(lambda *_arguments, **_named: pytest.fail("the denoiser was run"))
    monkeypatch.setattr(type(pipeline.transformer), "forward", refuse)
    taken = first_call(pipeline, pipeline.transformer, class_labels=[3, 7], guidance_scale=1.0, num_inference_steps=5)
    assert taken["hidden_states"].shape == (2, 4, 8, 8)
    assert taken["timestep"].tolist() == [800, 800]
    assert taken["class_labels"].tolist() == [3, 7]


def test_the_hook_is_taken_off(pipeline):
    first_call(pipeline, pipeline.transformer, class_labels=[3], num_inference_steps=1)
    assert not pipeline.transformer._forward_pre_hooks
    with pytest.raises(ValueError):
        first_call(pipeline, pipeline.transformer, class_labels=[3], num_inference_steps=10_000)
    assert not pipeline.transformer._forward_pre_hooks


def test_a_pipeline_that_does_not_call_it_is_an_error(pipeline):
    with pytest.raises(RuntimeError, match="DiTPipeline did not call its DiTTransformer2DModel"):
        first_call(pipeline, tiny_dit(), class_labels=[3], num_inference_steps=1, guidance_scale=1.0)


def test_map_tensors_goes_into_everything():
    value = {"a": torch.ones(2), "b": [torch.ones(1), {"c": (torch.ones(3), None, "text")}], "d": 4}
    doubled = map_tensors(lambda tensor: 2 * tensor, value)
    assert doubled["a"].tolist() == [2, 2] and doubled["b"][0].tolist() == [2]
    tensor, *others = doubled["b"][1]["c"]
    assert isinstance(doubled["b"][1]["c"], tuple) and tensor.tolist() == [2, 2, 2]
    assert others == [None, "text"] and doubled["d"] == 4
    assert value["a"].tolist() == [1, 1]
