"""Calls that start at the block of a changed weight give what whole calls give, bit for bit."""

import pytest
import torch

from autobuild import sensitivity
from autobuild.prefix import blocks_of
from models.drawing import BatchSize, SamplingSettings
from models.families import FAMILIES
from models.pipelines import load_sampler

NAMES = ["dit", "sdxl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("hunyuan", "pixart_alpha", "sdv15"))]


def probe_of(name):
    family = FAMILIES[name]
    sampler = load_sampler(family, "embedded", torch.device("cpu"))
    resolution = None if family.num_classes else family.embedded.resolution
    settings = SamplingSettings(seed=5, steps=4, guidance=3.0, res=resolution, batch_size=BatchSize(1))
    prompts = [3, 7] if family.num_classes else ["a red seven", "a green two"]
    return sensitivity.Probe(sampler.denoiser, sensitivity.record_calls(sampler, prompts, settings, 2), settings.batch_size)


def growing(layer):
    before = layer.weight.data

    def put(factor):
        layer.weight.data = before if factor is None else factor * before

    return put


def shifted(probe, layer):
    """(change, shift) where a layer's weight grows by a tenth; the layers that run meanwhile, in turn."""
    put, ran = growing(layer), []
    handles = [each.register_forward_pre_hook(lambda module, _: ran.append(module)) for each in probe.prefix.places]
    try:
        return *probe.shift(put, 1.1), ran
    finally:
        put(None)
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_shifts_are_those_of_whole_calls(name):
    probe = probe_of(name)
    places = probe.prefix.places
    layers = sorted(places, key=places.get)
    assert len(probe.prefix.blocks) > 4 and places[layers[-1]] == len(probe.prefix.order)
    for layer in layers[:: len(layers) // 5]:
        probe.prefix.forget()
        change, shift, whole = shifted(probe, layer)
        probe.start_at([layer])
        again, shift_again, ran = shifted(probe, layer)
        assert again == change > 0 and torch.equal(shift_again, shift)
        assert probe.prefix.start == places[layer]
        assert len(ran) == len(whole) if places[layer] == 0 else len(ran) < len(whole)


def test_calls_are_whole_where_the_memory_is_too_small():
    probe = probe_of("dit")
    layer = max(probe.prefix.places, key=probe.prefix.places.get)
    change, shift, whole = shifted(probe, layer)
    probe.prefix.limit_bytes = 0
    assert probe.start_at([layer]) == len(probe.prefix.order) and probe.prefix.start == 0
    again, shift_again, ran = shifted(probe, layer)
    assert again == change and torch.equal(shift_again, shift) and len(ran) == len(whole)


def test_only_what_is_still_read_is_kept():
    """Of a plain transformer that is one block's output, of the middle of 28 as of the first."""
    probe = probe_of("dit")
    for place in (1, 14):
        probe.prefix.move(place, probe._ask)
        for outputs in probe.prefix.kept.values():
            assert [output.is_read for output in outputs] == [False] * (place - 1) + [True]
            assert outputs[0].value.untyped_storage().nbytes() < 100 or place == 1


def test_blocks_are_the_smallest_that_hold_whole_layers():
    unet = load_sampler(FAMILIES["sdxl"], "embedded", torch.device("cpu")).denoiser
    names = {module: name for name, module in unet.named_modules()}
    found = [names[block] for block in blocks_of(unet)]
    assert "mid_block.attentions.0.transformer_blocks.0" in found and "mid_block.resnets.1" in found
    assert not any(one != other and one.startswith(f"{other}.") for one in found for other in found)
