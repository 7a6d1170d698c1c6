"""Packed layers under words beyond the search space: 2 to 8 bits, groups of inputs."""

import pytest
import torch
from zoo import ZOO

from quant import Qua2SeDiMoConfig, QuantizedModel
from quant.layers import packed_layers, weight_bytes
from quant.registry import quantizer

# Inputs of the small PixArt's layers are no multiples of 5, so that groups end in shorter ones.
WORDS = ("mse-2", "mse-7", "mse-8", "kmeans-5", "kmeans_all-6", "mse-4-g8", "mse-3-g5", "kmeans-2-g16", "kmeans-3-g5")
WORDS += ("affine-3", "affine-8", "affine-4-g8", "affine-3-g5")


@pytest.mark.parametrize("word", WORDS)
@torch.no_grad()
def test_packed_computes_what_the_quantized_weights_compute_and_is_loaded_again(word, tmp_path):
    entry = ZOO["pixart"]
    denoiser, plain = entry.build_denoiser(), entry.build_denoiser()
    plain.save_pretrained(tmp_path / "plain")
    inputs = entry.inputs(denoiser)
    model = QuantizedModel(denoiser)
    model.apply(word)
    expected = denoiser(**inputs, return_dict=False)[0]
    model.restore()
    model.pack(word)
    denoiser.save_pretrained(tmp_path / "packed")
    loaded = type(denoiser).from_pretrained(tmp_path / "packed")
    on_the_fly = type(denoiser).from_pretrained(tmp_path / "plain", quantization_config=Qua2SeDiMoConfig(word))
    for each in (denoiser, loaded, on_the_fly):
        assert torch.equal(each(**inputs, return_dict=False)[0], expected)


@pytest.mark.parametrize(
    ("word", "tables"),
    [
        ("mse-4-g8", (("table", (4, 3)), ("zero", (4, 3)))),
        ("kmeans-3-g8", (("table", (4, 3, 8)),)),
        ("affine-3-g8", (("table", (4, 3)), ("offset", (4, 3)))),
    ],
)
def test_tables_of_groups_by_hand(word, tables):
    """20 inputs are two groups of 8 and one of 4; 4 bits take 10 bytes a row, 3 bits 9."""
    layer = torch.nn.Sequential(torch.nn.Linear(20, 4))
    QuantizedModel(layer).pack(word)
    for name, shape in tables:
        assert getattr(layer[0], name).shape == shape
    assert layer[0].codes.shape == (4, 10 if quantizer(word).bits == 4 else 9)
    assert weight_bytes(layer) == sum(
        t.nbytes for _, packed in packed_layers(layer) for t in packed.tensors(packed.parts[0])
    )
