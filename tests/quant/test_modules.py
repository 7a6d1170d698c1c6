import copy
import itertools

import pytest
import torch
from conftest import SPLIT_FAMILIES, tiny_inputs
from torch import nn

from models.families import FAMILIES
from models.layers import WeightSlot, find_slots
from quant import config, methods, modules

EACH = pytest.mark.parametrize("quantized", ["dit", *SPLIT_FAMILIES], indirect=True)


class Quantized:
    """A tiny denoiser with quantizable layers, and what a configuration needs."""

    def __init__(self, name, denoiser, slots, entries):
        self.family, self.denoiser, self.slots, self.entries = FAMILIES[name], denoiser, slots, entries
        self.parts = modules.install(denoiser, self.family, slots)
        self.inputs = tiny_inputs(name, denoiser)

    @torch.no_grad()
    def predict(self):
        return self.denoiser(**self.inputs, return_dict=False)[0]

    def apply(self, configuration):
        config.apply(configuration, self.parts, self.slots, self.entries)

    def pack(self, configuration):
        self.apply(configuration)
        config.pack(configuration, self.parts, self.slots, self.entries)

    def uniform(self, method):
        return config.uniform(self.slots, method)

    def weights(self):
        return {key: part.slot.part_of(part.layer.weight).detach().clone() for key, part in self.parts.items()}


@pytest.fixture
def quantized(request, load_tiny):
    name = getattr(request, "param", "dit")
    return Quantized(name, *load_tiny(name))


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


def test_install_twice_is_once(denoiser, family):
    once = modules.install(denoiser, family)
    again = modules.install(denoiser, family)
    assert list(again) == list(once) == list(find_slots(denoiser, family))
    assert all(again[key] is once[key] for key in once)


@EACH
def test_a_configuration_acts_and_restores(quantized):
    before, weights = quantized.predict(), quantized.weights()
    quantized.apply(quantized.uniform("mse-3"))
    assert not torch.allclose(quantized.predict(), before, atol=1e-3)
    config.restore(quantized.parts)
    assert torch.equal(quantized.predict(), before)
    assert all(torch.equal(weight, weights[key]) for key, weight in quantized.weights().items())


def test_no_drift_over_500_changes(quantized):
    drawn = [config.draw_random(quantized.slots, 0, index) for index in range(10)]
    fresh = []
    for configuration in drawn:
        config.restore(quantized.parts)
        quantized.apply(configuration)
        fresh.append(quantized.weights())
    for step in range(500):
        quantized.apply(drawn[step * 7 % 10])
    for configuration, expected in zip(drawn, fresh, strict=True):
        for _ in range(2):  # once, and again
            quantized.apply(configuration)
            assert all(torch.equal(weight, expected[key]) for key, weight in quantized.weights().items())


@EACH
def test_weights_are_the_methods_weights(quantized):
    """Each part of a layer's weight, cut where its slot says, as the part's own method represents it."""
    originals = {key: weight.to(quantized.family.dtype) for key, weight in quantized.weights().items()}
    configuration = config.draw_random(quantized.slots, 3, 3)
    config.check(configuration, quantized.slots)
    quantized.apply(configuration)
    expected = {}  # module path -> its quantized parts
    for key, slot in quantized.slots.items():
        parameters = quantized.entries[slot.tie]["parameters"][configuration[key]]
        expected.setdefault(slot.module_path, []).append(methods.apply(configuration[key], originals[key], parameters))
    for path, weights in expected.items():
        weight = quantized.denoiser.get_submodule(path).weight
        assert torch.equal(weight, torch.cat(weights, dim=1).float()), path
    assert sum(len(weights) == 2 for weights in expected.values()) == sum(key.endswith("_0") for key in quantized.slots)


@EACH
def test_unchanged_layers_are_not_touched(quantized, monkeypatch):
    quantized.apply(quantized.uniform("mse-4"))
    touched = []
    monkeypatch.setattr(modules.WeightPart, "set_method", lambda self, *args: touched.append((self.slot.key, args[0])))
    last = list(quantized.slots)[-1]
    quantized.apply(quantized.uniform("mse-4") | {last: "kmeans-3"})
    assert touched == [(last, "kmeans-3")]


LAYERS = pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(24, 10), (3, 24)), (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8)), (nn.Conv1d(4, 6, 3), (2, 4, 9))],
)


def quantizable(layer, family, boundaries):
    """A quantizable copy of `layer` and its parts between the boundaries, which are numbers of input channels."""
    holder = nn.Sequential(copy.deepcopy(layer))
    slots = {}
    for number, inputs in enumerate(itertools.pairwise(boundaries)):
        shape = layer.weight[:, slice(*inputs)].shape
        slots[f"part {number}"] = WeightSlot(f"part {number}", "0", shape, f"part {number}", inputs)
    parts = modules.install(holder, family, slots if len(slots) > 1 else None)
    return holder[0], list(parts.values())


