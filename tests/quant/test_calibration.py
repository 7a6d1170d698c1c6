"""Moments of layers' inputs: by hand, and equal to direct computation."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo.denoisers import build, inputs

from errors import InputError
from quant import QuantizedModel, calibration
from quant.calibration import collect
from quant.slots import WeightKey

TOKENS = torch.tensor([[1.0, 2.0], [3.0, -1.0]])


def moments_of(module, *calls, **options):
    return collect(module, QuantizedModel(module).slots, [functools.partial(module, each) for each in calls], **options)


def assert_moments(found, rows):
    """`found` are the moments of these inputs [r, n]."""
    rows = rows.double()
    torch.testing.assert_close(found.second.double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean.double(), rows.mean(dim=0), rtol=1e-5, atol=1e-6)
    assert found.count == len(rows)


def test_a_linear_layer_by_hand():
    found = moments_of(nn.Sequential(nn.Linear(2, 3)), TOKENS)[WeightKey("0")]
    assert found.second.tolist() == [[5.0, -0.5], [-0.5, 2.5]]  # (1 + 9) / 2, (2 - 3) / 2, (4 + 1) / 2
    assert found.mean.tolist() == [2.0, 0.5] and found.diagonal.tolist() == [5.0, 2.5] and found.count == 2


CONVOLUTIONS = {
    "1d": (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 9)),
    "stride": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 8, 7)),
    "dilation": (nn.Conv2d(3, 4, (3, 2), padding=(2, 0), dilation=(2, 1)), (2, 3, 8, 7)),
    "same": (nn.Conv2d(3, 4, 4, padding="same"), (2, 3, 8, 7)),
    "circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 8, 7)),
    "3d": (nn.Conv3d(2, 4, (1, 3, 3), padding=(0, 1, 1)), (1, 2, 3, 5, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_patches_times_the_weight_are_what_a_convolution_computes(name):
    """An independent route: moments of the output by moments of the input."""
    layer, shape = CONVOLUTIONS[name]
    input = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = moments_of(nn.Sequential(layer), input)[WeightKey("0")]
    with torch.no_grad():
        output = (layer(input) - layer.bias.view(-1, *(1 for _ in shape[2:]))).transpose(0, 1).flatten(1)  # [C, r]
        rows = layer.weight.flatten(1)
        torch.testing.assert_close(rows @ found.second @ rows.T, output @ output.T / output.shape[1])
        torch.testing.assert_close(rows @ found.mean, output.mean(dim=1))
    assert found.count == output.shape[1]


def test_a_convolution_is_unfolded_as_torch_does():
    layer, shape = CONVOLUTIONS["stride"]
    input = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = F.unfold(input, 3, stride=2, padding=1).transpose(1, 2).flatten(0, 1)
    assert_moments(moments_of(nn.Sequential(layer), input)[WeightKey("0")], rows)


def test_parts_of_a_split_weight_see_their_own_columns():
    module = nn.ModuleDict({"linear": nn.Linear(5, 3), "conv": nn.Conv2d(5, 3, 3)})
    slots = QuantizedModel(module, splits={"linear": 2, "conv": 2}).slots
    tokens, image = torch.randn(4, 5), torch.randn(2, 5, 6, 6)
    calls = [lambda: (module["linear"](tokens), module["conv"](image))]
    found = collect(module, slots, calls)
    patches = F.unfold(image, 3).transpose(1, 2).flatten(0, 1)
    assert_moments(found[WeightKey("linear", 0)], tokens[:, :2])
    assert_moments(found[WeightKey("linear", 1)], tokens[:, 2:])
    assert_moments(found[WeightKey("conv", 0)], patches[:, :18])
    assert_moments(found[WeightKey("conv", 1)], patches[:, 18:])


def test_grouped_convolutions_and_layers_that_are_not_called_have_none():
    module = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    module.idle = nn.Linear(2, 2)
    slots = QuantizedModel(module).slots
    found = collect(module, slots, [lambda: module[1](module[0](torch.randn(1, 4, 6, 6)))])
    assert list(found) == [WeightKey("1")]


class Attention(nn.Module):
    """Queries of one input, keys and values of another; the middle one changes its input in place."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.after = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x):
        y = x + 1
        out = self.q(x) + self.k(y) + self.v(y)
        return self.after(y.mul_(2)) + out


