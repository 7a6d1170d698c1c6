"""What a pipeline asks its parts for is heard, and nothing is left on them."""

import contextlib
import functools
import inspect

import pytest
import torch
from conftest import tiny_dit
from diffusers import DDIMScheduler, DiTPipeline

from models.embedded.denoisers import build_vae
from models.listening import StandIn, Taken, answering_once, first_call, first_of, latents_taken, overheard, stopping, timed
from stages.labelling.stopwatch import Stopwatch

SHORT = {"class_labels": [3, 7], "num_inference_steps": 3, "guidance_scale": 1.0}


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


def test_nothing_is_left_on_the_denoiser(pipeline):
    first_call(pipeline, pipeline.transformer, class_labels=[3], num_inference_steps=1)
    assert "forward" not in vars(pipeline.transformer)
    with pytest.raises(ValueError):
        first_call(pipeline, pipeline.transformer, class_labels=[3], num_inference_steps=10_000)
    assert "forward" not in vars(pipeline.transformer)


def test_a_pipeline_that_does_not_call_it_is_an_error(pipeline):
    with pytest.raises(RuntimeError, match="DiTPipeline did not call its DiTTransformer2DModel"):
        first_call(pipeline, tiny_dit(), class_labels=[3], num_inference_steps=1, guidance_scale=1.0)


def test_the_first_of_several(pipeline):
    """The one that is called is named, and none keeps anything of it; None if it is neither."""
    denoisers = {"never": tiny_dit(), "transformer": pipeline.transformer}
    name, arguments = first_of(pipeline, denoisers, class_labels=[3, 7], guidance_scale=1.0, num_inference_steps=5)
    assert name == "transformer" and arguments["class_labels"].tolist() == [3, 7]
    assert not any("forward" in vars(each) for each in denoisers.values())
    assert first_of(pipeline, {"never": denoisers["never"]}, **SHORT, output_type="latent") is None


class Owner:
    def add(self, left, right=1):
        return left + right


def test_a_stand_in_answers_until_it_is_left_whatever_happens():
    owner = Owner()
    with pytest.raises(ZeroDivisionError), StandIn(owner, "add", lambda add, *args, **kwargs: 10 * add(*args, **kwargs)):
        assert (owner.add(2), owner.add(2, right=3)) == (30, 50)
        assert inspect.signature(owner.add) == inspect.signature(Owner().add)
        raise ZeroDivisionError
    assert vars(owner) == {} and owner.add(2) == 3


def test_stand_ins_nest_and_the_inner_one_hears_first():
    owner = Owner()
    owner.add = own = max  # not the class's own
    with StandIn(owner, "add", lambda add, *args: add(*args) + 1):
        with StandIn(owner, "add", lambda add, *args: add(*args) * 10):
            assert owner.add(2, 5) == 60
        assert owner.add(2, 5) == 6
    assert owner.add is own


def test_what_is_put_stays():
    owner = Owner()
    StandIn(owner, "add", lambda add, *args: -add(*args)).put()
    assert owner.add(2) == -3


def test_calls_and_steps_are_overheard_in_turn(pipeline):
    heard, denoiser, scheduler = [], pipeline.transformer, pipeline.scheduler
    expected = pipeline(**SHORT, generator=torch.Generator().manual_seed(0), output_type="np").images
    with (
        overheard(scheduler, heard.append, (denoiser, lambda *call: heard.append(call))),
        latents_taken(pipeline.vae) as latents,
    ):
        images = pipeline(**SHORT, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert (images == expected).all() and len(heard) == 6
    for (arguments, output), guided in zip(heard[::2], heard[1::2], strict=True):
        assert arguments["hidden_states"].shape == (2, 4, 8, 8) and output.shape == (2, 8, 8, 8)
        assert torch.equal(output[:, :4], guided)  # no guidance: the sampler gets the output's mean
    assert [each.shape for each in latents] == [(2, 4, 8, 8)]
    assert "forward" not in vars(denoiser) and "step" not in vars(scheduler) and "decode" not in vars(pipeline.vae)


def test_one_answer_for_all_steps(pipeline):
    heard, run, denoiser = [], [], pipeline.transformer
    denoiser.proj_out_2.register_forward_hook(lambda *_: run.append(1))
    hearing = overheard(pipeline.scheduler, lambda _: None, (denoiser, lambda _, output: heard.append(output)))
    with answering_once(denoiser), hearing:
        pipeline(**SHORT)
    assert len(run) == 1 and len(heard) == 3 and all(each is heard[0] for each in heard)


def test_a_pipeline_stops_before_it_decodes(pipeline):
    with stopping(pipeline.vae, "decode"), pytest.raises(Taken):
        pipeline(**SHORT)
    assert "decode" not in vars(pipeline.vae)


def test_calls_are_timed_in_their_phase():
    owner, watch = Owner(), Stopwatch(torch.device("cpu"))
    with contextlib.suppress(TypeError), timed(watch, "adding", owner, "add"):
        assert owner.add(1) == 2
        owner.add()
    assert list(watch.seconds) == ["adding"]
    assert not watch._running and vars(owner) == {}
