"""Which sampler a model is sampled with."""

import importlib.util

import diffusers
import pytest
from embedded_copies import CPU, PROMPT, Copy

from errors import InputError
from models import schedulers
from models.drawing import noise_generators
from models.families import FAMILIES
from models.pipelines import Extras, load_sampler

TRAINED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
PLAIN = ("PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
OWN = {  # needs to be kept
    "LCMScheduler": {},
    "TCDScheduler": {},
    "EulerDiscreteScheduler": {"timestep_spacing": "trailing"},
    "EulerAncestralDiscreteScheduler": {"timestep_spacing": "trailing"},
    "DDIMScheduler": {"prediction_type": "v_prediction"},
    "DPMSolverMultistepScheduler": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}
SDV15 = FAMILIES["sdv15"]


def own(name, **config):
    return getattr(diffusers, name)(**TRAINED | config)


def denoiser_calls(sampler, steps):
    calls = []
    sampler.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    images = sampler.images([PROMPT], noise_generators(1, [0]), steps, 3.0, 64)
    return len(calls), images


@pytest.mark.parametrize("name", PLAIN)
def test_the_familys_sampler_has_its_published_settings(name):
    """Whatever lies in the folder, and with the noise levels of its training."""
    settled = schedulers.settled(own(name, beta_end=0.013), SDV15)
    assert type(settled) is diffusers.PNDMScheduler and settled.config.beta_end == 0.013
    published = {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
    assert {key: settled.config[key] for key in published} == published


@pytest.mark.parametrize("name", list(OWN))
def test_a_model_that_needs_its_own_sampler_keeps_it(name):
    scheduler = own(name, **OWN[name])
    assert schedulers.settled(scheduler, SDV15) is scheduler
    assert schedulers.settled(scheduler, FAMILIES["dit"]) is scheduler


def test_plms_that_lacks_its_switch_still_keeps_what_it_predicts():
    settled = schedulers.settled(own("PNDMScheduler", prediction_type="v_prediction"), SDV15)
    assert settled.config.skip_prk_steps and settled.config.prediction_type == "v_prediction"


def test_few_steps_are_known_by_the_sampler():
    few = {name for name in OWN if schedulers.is_few_step(name, OWN[name])}
    assert few == {"LCMScheduler", "TCDScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"}
    assert not any(schedulers.is_few_step(name, {}) for name in PLAIN)


def test_dit_is_stepped_as_published():
    settled = schedulers.settled(diffusers.DDIMScheduler(timestep_spacing="leading"), FAMILIES["dit"])
    assert type(settled) is diffusers.DPMSolverMultistepScheduler and settled.config.timestep_spacing == "linspace"


def test_a_folder_without_the_switch_is_sampled_by_plms(tmp_path):
    """As the published folder's file was written by an old version."""
    copy = Copy("sdv15", tmp_path)
    whole = denoiser_calls(copy.load(), 5)
    own("PNDMScheduler", set_alpha_to_one=False, steps_offset=1).save_pretrained(copy.folder / "scheduler")
    copy.change_json("scheduler/scheduler_config.json", skip_prk_steps=False)
    sampler = copy.load()
    for steps in (1, 2, 3):
        assert denoiser_calls(sampler, steps)[0]  # no traceback
    calls, images = denoiser_calls(copy.load(), 5)
    assert calls == whole[0] == 6 and (images == whole[1]).all()


@pytest.mark.parametrize("name", ["sdv15", "dit", "sdxl"])
def test_the_sampler_asked_for(name):
    sampler = load_sampler(FAMILIES[name], "embedded", CPU, Extras(scheduler="DDIMScheduler"))
    assert type(sampler.pipeline.scheduler) is diffusers.DDIMScheduler
    prompts = [3] if name == "dit" else [PROMPT]
    assert sampler.images(prompts, noise_generators(1, [0]), 2, 2.0, 64).std() > 0.01


@pytest.mark.parametrize("name", ["nonsense", "FlowMatchEulerDiscreteScheduler", "DiffusionPipeline", "EDMEulerScheduler"])
def test_no_sampler_for_these_models(name):
    with pytest.raises(InputError, match=f"--scheduler {name}: is not one of"):
        load_sampler(SDV15, "embedded", CPU, Extras(scheduler=name))


def test_a_sampler_whose_package_is_missing():
    if importlib.util.find_spec("torchsde"):
        pytest.skip("torchsde is installed")
    with pytest.raises(InputError, match=r"--scheduler DPMSolverSDEScheduler: .*torchsde"):
        load_sampler(SDV15, "embedded", CPU, Extras(scheduler="DPMSolverSDEScheduler"))
