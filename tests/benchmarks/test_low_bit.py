"""What benchmarks/low_bit.py compares, on a small PixArt: each arm is written, loaded and measured."""

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import low_bit
from benchmarks.low_bit_arms import ARMS, load, write, write_float
from benchmarks.low_bit_tune import linear_shapes
from quant.layers import packed_layers

CPU = torch.device("cpu")
SMALL = {"num_layers": 1, "num_attention_heads": 2, "cross_attention_dim": 144, "caption_channels": 32, "sample_size": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("low_bit")
    (root / "output").mkdir()
    write_float("pixart_alpha", str(root / "float"), **SMALL)
    return root


@pytest.mark.parametrize("key", ["float", "mse-4", "mixed", "mse-4-a8", "mse-4-a8-simulated"])
def test_an_arm_is_measured(folders, key):
    own = {"float": str(folders / "float"), "output": str(folders / "output"), "arm": str(folders / key)}
    if key != "float":
        low_bit.measure("pixart_alpha", ARMS["float"], own | {"arm": ""}, torch.float32, CPU, [2], 1)
        write("pixart_alpha", ARMS[key], own["float"], own["arm"], CPU)
    figures = low_bit.measure("pixart_alpha", ARMS[key], own, torch.float32, CPU, [2], 1)
    (step,) = figures["steps"]
    assert step["ms"] > 0 and figures["load_seconds"] >= 0
    assert step["relative_error"] == 0 if key == "float" else 0.001 < step["relative_error"] < 1


def test_arms_are_what_they_say(folders):
    source, folder = str(folders / "float"), str(folders / "arm")
    write("pixart_alpha", ARMS["mixed"], source, folder, CPU)
    packed = dict(packed_layers(load("pixart_alpha", ARMS["mixed-a8"], source, folder, torch.float32, CPU)))
    words = {part.method for layer in packed.values() for part in layer.parts}
    assert words == {f"{algorithm}-{bits}" for algorithm in ("mse", "kmeans", "kmeans_all") for bits in (3, 4)}
    assert {(layer.act_bits, layer.simulated) for layer in packed.values()} == {(8, False)}
    written = load_file(folders / "float" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}


def test_shapes_to_tune_are_those_of_a_step():
    """PixArt-alpha at 512 px: 2 images of 32 x 32 tokens of 1,152; 2 rows of the time embedding."""
    shapes = linear_shapes("pixart_alpha", 2, 512)
    assert {(2048, 1152, 1152), (2048, 1152, 4608), (2048, 4608, 1152), (2, 1152, 6912)} <= shapes