def test_inputs_that_layers_share_are_summed_once(monkeypatch):
    module, x, summed = Attention(), torch.randn(5, 3), []

    original = calibration.input_rows
    monkeypatch.setattr(calibration, "input_rows", lambda layer, *args: summed.append(layer) or original(layer, *args))
    found = moments_of(module, x)
    assert summed == [module.q, module.k, module.after]
    for name, rows in {"q": x, "k": x + 1, "v": x + 1, "after": 2 * (x + 1)}.items():
        assert_moments(found[WeightKey(name)], rows)


def test_a_small_budget_takes_more_passes_and_gives_the_same():
    module, x, asked = Attention(), torch.randn(5, 3), []
    slots = QuantizedModel(module).slots
    calls = [lambda: asked.append(None) or module(x)]
    whole, first = collect(module, slots, calls), len(asked)
    pieces = collect(module, slots, calls, budget_bytes=40)  # of one matrix of 3 x 3 float32 numbers
    assert len(asked) - first == first + 2
    for key in whole:
        assert torch.equal(whole[key].second, pieces[key].second)


def test_masked_tokens_are_left_out():
    """Also where a picture has as many tokens as the text."""
    denoiser, arguments = build("pixart"), inputs("pixart")
    text = torch.randn(2, 16, arguments["encoder_hidden_states"].shape[2])  # as the tokens of 8 x 8 latents
    mask = torch.zeros(2, 16)
    mask[0, :5] = mask[1, :9] = 1
    call = functools.partial(denoiser, **arguments | {"encoder_hidden_states": text, "encoder_attention_mask": mask})
    found = collect(denoiser, QuantizedModel(denoiser).slots, [call])
    assert_moments(found[WeightKey("caption_projection.linear_1")], text[mask.bool()])
    counts = {name: found[WeightKey(f"transformer_blocks.0.{name}")].count for name in ("attn1.to_q", "attn2.to_k")}
    assert counts == {"attn1.to_q": 32, "attn2.to_k": 14}


class Stopped(Exception):
    pass


def test_a_run_that_was_cut_off_goes_on_and_gives_equal_files(tmp_path, monkeypatch):

    module, x = Attention(), torch.randn(5, 3)
    whole = moments_of(module, x, folder=tmp_path / "whole", settings="one prompt")
    put = calibration.MomentsFolder.put

    def stopping(self, key, moments):
        if key.path == "after":
            raise Stopped
        put(self, key, moments)

    with monkeypatch.context() as patched:
        patched.setattr(calibration.MomentsFolder, "put", stopping)
        with pytest.raises(Stopped):
            moments_of(module, x, folder=tmp_path / "cut", settings="one prompt")
    kept = (tmp_path / "cut" / "model.k.weight_quantizer.pt").stat().st_mtime_ns
    again = moments_of(module, x, folder=tmp_path / "cut", settings="one prompt")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len(names) == 4 and names == sorted(path.name for path in (tmp_path / "cut").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert (tmp_path / "cut" / "model.k.weight_quantizer.pt").stat().st_mtime_ns == kept
    assert torch.equal(again[WeightKey("v")].second, whole[WeightKey("v")].second)


@pytest.mark.parametrize("change", ["settings", "weights", "damage"])
def test_files_of_other_settings_or_weights_and_damaged_ones_are_written_anew(tmp_path, change):
    module, x = Attention(), torch.randn(5, 3)
    moments_of(module, x, folder=tmp_path, settings="a")
    if change == "weights":
        module.q.weight.data += 1
    if change == "damage":
        for path in tmp_path.iterdir():
            path.write_bytes(path.read_bytes()[:100])
    found = moments_of(module, 2 * x, folder=tmp_path, settings="b" if change == "settings" else "a")
    assert_moments(found[WeightKey("q")], 2 * x)


def test_inputs_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match=r"^0: its inputs have NaN"):
        moments_of(nn.Sequential(nn.Linear(2, 2)), torch.full((1, 2), torch.nan))
