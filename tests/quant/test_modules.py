import copy

import pytest
import torch
from torch import nn

from models.layers import find_slots
from quant import config, methods, modules, multiquantizer


@pytest.fixture
def quantized(tmp_path, denoiser, family):
    entries = multiquantizer.build(denoiser, family, tmp_path / "mq.pt")
    slots = find_slots(denoiser, family)
    return denoiser, modules.install(denoiser, family), slots, entries


def weights_of(layers):
    return {key: layer.weight.detach().clone() for key, layer in layers.items()}


def test_install_changes_nothing_yet(denoiser, dit_inputs, family):
    with torch.no_grad():
        before = denoiser(**dit_inputs).sample
        state = {name: value.clone() for name, value in denoiser.state_dict().items()}
        kind = type(denoiser)
        modules.install(denoiser, family)
        assert type(denoiser) is kind
        assert torch.equal(denoiser(**dit_inputs).sample, before)
    assert state.keys() == denoiser.state_dict().keys()
    assert all(torch.equal(value, denoiser.state_dict()[name]) for name, value in state.items())


def test_a_configuration_acts_and_restores(quantized, dit_inputs):
    denoiser, layers, slots, entries = quantized
    with torch.no_grad():
        before = denoiser(**dit_inputs).sample
        config.apply(config.uniform(slots, "mse-3"), layers, slots, entries)
        assert not torch.allclose(denoiser(**dit_inputs).sample, before, atol=1e-3)
        config.restore(layers)
        assert torch.equal(denoiser(**dit_inputs).sample, before)


def test_no_drift_over_500_changes(quantized):
    _, layers, slots, entries = quantized
    drawn = [config.draw_random(slots, 0, index) for index in range(10)]
    fresh = []
    for configuration in drawn:
        config.restore(layers)
        config.apply(configuration, layers, slots, entries)
        fresh.append(weights_of(layers))
    for step in range(500):
        config.apply(drawn[step * 7 % 10], layers, slots, entries)
    for configuration, expected in zip(drawn, fresh, strict=True):
        for _ in range(2):  # once, and again
            config.apply(configuration, layers, slots, entries)
            assert all(torch.equal(layers[key].weight, expected[key]) for key in layers)


def test_weights_are_the_methods_weights(quantized, family):
    _, layers, slots, entries = quantized
    originals = {key: layer.original.clone() for key, layer in layers.items()}
    configuration = config.draw_random(slots, 3, 3)
    config.apply(configuration, layers, slots, entries)
    for key, layer in layers.items():
        method = configuration[key]
        expected = methods.apply(method, originals[key], entries[slots[key].tie]["parameters"][method])
        assert torch.equal(layer.weight, expected.float()), key


def test_unchanged_layers_are_not_touched(quantized, monkeypatch):
    _, layers, slots, entries = quantized
    config.apply(config.uniform(slots, "mse-4"), layers, slots, entries)
    touched = []
    monkeypatch.setattr(modules.QuantLayer, "set_method", lambda self, name, p: touched.append(name))
    changed = config.uniform(slots, "mse-4") | {"model.proj_out_1.weight_quantizer": "kmeans-3"}
    config.apply(changed, layers, slots, entries)
    assert touched == ["kmeans-3"]


@pytest.mark.parametrize("method", list(methods.METHODS))
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(24, 10), (3, 24)), (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8)), (nn.Conv1d(4, 6, 3), (2, 4, 9))],
)
def test_equals_a_float_layer_with_the_dequantized_weights(layer, shape, method):
    """Decoded or packed, a quantized layer computes what a float layer with its weights computes."""
    input = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight = layer.weight.detach().half()
    parameters = methods.fit(weight)[method]
    reference = copy.deepcopy(layer)
    reference.weight.data = methods.apply(method, weight, parameters).float()
    quantized = modules.QUANT_CLASSES[type(layer)].wrap(copy.deepcopy(layer), torch.float16)
    quantized.set_method(method, parameters)
    with torch.no_grad():
        assert torch.equal(quantized(input), reference(input))
        quantized.pack(parameters)
        assert torch.equal(quantized(input), reference(input))


def test_packed_denoiser_computes_the_same_in_fewer_bytes(quantized, dit_inputs):
    denoiser, layers, slots, entries = quantized
    configuration = config.draw_random(slots, 0, 0)
    config.apply(configuration, layers, slots, entries)
    float_bytes = modules.weight_bytes(denoiser)
    with torch.no_grad():
        decoded = denoiser(**dit_inputs).sample
        config.pack(configuration, layers, slots, entries)
        assert torch.equal(denoiser(**dit_inputs).sample, decoded)
    assert not any(hasattr(layer, "weight") or hasattr(layer, "original") for layer in layers.values())
    assert modules.weight_bytes(denoiser) < float_bytes / 4


def test_packed_weights_survive_a_cast(quantized):
    denoiser, layers, slots, entries = quantized
    configuration = config.uniform(slots, "mse-4")
    config.apply(configuration, layers, slots, entries)
    expected = weights_of(layers)
    config.pack(configuration, layers, slots, entries)
    denoiser.to(torch.bfloat16).to(torch.float32)
    assert all(torch.equal(layers[key].effective_weight(torch.float32), expected[key]) for key in layers)
    with pytest.raises(RuntimeError, match="packed"):
        config.apply(config.uniform(slots, "mse-3"), layers, slots, entries)


def test_a_cast_keeps_the_original_exact(quantized):
    denoiser, layers, slots, entries = quantized
    before = {key: layer.original.clone() for key, layer in layers.items()}
    denoiser.to(torch.bfloat16).to(torch.float32)
    assert all(torch.equal(layers[key].original, before[key]) for key in layers)
    config.apply(config.uniform(slots, "kmeans-4"), layers, slots, entries)
    config.restore(layers)
    assert all(torch.equal(layers[key].weight, before[key].float()) for key in layers)


def test_save_pretrained_still_works(quantized, tmp_path, dit_inputs):
    denoiser, layers, slots, entries = quantized
    config.apply(config.uniform(slots, "mse-4"), layers, slots, entries)
    denoiser.save_pretrained(tmp_path / "saved")
    loaded = type(denoiser).from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**dit_inputs).sample, denoiser(**dit_inputs).sample)
