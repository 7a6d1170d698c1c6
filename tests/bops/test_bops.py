import pytest
import torch
from conftest import REAL_DIT
from diffusers import DiTTransformer2DModel
from torch import nn

from bops.bops import tera_bops
from bops.macs import Macs, count_macs
from models.inputs import denoiser_inputs


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


def test_sum_by_hand():
    macs = Macs(layers={"a": 10, "b": 100, "c": 1000, "outside": 7}, norms=3, attention_qk=5, attention_av=9)
    methods = {"a": "mse-3", "b": "kmeans-3", "c": None}
    weights = 10 * 3 * 8 + 100 * 16 * 8 + 1000 * 16 * 8 + 7 * 16
    assert tera_bops(macs, methods, act_bits=8) * 1e12 == pytest.approx(weights + 3 * 32 + 5 * 8 * 8 + 9 * 8 * 16)


@pytest.fixture(scope="module")
def dit_macs():
    with torch.device("meta"):
        denoiser = DiTTransformer2DModel(**REAL_DIT)
        return count_macs(denoiser, denoiser_inputs(denoiser))


def test_dit_xl_at_512_px(dit_macs):
    tokens, width = 1024, 1152
    assert dit_macs.layers["transformer_blocks.3.attn1.to_q"] == tokens * width**2
    assert dit_macs.layers["transformer_blocks.3.norm1.linear"] == 6 * width**2
    assert dit_macs.layers["pos_embed.proj"] == tokens * width * 16
    assert dit_macs.attention_qk == dit_macs.attention_av == 28 * tokens**2 * width
    assert len(dit_macs.layers) == 255
    # 524.6 GFLOPs in the DiT paper (Table 4), which counts a multiply-accumulate as one.
    total = sum(dit_macs.layers.values()) + dit_macs.attention_qk + dit_macs.attention_av
    assert total == pytest.approx(524.6e9, rel=0.01)


def test_fewer_bits_cost_less(dit_macs):
    costs = [tera_bops(dit_macs, dict.fromkeys(dit_macs.layers, m)) for m in ("mse-3", "mse-4", "kmeans-4", None)]
    assert costs[0] < costs[1] < costs[2] == costs[3]
