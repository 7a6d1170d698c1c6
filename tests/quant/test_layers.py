import copy
import itertools
import weakref

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from conftest import SPLIT_FAMILIES, tiny, tiny_inputs
from torch import nn

from models.families import FAMILIES
from quant import config, exchangeable, registry
from quant.activations import set_activation_bits
from quant.exchangeable import install
from quant.layers import packed_layers, weight_bytes
from quant.model import QuantizedModel
from quant.slots import WeightKey, WeightSlot, find_slots, ties_of

SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "sdv15")]
EACH = pytest.mark.parametrize("quantized", ["dit", *SPLIT_FAMILIES], indirect=True)


class Quantized:
    """A tiny denoiser under quantizers that were fitted to its weights, and inputs of a call."""

    def __init__(self, name, denoiser, slots, entries):
        self.family, self.denoiser, self.slots, self.entries = FAMILIES[name], denoiser, slots, entries
        self.model = QuantizedModel.of_slots(denoiser, slots, self.family.dtype, entries)
        self.inputs = tiny_inputs(name, denoiser)

    def again(self):
        """Another of the same weights, at full precision."""
        name = self.family.name
        return Quantized(name, tiny(name), self.slots, self.entries)

    @property
    def parts(self):
        return self.model.parts

    @torch.no_grad()
    def predict(self):
        return self.denoiser(**self.inputs, return_dict=False)[0]

    def apply(self, configuration, **how):
        self.model.apply(configuration, **how)

    def pack(self, configuration):
        self.model.pack(configuration)

    def uniform(self, method):
        return config.uniform(self.slots, method)

    def weights(self):
        """{key: the weight as it stands}."""
        layers = {path: self.denoiser.get_submodule(path) for path in {slot.module_path for slot in self.slots.values()}}
        return {key: slot.part_of(layers[slot.module_path].weight).detach().clone() for key, slot in self.slots.items()}


@pytest.fixture
def quantized(request, load_tiny):
    name = getattr(request, "param", "dit")
    return Quantized(name, *load_tiny(name))


def test_install_changes_nothing_yet(denoiser, dit_inputs, family):
    with torch.no_grad():
        before = denoiser(**dit_inputs).sample
        state = {name: value.clone() for name, value in denoiser.state_dict().items()}
        kind = type(denoiser)
        install(denoiser, find_slots(denoiser, family.slot_rules), family.dtype)
        assert type(denoiser) is kind
        assert torch.equal(denoiser(**dit_inputs).sample, before)
    assert state.keys() == denoiser.state_dict().keys()
    assert all(torch.equal(value, denoiser.state_dict()[name]) for name, value in state.items())


def test_install_twice_is_once(denoiser, family):
    once = install(denoiser, find_slots(denoiser, family.slot_rules), family.dtype)
    again = install(denoiser, find_slots(denoiser, family.slot_rules), family.dtype)
    assert list(again) == list(once) == list(find_slots(denoiser, family.slot_rules))
    assert all(again[key] is once[key] for key in once)


@EACH
def test_a_configuration_acts_and_restores(quantized):
    before, weights = quantized.predict(), quantized.weights()
    quantized.apply(quantized.uniform("mse-3"))
    assert not torch.allclose(quantized.predict(), before, atol=1e-3)
    quantized.model.restore()
    assert torch.equal(quantized.predict(), before)
    assert all(torch.equal(weight, weights[key]) for key, weight in quantized.weights().items())


def float_bytes(quantized):
    """Bytes of the weights and of what is kept of them beside, on the host."""
    layers = {part.layer for part in quantized.parts.values()}
    originals = [layer.original for layer in layers if layer.original is not None]
    return sum(layer.weight.nbytes for layer in layers), sum(original.nbytes for original in originals)


