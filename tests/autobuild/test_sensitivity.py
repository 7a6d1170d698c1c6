"""How far a denoiser's output moves, on the embedded models."""

import functools

import pytest
import torch

from autobuild import sensitivity
from autobuild.first_order import Weight
from errors import InputError
from models.drawing import BatchSize, SamplingSettings
from models.families import FAMILIES
from models.pipelines import Extras, load_sampler, refiner_of
from quant import registry
from quant.model import QuantizedModel

PROMPTS = ["a red seven on a blue background", "a green two", "seven"]


@functools.cache
def load(name):
    return load_sampler(FAMILIES[name], "embedded", torch.device("cpu"))


def settings_of(name, **changes):
    resolution = None if FAMILIES[name].num_classes else FAMILIES[name].embedded.resolution
    known = {"seed": 5, "steps": 4, "guidance": 3.0, "res": resolution, "batch_size": BatchSize(3)}
    return SamplingSettings(**known | changes)


def prompts_of(name):
    return [3, 7, 1] if FAMILIES[name].num_classes else PROMPTS


@pytest.fixture(scope="module")
def sampler():
    return load("dit")


@pytest.fixture(scope="module")
def recording(sampler):
    return sensitivity.record_calls(sampler, [3, 7], settings_of("dit"), count=3)


def layer_of(sampler):
    return next(module for name, module in sampler.denoiser.named_modules() if name.endswith("attn1.to_v"))


def growing(*layers):
    """`put` of a Probe: layers grown by a factor, their weights and biases."""
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    before = [parameter.data for parameter in parameters]

    def put(factor):
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data if factor is None else factor * data

    return put


def guided_outputs(sampler, prompts, settings):
    """What an undisturbed run gives its sampler at each step of the images, all drawn together; by a hook and no more."""
    guided, inputs = [], []

    def hook(_module, positional, named, output):
        output = output[0][:, : sampler.denoiser.config.in_channels]
        first, second = output.chunk(2)
        with_prompt, without = (first, second) if sampler.family.num_classes else (second, first)
        guided.append(without + settings.guidance * (with_prompt - without))
        inputs.append((positional, named))

    handle = sampler.denoiser.register_forward_hook(hook, with_kwargs=True)
    generators = [torch.Generator().manual_seed(settings.seed + index) for index in range(len(prompts))]
    sampler.images(prompts, generators, settings.steps, settings.guidance, settings.res)
    handle.remove()
    return guided, inputs


def again(sampler, inputs, settings):
    """The guided outputs of the same inputs."""
    guided = []
    for positional, named in inputs:
        first, second = sampler.denoiser(*positional, **named)[0][:, : sampler.denoiser.config.in_channels].chunk(2)
        with_prompt, without = (first, second) if sampler.family.num_classes else (second, first)
        guided.append(without + settings.guidance * (with_prompt - without))
    return guided


