import functools

import pytest
import torch
from torch import nn

from bops.bops import tera_bops
from bops.macs import Macs, count_macs
from models import geometry
from models.families import FAMILIES
from quant.slots import WeightSlot, find_slots


def test_layers_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.linear = nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Linear(8, 5)

        def forward(self, x):
            return self.linear(self.norm(self.conv(x)))

    with torch.device("meta"):
        macs = count_macs(Net(), {"x": torch.zeros(1, 4, 8, 8)})
    assert macs.layers == {"conv": 6 * 64 * 4 * 9, "linear": 6 * 8 * 5 * 8}
    assert macs.norms == 2 * 6 * 64


def slot(key, path, shape, inputs=None):
    return WeightSlot(key, path, torch.Size(shape), key, inputs)


WHOLE = {name: slot(name, name, (2, 5)) for name in "abc"}


def test_sum_by_hand():
    macs = Macs(layers={"a": 10, "b": 100, "c": 1000, "outside": 7}, norms=3, attention_qk=5, attention_av=9)
    methods = {"a": "mse-3", "b": "kmeans-3", "c": None}
    weights = 10 * 3 * 8 + 100 * 16 * 8 + 1000 * 16 * 8 + 7 * 16
    others = 3 * 32 + 5 * 8 * 8 + 9 * 8 * 16
    assert tera_bops(macs, WHOLE, methods, act_bits=8) * 1e12 == pytest.approx(weights + others)


@pytest.mark.parametrize(
    ("method", "bits"), [("mse-8", 8), ("mse-2-g64", 2), ("kmeans-8", 16), ("kmeans_all-2", 16), ("kmeans-4-g64", 16)]
)
def test_methods_outside_the_search_space(method, bits):
    assert tera_bops(Macs(layers={"a": 10}), {"a": WHOLE["a"]}, {"a": method}, act_bits=8) * 1e12 == pytest.approx(80 * bits)


def test_parts_share_their_layer_by_input_channels():
    """A 3x3 convolution of 3 + 5 channels to 2 on 7 positions: 7 x 2 x 27 and 7 x 2 x 45 multiply-accumulates."""
    slots = {"x": slot("x", "conv", (2, 3, 3, 3), (0, 3)), "x_0": slot("x_0", "conv", (2, 5, 3, 3), (3, 8))}
    macs = Macs(layers={"conv": 7 * 2 * 72})
    for first, rest, bits in [("mse-3", "mse-4", (3, 4)), ("mse-4", "kmeans-3", (4, 16)), (None, "mse-3", (16, 3))]:
        expected = 7 * 2 * 27 * bits[0] * 8 + 7 * 2 * 45 * bits[1] * 8
        assert tera_bops(macs, slots, {"x": first, "x_0": rest}, act_bits=8) * 1e12 == pytest.approx(expected)


@functools.cache
def real_macs(name):
    """(MACs, slots) of the family's real denoiser at its resolution."""
    with torch.device("meta"):
        denoiser = geometry.build(name)
        inputs = geometry.example_inputs(name, denoiser, pixels=FAMILIES[name].resolution // 8)
        return count_macs(denoiser, inputs), find_slots(denoiser, FAMILIES[name].slot_rules)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_slot_s_layer_is_counted(name):
    macs, slots = real_macs(name)
    assert macs.layers.keys() == {slot.module_path for slot in slots.values()}
    assert all(macs.layers.values()) and macs.attention_qk and macs.attention_av and macs.norms


def test_dit_xl_at_512_px():
    macs, _ = real_macs("dit")
    tokens, width = 1024, 1152
    assert macs.layers["transformer_blocks.3.attn1.to_q"] == tokens * width**2
    assert macs.layers["transformer_blocks.3.norm1.linear"] == 6 * width**2
    assert macs.layers["pos_embed.proj"] == tokens * width * 16
    assert macs.attention_qk == macs.attention_av == 28 * tokens**2 * width
    # 524.6 GFLOPs in the DiT paper (Table 4), which counts a multiply-accumulate as one.
    total = sum(macs.layers.values()) + macs.attention_qk + macs.attention_av
    assert total == pytest.approx(524.6e9, rel=0.01)


def attention(layers, tokens, width):
    """Queries x keys of self-attention and of cross-attention to 77 text tokens."""
    return layers * tokens * (tokens + 77) * width


def test_unets_attention_at_512_px():
    """Transformer layers at each level: those of 2 down-block, 3 up-block and the middle attentions."""
    sdxl = attention(2 * 5, 32**2, 640) + attention(10 * 5 + 10, 16**2, 1280)
    assert real_macs("sdxl")[0].attention_qk == sdxl
    sdv15 = attention(5, 64**2, 320) + attention(5, 32**2, 640) + attention(5, 16**2, 1280) + attention(1, 8**2, 1280)
    assert real_macs("sdv15")[0].attention_qk == sdv15


def test_sdv15_at_512_px():
    macs, _ = real_macs("sdv15")
    assert macs.layers["conv_in"] == 64**2 * 320 * 4 * 9
    assert macs.layers["up_blocks.2.upsamplers.0.conv"] == 64**2 * 640 * 640 * 9
    assert macs.layers["up_blocks.3.resnets.0.conv_shortcut"] == 64**2 * 320 * (640 + 320)
    assert macs.layers["time_embedding.linear_1"] == 320 * 1280


def test_hunyuan_skip_linear_at_1024_px():
    macs, slots = real_macs("hunyuan")
    assert macs.layers["blocks.30.skip_linear"] == 64 * 64 * 2816 * 1408  # 64 x 64 patches
    halves = [slot.shape for slot in slots.values() if slot.module_path == "blocks.30.skip_linear"]
    assert halves == [(1408, 1408)] * 2


@pytest.mark.parametrize("name", FAMILIES)
def test_fewer_bits_cost_less(name):
    macs, slots = real_macs(name)
    costs = [tera_bops(macs, slots, dict.fromkeys(slots, m)) for m in ("mse-3", "mse-4", "kmeans-4", None)]
    assert costs[0] < costs[1] < costs[2] == costs[3]
    step = sum(macs.layers.values()) * 16 / 1e12  # one bit more for every weight
    assert costs[1] - costs[0] == pytest.approx(step) and costs[3] - costs[1] == pytest.approx(12 * step)
