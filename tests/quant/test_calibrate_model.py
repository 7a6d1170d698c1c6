"""`QuantizedModel.calibrate`: entries of a configuration with calibrated tables and codes, applied, packed and saved."""

import functools

import pytest
import torch
from torch import nn

from errors import InputError
from quant import QuantizedModel, load_packed, save_packed
from quant.calibration import Averaged, Moments, collect
from quant.registry import quantizer
from quant.slots import WeightKey

WORDS = {"0": "mse-3", "2": "kmeans-3", "4": "kmeans_all-3"}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 60), nn.GELU(), nn.Linear(60, 60), nn.GELU(), nn.Linear(60, 20)).eval()


def tokens():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(300, 8, generator=generator) @ torch.randn(8, 40, generator=generator)


def heard(module, x, **options):
    return collect(module, QuantizedModel(module).slots, [functools.partial(module, x)], **options)


@torch.no_grad()
def error(module, x, before):
    return float((module(x) - before).square().mean())


@pytest.mark.parametrize("options", [{}, {"levels": False, "rounding": True}, {"levels": True, "rounding": False}])
def test_the_output_is_closer_applied_and_packed_alike(options):
    module, x = network(), tokens()
    with torch.no_grad():
        before = module(x)
    model, moments = QuantizedModel(module), heard(module, x)
    model.apply(WORDS)
    nearest = error(module, x, before)
    calibrated = model.calibrate(moments, WORDS, show=False, **options)
    calibrated.apply(WORDS)  # the words are in force already, with other parameters
    found = error(module, x, before)
    assert found < (0.8 if options.get("rounding", True) else 1) * nearest
    assert all(list(entry["parameters"]) == [WORDS[key.path]] for key, entry in calibrated.entries.items())
    assert calibrated.avg_bits(WORDS) == model.avg_bits(WORDS)
    applied = module(x)
    model.apply(WORDS)
    assert error(module, x, before) == nearest
    assert torch.equal(calibrated.pack(WORDS, show=False)(x), applied)


def test_the_algorithms_take_what_pays_for_them():
    module, x = network(), tokens()
    model = QuantizedModel(module)
    moments = heard(module, x)
    found = model.calibrate(moments, WORDS, show=False)
    parameters = {key.path: entry["parameters"][WORDS[key.path]] for key, entry in found.entries.items()}
    assert ["codes" in parameters[path] for path in WORDS] == [True, True, False]
    assert torch.equal(parameters["0"]["scale"], model.parameters(WeightKey("0"), "mse-3")["scale"])
    expected = quantizer("kmeans_all-3").fit(module[4].weight, moments[WeightKey("4")])
    assert torch.equal(parameters["4"]["centroids"], expected["centroids"])


def test_weights_without_moments_stay_as_they_are():
    module = network()
    model = QuantizedModel(module)
    found = model.calibrate({}, WORDS, show=False)
    for key, entry in found.entries.items():
        own = model.parameters(key, WORDS[key.path])
        for name, tensor in entry["parameters"][WORDS[key.path]].items():
            assert torch.equal(tensor, own[name])


def test_a_packed_folder_holds_the_codes(tmp_path):
    module, x = network(), tokens()
    model = QuantizedModel(module).calibrate(heard(module, x), "mse-4", show=False)
    output = model.pack("mse-4", show=False)(x)
    save_packed(module, tmp_path)
    assert torch.equal(load_packed(network(1), tmp_path)(x), output)


def test_ties_take_one_calibration():
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    module[1].load_state_dict(module[0].state_dict())
    model, x = QuantizedModel(module, ties={"1": "0"}), torch.randn(50, 8)
    moments = collect(module, model.slots, [lambda: module(x)])
    assert list(moments) == [WeightKey("0")]
    model.calibrate(moments, "mse-3", show=False).apply("mse-3")
    assert torch.equal(module[0].weight, module[1].weight)


def test_moments_of_other_inputs_are_refused():
    other = Moments(torch.eye(3), torch.zeros(3), 1)
    with pytest.raises(InputError, match=r"^0: the moments are of 3 inputs, and the weight has 40"):
        QuantizedModel(network()).calibrate({WeightKey("0"): other}, "mse-4", show=False)


def test_moments_of_several_ways_are_averaged_by_their_inputs(tmp_path):
    module, x = network(), tokens()
    parts = [heard(module, x[:100], folder=tmp_path / "a"), heard(module, x[100:], folder=tmp_path / "b")]
    found, whole = Averaged(*parts), heard(module, x)
    assert len(found) == 3
    for key in whole:
        torch.testing.assert_close(found[key].second, whole[key].second, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[key].mean, whole[key].mean, rtol=1e-4, atol=1e-5)
        assert found[key].count == 300
