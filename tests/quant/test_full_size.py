"""Few blocks of the six denoisers at full width, on random weights, for one denoising step."""

import pytest
import torch

from models import geometry
from models.families import FAMILIES
from quant import multiquantizer
from quant.file_keys import file_key
from quant.model import QuantizedModel
from quant.registry import quantizer
from quant.slots import find_slots, in_part

# Two levels of the U-Nets, at their own channels; four blocks of Hunyuan, since fewer have no skip.
SDXL = {
    "block_out_channels": (320, 640),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (5, 10),
    "layers_per_block": 1,
}
SDV15 = {
    "block_out_channels": (320, 640),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
# family -> changes of its geometry, the modules that are quantized
FEWER = {
    "pixart_alpha": ({"num_layers": 1}, ["transformer_blocks.0.attn1", "transformer_blocks.0.attn2", "caption_projection"]),
    "pixart_sigma": ({"num_layers": 1}, ["transformer_blocks.0.ff"]),
    "hunyuan": ({"num_layers": 4}, ["blocks.3.skip_linear", "blocks.3.attn2"]),
    "sdxl": (SDXL, ["up_blocks.1"]),
    "sdv15": (SDV15, ["up_blocks.1"]),
    "dit": ({"num_layers": 1}, ["transformer_blocks.0.attn1", "transformer_blocks.0.ff"]),
}


def few_blocks(name):
    torch.manual_seed(0)
    return geometry.build(name, **FEWER[name][0]).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_with_a_configuration(name):
    """Quantized to 4 bits, then packed: the prediction is finite, another one, and the same packed."""
    family, denoiser = FAMILIES[name], few_blocks(name)
    inputs = geometry.example_inputs(name, denoiser, pixels=16)
    before = denoiser(**inputs, return_dict=False)[0]
    slots = {
        key: slot
        for key, slot in find_slots(denoiser, family.slot_rules).items()
        if any(in_part(slot, p) for p in FEWER[name][1])
    }
    model = QuantizedModel.of_slots(denoiser, slots, family.dtype)
    model.apply("mse-4")
    quantized = denoiser(**inputs, return_dict=False)[0]
    assert quantized.isfinite().all() and quantized.shape == before.shape
    assert 1e-4 < (quantized - before).norm() / before.norm() < 1
    model.pack("mse-4")
    assert torch.equal(denoiser(**inputs, return_dict=False)[0], quantized)
    assert any(slot.inputs for slot in slots.values()) == bool(family.slot_rules.splits)


def test_six_fits_at_full_width(tmp_path, family):
    model = QuantizedModel(few_blocks("dit"), **family.quantization)
    path, prefix = tmp_path / "mq.pt", "transformer_blocks.0.attn1.to_q"
    multiquantizer.build(model, path, prefix)
    content = torch.load(path, weights_only=True)["slots"]
    (key,) = content
    assert key == file_key(prefix)
    weight = model.weight((prefix, 0))
    assert content[key]["shape"] == [1152, 1152]
    for method, parameters in content[key]["parameters"].items():
        change = (quantizer(method).apply(weight, parameters).float() - weight.float()).norm() / weight.float().norm()
        assert 0.01 < change < 0.35
