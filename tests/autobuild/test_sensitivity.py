"""How far a denoiser's output moves, on the embedded model."""

from types import SimpleNamespace

import pytest
import torch

from autobuild import sensitivity
from models.families import FAMILIES
from models.pipelines import load_sampler
from quant import methods, modules

SETTINGS = SimpleNamespace(seed=5, steps=4, guidance=3.0, res=None)


@pytest.fixture(scope="module")
def sampler():
    return load_sampler(FAMILIES["dit"], "embedded", torch.device("cpu"))


@pytest.fixture(scope="module")
def calls(sampler):
    return sensitivity.record_calls(sampler, [3, 7], SETTINGS, count=3)


def test_what_is_recorded(sampler, calls):
    assert len(calls) == 3
    assert [int(call.arguments["timestep"][0]) for call in calls] == sorted(
        (int(call.arguments["timestep"][0]) for call in calls), reverse=True
    )
    for call in calls:
        assert len(call.output) == 4 and len(call.guided) == 2
        again = sampler.denoiser(**call.arguments)[0]
        assert torch.equal(again, call.output)
    assert "step" not in vars(sampler.pipeline.scheduler)  # its own method again


def test_guidance_is_found_out(calls):
    """The pipeline asks for the class first, then for none."""
    for call in calls:
        assert torch.allclose(sensitivity.guidance_weights(call), torch.tensor([3.0, -2.0]), atol=1e-3)


@pytest.mark.parametrize("name", ["pixart_alpha", "sdv15", "sdxl", "hunyuan"])
def test_guidance_of_other_families(name):
    row = FAMILIES[name].embedded
    settings = SimpleNamespace(seed=5, steps=4, guidance=3.0, res=row.resolution)
    other = load_sampler(FAMILIES[name], "embedded", torch.device("cpu"))
    calls = sensitivity.record_calls(other, [row.prompt], settings, count=2)
    for call in calls[:1]:  # of later ones PLMS makes a combination with the steps before
        assert torch.allclose(sensitivity.guidance_weights(call), torch.tensor([-2.0, 3.0]), atol=2e-2)
    probe = sensitivity.Probe(other.denoiser, calls, together=2)
    assert probe.shift()[0] < 1e-10


def test_change(sampler, calls):
    denoiser = sampler.denoiser
    alone, together = (sensitivity.Probe(denoiser, calls, count) for count in (1, 3))
    assert alone.shift()[0] < 1e-10 and together.shift()[0] < 1e-10
    layer = denoiser.proj_out_2
    before = layer.weight.data.clone()
    try:
        layer.weight.data *= 1.1
        (change, shift), (other, other_shift) = alone.shift(), together.shift()
        assert change == pytest.approx(other, rel=1e-4)
        torch.testing.assert_close(shift, other_shift, rtol=1e-2, atol=1e-5)
        assert float(shift.square().sum()) == pytest.approx(change, rel=1e-4)  # short enough to be kept whole
    finally:
        layer.weight.data = before


def test_the_whole_output_grown_by_a_tenth_is_a_change_of_a_hundredth(sampler, calls):
    layer = sampler.denoiser.proj_out_2
    kept = [parameter.data.clone() for parameter in (layer.weight, layer.bias)]
    probe = sensitivity.Probe(sampler.denoiser, calls, 3)
    try:
        layer.weight.data, layer.bias.data = (1.1 * each for each in kept)
        assert probe.shift()[0] == pytest.approx(0.01, rel=1e-3)
    finally:
        layer.weight.data, layer.bias.data = kept


def test_more_bits_change_less(sampler, calls):
    from stages.score_sources import measure

    family = FAMILIES["dit"]
    sampler = load_sampler(family, "embedded", torch.device("cpu"))
    parts = modules.install(sampler.denoiser, family)
    part = next(part for key, part in parts.items() if "transformer_blocks.3.ff.net.0.proj" in key)
    parameters = methods.fit(part.original)
    probe = sensitivity.Probe(sampler.denoiser, calls, 3)
    measured, shifts = measure([part], parameters, probe)
    assert shifts.shape == (6, 3 * 2 * 4 * 8 * 8)
    changes = dict(zip(methods.METHODS, measured.tolist(), strict=True))
    for algorithm in methods.ALGORITHMS:
        assert 0 < changes[f"{algorithm}-4"] < changes[f"{algorithm}-3"] < 0.1
    assert probe.shift()[0] < 1e-10  # the float weight is back


def test_a_sketch_keeps_inner_products():
    torch.manual_seed(0)
    first, second = torch.randn(2, 200_000)
    second += 0.5 * first
    sketch = sensitivity.Sketch(200_000, torch.device("cpu"))
    short, other = sketch(first), sketch(second)
    assert short.shape == (sensitivity.SKETCH,)
    scale = float(first.norm() * second.norm())
    assert float(short @ other) == pytest.approx(float(first @ second), abs=0.05 * scale)
    torch.testing.assert_close(sketch(first + second), short + other, rtol=1e-3, atol=1e-3)