@torch.no_grad()
@pytest.mark.parametrize("name", ["dit", pytest.param("hunyuan", marks=pytest.mark.slow), "sdv15"])
def test_the_shift_is_that_of_a_whole_run_whatever_the_batch_size(name):
    """The independent route keeps what an undisturbed run asks, all images at once, and asks it again."""
    sampler, prompts, settings = load(name), prompts_of(name), settings_of(name)
    guided, inputs = guided_outputs(sampler, prompts, settings)
    chosen = [0, 2, 4] if name == "sdv15" else [0, 2, 3]  # PLMS asks once more; of 4 steps the middle is the third
    put = growing(layer_of(sampler))
    put(1.5)
    shifted = again(sampler, [inputs[step] for step in chosen], settings)
    put(None)
    before = torch.cat([guided[step].flatten() for step in chosen])
    expected = (torch.cat([each.flatten() for each in shifted]) - before) / before.norm()
    assert len(guided) == (5 if name == "sdv15" else 4) and expected.norm() > 1e-4
    for size in (1, 2):
        settings = settings_of(name, batch_size=BatchSize(size))
        recording = sensitivity.record_calls(sampler, prompts, settings, count=3)
        probe = sensitivity.Probe(sampler.denoiser, recording, settings.batch_size)
        change, shift = probe.shift(put, 1.5)
        put(None)
        torch.testing.assert_close(shift, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        assert change == pytest.approx(float(expected.square().sum()), rel=1e-3)
        for weights in probe.guidance:
            wanted = [3.0, -2.0] if name == "dit" else [-2.0, 3.0]
            torch.testing.assert_close(weights, torch.tensor(wanted), rtol=0, atol=1e-2)


@torch.no_grad()
def test_the_refiners_steps_are_not_asked():
    """Of ten steps the base model makes the first eight, as a run with the refiner has it; none is loaded."""
    settings = settings_of("sdxl", steps=10, hand_over=FAMILIES["sdxl"].refiner.hand_over)
    recording = sensitivity.record_calls(load("sdxl"), PROMPTS[:1], settings, count=2)
    extras = Extras(refiner_id=refiner_of(FAMILIES["sdxl"], "embedded"))
    whole = load_sampler(FAMILIES["sdxl"], "embedded", torch.device("cpu"), extras)
    guided, _ = guided_outputs(whole, PROMPTS[:1], settings)
    assert len(guided) == 8
    for calls, place in zip(recording.steps, (0, 7), strict=True):
        torch.testing.assert_close(calls[0].guided, guided[place], rtol=1e-4, atol=1e-4)


def test_only_what_is_needed_is_drawn(sampler, monkeypatch):
    """No image is decoded; of two images, drawn one at a time, 1 + 2 x 1 calls of the denoiser tell the first step."""
    monkeypatch.setattr(sampler.pipeline.vae, "decode", lambda *_args, **_kwargs: pytest.fail("decoded"))
    asked = []
    forward = sampler.denoiser.forward
    monkeypatch.setattr(sampler.denoiser, "forward", lambda *args, **kw: asked.append(1) or forward(*args, **kw))
    recording = sensitivity.record_calls(sampler, [3, 7], settings_of("dit", batch_size=BatchSize(1)), count=1)
    assert len(asked) == 3
    assert [[len(call.guided) for call in calls] for calls in recording.steps] == [[1, 1]]
    assert "step" not in vars(sampler.pipeline.scheduler)  # its own method again


def test_what_is_recorded(sampler, recording):
    assert len(recording.steps) == 3
    timesteps = [int(call.arguments["timestep"][0]) for (call,) in recording.steps]
    assert timesteps == sorted(timesteps, reverse=True)
    for (call,) in recording.steps:
        assert len(call.output) == 4 and len(call.guided) == 2
        assert torch.equal(sampler.denoiser(**call.arguments)[0], call.output)


def test_a_denoiser_that_is_asked_twice_in_a_step_is_refused(sampler, monkeypatch):
    scheduler_class = type(sampler.pipeline.scheduler)
    step = scheduler_class.step

    def twice(*args, **kwargs):
        sampler.denoiser(torch.zeros(1, 4, 8, 8), timestep=torch.zeros(1), class_labels=torch.zeros(1, dtype=torch.long))
        return step(*args, **kwargs)

    monkeypatch.setattr(scheduler_class, "step", twice)
    with pytest.raises(InputError, match=r"DiTPipeline: asks its denoiser 8 times in 4 steps of its sampler, not once"):
        sensitivity.record_calls(sampler, [3], settings_of("dit"), count=2)


@pytest.fixture
def room(sampler):
    """Rows that the denoiser's memory has room for, which a test may change."""
    rows = [100]

    def check(_module, positional, named):
        if len(positional[0] if positional else named["hidden_states"]) > rows[0]:
            raise torch.OutOfMemoryError("no room")

    handle = sampler.denoiser.register_forward_pre_hook(check, with_kwargs=True)
    yield rows
    handle.remove()


def test_memory_that_runs_out_halves_the_batches(sampler, room):
    """While sampling, and, once all is settled, while asking."""
    put = growing(layer_of(sampler))

    def probe_with(settings):
        recording = sensitivity.record_calls(sampler, [3, 7, 1], settings, 2)
        return sensitivity.Probe(sampler.denoiser, recording, settings.batch_size)

    change, shift = probe_with(settings_of("dit")).shift(put, 1.5)
    put(None)
    room[0], settings = 6, settings_of("dit", batch_size=BatchSize(8))
    probe = probe_with(settings)
    room[0] = 4
    again, shift_again = probe.shift(put, 1.5)
    put(None)
    assert settings.batch_size.images == probe.together == 2
    assert again == pytest.approx(change, rel=1e-3)
    torch.testing.assert_close(shift_again, shift, rtol=1e-2, atol=1e-3 * float(shift.abs().max()))
    assert probe.shift(put, None)[0] == 0  # both sides are asked alike
    room[0] = 1
    with pytest.raises(InputError, match="out of memory with one image at a time"):
        probe.shift(put, None)


def test_the_whole_output_grown_by_a_tenth_is_a_change_of_a_hundredth(sampler, recording):
    probe = sensitivity.Probe(sampler.denoiser, recording, BatchSize(3))
    put = growing(sampler.denoiser.proj_out_2)
    change, shift = probe.shift(put, 1.1)
    put(None)
    assert change == pytest.approx(0.01, rel=1e-3)
    assert float(shift.square().sum()) == pytest.approx(change, rel=1e-4)  # short enough to be kept whole


def test_more_bits_change_less(recording):
    from stages.sensitivities import measure_one

    family = FAMILIES["dit"]
    sampler = load_sampler(family, "embedded", torch.device("cpu"))
    model = QuantizedModel(sampler.denoiser, family.dtype, include=[r"transformer_blocks\.3\.ff\.net\.0\.proj"])
    (part,) = model.parts.values()
    parameters = registry.fit(part.original)
    probe = sensitivity.Probe(sampler.denoiser, recording, BatchSize(3))
    measured, shifts = measure_one(Weight([part], parameters), registry.SEARCH_SPACE, probe).values()
    assert shifts.shape == (6, 3 * 2 * 4 * 8 * 8)
    changes = dict(zip(registry.SEARCH_SPACE, measured.tolist(), strict=True))
    for algorithm in registry.ALGORITHMS:
        assert 0 < changes[f"{algorithm}-4"] < changes[f"{algorithm}-3"] < 0.1
    assert probe.shift(lambda _: None, None)[0] < 1e-10  # the float weight is back


def test_a_sketch_keeps_inner_products():
    torch.manual_seed(0)
    first, second = torch.randn(2, 200_000)
    second += 0.5 * first
    short, other = sensitivity.sketch(first), sensitivity.sketch(second)
    assert short.shape == (sensitivity.SKETCH,)
    scale = float(first.norm() * second.norm())
    assert float(short @ other) == pytest.approx(float(first @ second), abs=0.05 * scale)
    torch.testing.assert_close(sensitivity.sketch(first + second), short + other, rtol=1e-3, atol=1e-3)


def test_rows_of_some_images():
    """Copies come one after another, each with all images; what is no longer than for one image is the same for all."""
    rotary, labels = torch.arange(4), torch.arange(6)  # two copies of three images
    arguments = {"labels": labels, "rotary": (rotary, rotary), "timestep": torch.tensor(7), "none": None}
    lengths = {"labels": 2, "rotary": (4, 4), "timestep": 0, "none": None}
    some = sensitivity.rows_of(arguments, lengths, 3, range(1, 3))
    assert some["labels"].tolist() == [1, 2, 4, 5] and some["none"] is None
    assert torch.equal(some["rotary"][0], rotary) and some["timestep"] == 7