def put(parts, names):
    """Fit each part to the method named and put it under it; returns the parts' parameters."""
    parameters = [methods.fit(part.original)[name] for part, name in zip(parts, names, strict=True)]
    for part, name, fitted in zip(parts, names, parameters, strict=True):
        part.set_method(name, fitted)
    return parameters


@pytest.mark.parametrize("method", list(methods.METHODS))
@LAYERS
def test_equals_a_float_layer_with_the_dequantized_weights(layer, shape, method, family):
    """Decoded or packed, a quantized layer computes what a float layer with its weights computes."""
    input = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantized, parts = quantizable(layer, family, (0, layer.weight.shape[1]))
    (parameters,) = put(parts, [method])
    reference = copy.deepcopy(layer)
    reference.weight.data = methods.apply(method, layer.weight.detach().half(), parameters).float()
    with torch.no_grad():
        assert torch.equal(quantized(input), reference(input))
        parts[0].pack(method, parameters)
        assert torch.equal(quantized(input), reference(input))


@pytest.mark.parametrize("names", list(itertools.product(methods.METHODS, repeat=2)), ids="+".join)
@LAYERS
def test_a_split_layer_is_its_two_halves(layer, shape, names, family):
    """Fits, methods, codes and parameters of the first input channels and of the rest have nothing in common."""
    boundary, weight = layer.weight.shape[1] // 3, layer.weight.detach().half()
    quantized, parts = quantizable(layer, family, (0, boundary, layer.weight.shape[1]))
    halves = [weight[:, :boundary].contiguous(), weight[:, boundary:].contiguous()]
    fitted = [methods.fit(half)[name] for half, name in zip(halves, names, strict=True)]
    reference = copy.deepcopy(layer)
    expected = [methods.apply(name, half, p) for name, half, p in zip(names, halves, fitted, strict=True)]
    reference.weight.data = torch.cat(expected, dim=1).float()
    parameters = put(parts, names)
    assert torch.equal(quantized.weight, reference.weight)
    input = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(quantized(input), reference(input))
        for part, name, own in zip(parts, names, parameters, strict=True):
            part.pack(name, own)
        assert quantized.is_packed and not hasattr(quantized, "weight") and quantized.original is None
        assert torch.equal(quantized(input), reference(input))


def test_a_part_changes_and_restores_alone(family):
    layer = nn.Linear(24, 10)
    quantized, parts = quantizable(layer, family, (0, 8, 24))
    put(parts, ["mse-3", "kmeans-4"])
    both = quantized.weight.detach().clone()
    parts[0].set_method(None)
    assert torch.equal(quantized.weight[:, 8:], both[:, 8:])
    assert torch.equal(quantized.weight[:, :8], layer.weight[:, :8].half().float())
    assert [part.method for part in parts] == [None, "kmeans-4"]


@EACH
def test_packed_denoiser_computes_the_same_in_fewer_bytes(quantized):
    configuration = config.draw_random(quantized.slots, 0, 0)
    quantized.apply(configuration)
    decoded = quantized.predict()
    quantized.pack(configuration)
    assert torch.equal(quantized.predict(), decoded)
    layers = [part.layer for part in quantized.parts.values()]
    assert not any(hasattr(layer, "weight") or layer.original is not None for layer in layers)
    precision_bits = quantized.family.precision_bits
    description = config.describe(configuration, quantized.slots, quantized.entries, precision_bits)
    codes = sum(slot.shape.numel() * methods.METHODS[configuration[k]].bits / 8 for k, slot in quantized.slots.items())
    # Zero points are small integers, and the last codes of a slot fill whole bytes.
    assert codes < modules.weight_bytes(quantized.denoiser) <= config.quantized_size(description) + 3 * len(layers)


@EACH
def test_packed_weights_survive_a_cast(quantized):
    configuration = config.draw_random(quantized.slots, 1, 0)
    quantized.apply(configuration)
    expected = {part.layer: part.layer.weight.clone() for part in quantized.parts.values()}
    quantized.pack(configuration)
    quantized.denoiser.to(torch.bfloat16).to(torch.float32)
    assert all(torch.equal(layer.effective_weight(torch.float32), weight) for layer, weight in expected.items())
    with pytest.raises(RuntimeError, match="packed"):
        quantized.apply(quantized.uniform("mse-3") | {next(iter(quantized.slots)): "kmeans-3"})


@EACH
def test_a_cast_keeps_the_original_exact(quantized):
    before = {key: part.original.clone() for key, part in quantized.parts.items()}
    quantized.denoiser.to(torch.bfloat16).to(torch.float32)
    assert all(torch.equal(part.original, before[key]) for key, part in quantized.parts.items())
    quantized.apply(quantized.uniform("kmeans-4"))
    config.restore(quantized.parts)
    assert all(torch.equal(weight, before[key].float()) for key, weight in quantized.weights().items())


@EACH
def test_save_pretrained_still_works(quantized, tmp_path):
    quantized.apply(quantized.uniform("mse-4"))
    expected = quantized.predict()
    quantized.denoiser.save_pretrained(tmp_path / "saved")
    quantized.denoiser = type(quantized.denoiser).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(quantized.predict(), expected)