@EACH
def test_originals_are_kept_while_weights_are_quantized_and_once(quantized):
    weights, originals = float_bytes(quantized)
    assert originals == 0
    for method in ("mse-3", "kmeans-4"):
        quantized.apply(quantized.uniform(method))
        # float32 weights, originals in the family's precision
        assert float_bytes(quantized) == (weights, weights * quantized.family.precision_bits // 32)
    quantized.model.restore()
    assert float_bytes(quantized) == (weights, 0)


def test_originals_wait_on_the_host(quantized):
    """Whatever device the weights are on; here one that has no values, as every device but the host has none to spare."""
    quantized.apply(quantized.uniform("mse-4"))
    quantized.denoiser.to("meta")
    assert all(part.layer.weight.is_meta and part.layer.original.device.type == "cpu" for part in quantized.parts.values())


@EACH
def test_without_originals_weights_are_the_same_for_good(quantized):
    configuration = config.draw_random(quantized.slots, 0, 0)
    once = quantized.again()
    quantized.apply(configuration)
    once.apply(configuration, for_good=True)
    assert torch.equal(once.predict(), quantized.predict())
    assert float_bytes(once)[1] == 0
    once.apply(configuration)  # nothing changes
    key = next(iter(once.slots))
    other = next(method for method in registry.SEARCH_SPACE if method != configuration[key])
    parameters = once.entries[key]["parameters"]
    for change in (lambda part: part.set_method(None), lambda part: part.set_method(other, parameters[other])):
        with pytest.raises(RuntimeError, match="for good"):
            change(once.parts[key])
    with pytest.raises(RuntimeError, match="for good"):
        once.pack(configuration)


@EACH
def test_packing_needs_no_quantized_copy(quantized):
    """Straight from the float weights, in their own precision or in float32, it gives what applying and packing gives."""
    configuration = config.draw_random(quantized.slots, 0, 0)
    straight, narrow = quantized.again(), quantized.again()
    narrow.denoiser.to(narrow.family.dtype)
    quantized.apply(configuration)
    for each in (quantized, straight, narrow):
        each.pack(configuration)
    assert torch.equal(straight.predict(), quantized.predict())
    theirs = dict(packed_layers(narrow.denoiser))
    for path, layer in packed_layers(quantized.denoiser):
        assert torch.equal(theirs[path].decoded(), layer.decoded()), path


# Hunyuan-DiT reads weights of layers that it does not call, so its pipeline leaves it out of this kind of offloading.
@pytest.mark.parametrize("quantized", ["dit", *SLOWER], indirect=True)
def test_offloaded_layers_change_and_pack_where_they_are_kept(quantized):
    """Under accelerate's hooks, put on before or after, and off again: each output is what it is without."""
    first, second = (config.draw_random(quantized.slots, 0, index) for index in range(2))
    early, late = quantized.again(), quantized.again()
    offload(late.denoiser)
    early_denoiser = tiny(early.family.name)
    offload(early_denoiser)
    early = Quantized(early.family.name, early_denoiser, early.slots, early.entries)
    for each in (early, late):
        set_activation_bits(each.denoiser, 8)
    set_activation_bits(quantized.denoiser, 8)
    for configuration in (first, second):
        for each in (quantized, early, late):
            each.apply(configuration)
            assert torch.equal(each.predict(), quantized.predict())
    floats = [weakref.ref(part.layer._hf_hook.weights_map["weight"]) for part in late.parts.values()]
    for each in (quantized, early, late):
        each.pack(second)
        assert torch.equal(each.predict(), quantized.predict())
    assert not any(reference() is not None for reference in floats)
    assert all(parameter.is_meta for parameter in late.denoiser.parameters())  # codes too
    remove_hook_from_submodules(late.denoiser)
    assert torch.equal(late.predict(), quantized.predict())


def offload(denoiser):
    """As diffusers does it layer by layer, to this machine's own device."""
    cpu_offload(denoiser, torch.device("cpu"), offload_buffers=len(denoiser._parameters) > 0)


def test_a_layer_whose_forward_is_replaced_is_refused(denoiser, family):
    layer = denoiser.get_submodule("transformer_blocks.0.attn1.to_q")
    layer.forward = lambda input: input
    with pytest.raises(RuntimeError, match="forward of a Linear is replaced"):
        install(denoiser, find_slots(denoiser, family.slot_rules), family.dtype)


def test_no_drift_over_500_changes(quantized):
    drawn = [config.draw_random(quantized.slots, 0, index) for index in range(10)]
    fresh = []
    for configuration in drawn:
        quantized.model.restore()
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
    config.check(configuration, ties_of(quantized.slots))
    quantized.apply(configuration)
    expected = {}  # module path -> its quantized parts
    for key, slot in quantized.slots.items():
        parameters = quantized.entries[slot.tie]["parameters"][configuration[key]]
        own = registry.quantizer(configuration[key]).apply(originals[key], parameters)
        expected.setdefault(slot.module_path, []).append(own)
    for path, weights in expected.items():
        weight = quantized.denoiser.get_submodule(path).weight
        assert torch.equal(weight, torch.cat(weights, dim=1).float()), path
    assert sum(len(weights) == 2 for weights in expected.values()) == sum(key.part for key in quantized.slots)


@EACH
def test_unchanged_layers_are_not_touched(quantized, monkeypatch):
    quantized.apply(quantized.uniform("mse-4"))
    touched = []
    monkeypatch.setattr(exchangeable.WeightPart, "set_method", lambda self, *args: touched.append((self.slot.key, args[0])))
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
        key = WeightKey("0", number)
        slots[key] = WeightSlot(key, shape, key, str(key), inputs)
    parts = install(holder, slots if len(slots) > 1 else find_slots(holder), family.dtype)
    return holder[0], list(parts.values())


def put(parts, names):
    """Fit each part to the method named and put it under it; returns the parts' parameters."""
    parameters = [registry.fit(part.original)[name] for part, name in zip(parts, names, strict=True)]
    for part, name, fitted in zip(parts, names, parameters, strict=True):
        part.set_method(name, fitted)
    return parameters


@pytest.mark.parametrize("method", registry.SEARCH_SPACE)
@LAYERS
def test_equals_a_float_layer_with_the_dequantized_weights(layer, shape, method, family):
    """Decoded or packed, a quantized layer computes what a float layer with its weights computes."""
    input = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantized, parts = quantizable(layer, family, (0, layer.weight.shape[1]))
    (parameters,) = put(parts, [method])
    reference = copy.deepcopy(layer)
    reference.weight.data = registry.quantizer(method).apply(layer.weight.detach().half(), parameters).float()
    with torch.no_grad():
        assert torch.equal(quantized(input), reference(input))
        assert torch.equal(quantized.packed([method], [parameters])(input), reference(input))


@pytest.mark.parametrize("names", list(itertools.product(registry.SEARCH_SPACE, repeat=2)), ids="+".join)
@LAYERS
def test_a_split_layer_is_its_two_halves(layer, shape, names, family):
    """Fits, methods, codes and parameters of the first input channels and of the rest have nothing in common."""
    boundary, weight = layer.weight.shape[1] // 3, layer.weight.detach().half()
    quantized, parts = quantizable(layer, family, (0, boundary, layer.weight.shape[1]))
    halves = [weight[:, :boundary].contiguous(), weight[:, boundary:].contiguous()]
    fitted = [registry.fit(half)[name] for half, name in zip(halves, names, strict=True)]
    reference = copy.deepcopy(layer)
    expected = [registry.quantizer(name).apply(half, p) for name, half, p in zip(names, halves, fitted, strict=True)]
    reference.weight.data = torch.cat(expected, dim=1).float()
    parameters = put(parts, names)
    assert torch.equal(quantized.weight, reference.weight)
    input = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(quantized(input), reference(input))
        packed = quantized.packed(names, parameters)
        assert torch.equal(packed(input), reference(input)) and torch.equal(packed.weight.clone(), reference.weight)


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
    packed = dict(packed_layers(quantized.denoiser))
    assert packed.keys() == {slot.module_path for slot in quantized.slots.values()}
    assert not any("weight" in layer.state_dict() for layer in packed.values())
    precision_bits = quantized.family.precision_bits
    description = config.describe(configuration, quantized.slots, quantized.entries, precision_bits)
    free = [slot for key, slot in quantized.slots.items() if slot.tie == key]
    codes = sum(slot.shape.numel() * registry.quantizer(configuration[slot.key]).bits / 8 for slot in free)
    # Zero points are small integers, tied weights are there once, and each row's last codes fill whole bytes.
    rows = sum(len(layer.codes) for layer in packed.values())
    assert codes < weight_bytes(quantized.denoiser) <= config.quantized_size(description) + 3 * rows


@EACH
def test_packed_weights_survive_a_cast(quantized):
    configuration = config.draw_random(quantized.slots, 1, 0)
    quantized.apply(configuration)
    expected = {part.slot.module_path: part.layer.weight.clone() for part in quantized.parts.values()}
    quantized.pack(configuration)
    nn.Module.to(nn.Module.to(quantized.denoiser, torch.bfloat16), torch.float32)
    packed = dict(packed_layers(quantized.denoiser))
    assert all(torch.equal(packed[path].decoded(torch.float32), weight) for path, weight in expected.items())
    with pytest.raises(RuntimeError, match="packed"):
        quantized.apply(quantized.uniform("mse-3") | {next(iter(quantized.slots)): "kmeans-3"})


@EACH
def test_a_cast_keeps_the_original_exact(quantized):
    before = {key: part.original.clone() for key, part in quantized.parts.items()}
    quantized.denoiser.to(torch.bfloat16).to(torch.float32)
    assert all(torch.equal(part.original, before[key]) for key, part in quantized.parts.items())
    quantized.apply(quantized.uniform("kmeans-4"))
    quantized.model.restore()
    assert all(torch.equal(weight, before[key].float()) for key, weight in quantized.weights().items())


@EACH
def test_save_pretrained_still_works(quantized, tmp_path):
    quantized.apply(quantized.uniform("mse-4"))
    expected = quantized.predict()
    quantized.denoiser.save_pretrained(tmp_path / "saved")
    quantized.denoiser = type(quantized.denoiser).from_pretrained(tmp_path / "saved").eval().requires_grad_(False)
    assert torch.equal(quantized.predict(), expected)
