import functools

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn
from zoo import denoisers

from bops.bops import tera_bops
from bops.macs import Macs, count_macs
from models import geometry
from models.families import FAMILIES
from quant.slots import ANY_MODULE, WeightKey, WeightSlot, find_slots


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


def slot(shape, path, part=0, inputs=None):
    key = WeightKey(path, part)
    return WeightSlot(key, torch.Size(shape), key, str(key), inputs)


WHOLE = {name: slot((2, 5), name) for name in "abc"}


def test_sum_by_hand():
    macs = Macs(layers={"a": 10, "b": 100, "c": 1000, "outside": 7}, norms=3, attention_qk=5, attention_av=9, products=2)
    methods = {"a": "mse-3", "b": "kmeans-3", "c": None}
    weights = 10 * 3 * 8 + 100 * 16 * 8 + 1000 * 16 * 8 + 7 * 16
    others = 3 * 32 + 5 * 8 * 8 + 9 * 8 * 16 + 2 * 16 * 16
    assert tera_bops(macs, WHOLE, methods, act_bits=8) * 1e12 == pytest.approx(weights + others)


@pytest.mark.parametrize(
    ("method", "bits"), [("mse-8", 8), ("mse-2-g64", 2), ("kmeans-8", 16), ("kmeans_all-2", 16), ("kmeans-4-g64", 16)]
)
def test_methods_outside_the_search_space(method, bits):
    assert tera_bops(Macs(layers={"a": 10}), {"a": WHOLE["a"]}, {"a": method}, act_bits=8) * 1e12 == pytest.approx(80 * bits)


def test_parts_share_their_layer_by_input_channels():
    """A 3x3 convolution of 3 + 5 channels to 2 on 7 positions: 7 x 2 x 27 and 7 x 2 x 45 multiply-accumulates."""
    slots = {"x": slot((2, 3, 3, 3), "conv", 0, (0, 3)), "rest": slot((2, 5, 3, 3), "conv", 1, (3, 8))}
    macs = Macs(layers={"conv": 7 * 2 * 72})
    for first, rest, bits in [("mse-3", "mse-4", (3, 4)), ("mse-4", "kmeans-3", (4, 16)), (None, "mse-3", (16, 3))]:
        expected = 7 * 2 * 27 * bits[0] * 8 + 7 * 2 * 45 * bits[1] * 8
        assert tera_bops(macs, slots, {"x": first, "rest": rest}, act_bits=8) * 1e12 == pytest.approx(expected)


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
    assert all(macs.layers.values()) and macs.attention_qk and macs.attention_av and macs.norms and not macs.products


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


# Beyond the six families


@functools.cache
def other_macs(name):
    """MACs of two images, or one video, and the denoiser."""
    denoiser = denoisers.build(name)
    return count_macs(denoiser, denoisers.inputs(name)), denoiser


@pytest.mark.parametrize("name", denoisers.CONFIGS)
def test_other_denoisers_are_counted_whatever_way_attention_gets_its_arguments(name, monkeypatch):
    """Attention's products are those of the shapes that PyTorch's own function sees."""
    macs, denoiser = other_macs(name)
    assert macs.layers.keys() == {slot.module_path for slot in find_slots(denoiser, ANY_MODULE).values()}
    assert all(macs.layers.values()) and macs.norms
    shapes, attention = [], F.scaled_dot_product_attention

    def heard(query, key, value, *args, **kwargs):
        shapes.append((*query.shape, key.shape[-2], value.shape[-1]))
        return attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", heard)
    denoiser(**denoisers.inputs(name))
    assert shapes
    assert macs.attention_qk == sum(n * h * t * d * s for n, h, t, d, s, _ in shapes)
    assert macs.attention_av == sum(n * h * t * s * v for n, h, t, _, s, v in shapes)


def test_flux_by_hand():
    """Two double and two single blocks over 16 image and 6 text tokens, 2 heads of 16, two images."""
    macs, _ = other_macs("flux")
    assert macs.attention_qk == macs.attention_av == 2 * 4 * 22 * 22 * 32
    assert macs.layers["transformer_blocks.0.attn.to_q"] == 2 * 16 * 32 * 32
    assert macs.layers["single_transformer_blocks.1.proj_mlp"] == 2 * 22 * 32 * 128


def test_wan_by_hand():
    """Three frames of 8 x 8 in patches of 1 x 2 x 2 are 48 tokens; two blocks look at them and at 6 of text."""
    macs, _ = other_macs("wan")
    assert macs.layers["patch_embedding"] == 48 * 32 * (16 * 1 * 2 * 2)
    assert macs.attention_qk == macs.attention_av == 2 * 48 * (48 + 6) * 32


def test_linear_attention_by_hand():
    """Sana's, of two images in each of two blocks and 2 heads of 16: values and a row of ones times 64 keys, and that
    times as many queries.
    """
    macs, _ = other_macs("sana")
    assert macs.products == 2 * 2 * 2 * (16 + 1) * 16 * (64 + 64)
    assert macs.attention_qk == 2 * 2 * 64 * 6 * 32  # cross-attention to the text


def test_attention_written_out_costs_what_the_function_costs():
    attention = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8)
    inputs = {"hidden_states": torch.zeros(3, 9, 16), "encoder_hidden_states": torch.zeros(3, 5, 12)}
    counted = []
    for processor in (AttnProcessor2_0(), AttnProcessor()):
        attention.set_processor(processor)
        counted.append(count_macs(attention, inputs))
    assert counted[0].attention_qk + counted[0].attention_av == counted[1].products == 2 * 3 * 9 * 5 * 16
    assert counted[0].products == counted[1].attention_qk == 0


def test_shared_keys_are_multiplied_by_every_query_head():
    class Net(nn.Module):
        def forward(self, query, key):
            return F.scaled_dot_product_attention(query=query, key=key, value=key, enable_gqa=True)

    macs = count_macs(Net(), {"query": torch.zeros(1, 6, 5, 4), "key": torch.zeros(1, 2, 7, 4)})
    assert macs.attention_qk == macs.attention_av == 6 * 5 * 7 * 4
