"""What is reckoned of memory from shapes."""

import pytest
import torch
from torch import nn

from benchmarks import memory, real_parts
from benchmarks.live_bytes import peak_bytes
from benchmarks.memory import Part, on_device


@pytest.fixture(autouse=True)
def on_meta():
    with torch.device("meta"):
        yield


def test_activations_by_hand():
    """Each tensor counts while it lives: not weights, not views of them, not arguments, not what is written in place."""
    rows, wide = 5 * 10 * 4, 5 * 1000 * 4
    input = torch.empty(5, 10)
    widen, narrow = nn.Linear(10, 1000), nn.Linear(1000, 10)
    assert peak_bytes(widen, lambda: widen(input)) == wide
    both = nn.Sequential(widen, nn.ReLU(), narrow)
    assert peak_bytes(both, lambda: both(input)) == 2 * wide  # the widened input lives until the next one is there
    both[1] = nn.ReLU(inplace=True)
    assert peak_bytes(both, lambda: both(input)) == wide + rows
    assert peak_bytes(widen, lambda: widen.weight.T + 0) == 1000 * 10 * 4


def test_attention_keeps_no_scores():
    query = torch.empty(1, 2, 4096, 8)
    attend = nn.functional.scaled_dot_product_attention
    assert peak_bytes(nn.Module(), lambda: attend(query, query, query)) == query.nbytes
    assert peak_bytes(nn.Module(), lambda: attend(query, key=query, value=query[..., :4])) == query.nbytes // 2


def test_text_encoders_are_of_their_published_sizes():
    counts = {name: sum(p.numel() for p in real_parts.text_encoder(name, torch.float16).parameters()) for name in SIZES}
    assert counts == SIZES
    t5 = real_parts.text_encoder("T5-XXL", torch.float16)
    assert memory.size_of(t5) == 2 * SIZES["T5-XXL"] + 2 * 24 * 10240 * 4096  # `wo` is kept in float32


SIZES = {
    "T5-XXL": 4_762_310_656,
    "mT5-XL": 1_669_958_656,
    "CLIP-L": 123_060_480,
    "OpenCLIP-bigG": 694_659_840,
    "BERT": 352_035_840,
}


def test_autoencoder_and_refiner_are_of_their_published_sizes():
    assert memory.size_of(real_parts.autoencoder(torch.float16)) == 2 * 83_653_863
    assert memory.size_of(real_parts.refiner(torch.float16)) == 2 * 2_259_526_660


def test_offloading_by_hand():
    parts = [Part(100, 10, 5), Part(30, 20, 50)]
    assert on_device(parts, "none") == 130 + 50
    assert on_device(parts, "model") == 105
    assert on_device(parts, "sequential") == 70
    assert on_device(parts, "sequential", whole=parts[0]) == 105


@pytest.mark.parametrize(("name", "bytes"), [("pixart_alpha", 8e9), ("sdxl", 12e9)])
def test_cards_that_suffice(name, bytes):
    """PixArt-alpha on 8 GB, its text encoder layer by layer, SDXL with its refiner on 12 GB; CUDA takes 0.5."""
    pipeline = memory.real_pipeline(name, packed=False)
    encoding = memory.device_bytes(pipeline, "text encoders", "none")
    assert (encoding > bytes) == (name == "pixart_alpha")
    assert min(encoding, memory.device_bytes(pipeline, "text encoders", "sequential")) + 0.5e9 < bytes
    for stage in ("multiquantizer", "eval_random", "infer --no-pack"):
        assert memory.device_bytes(pipeline, stage, "none") + 0.5e9 < bytes


def test_packing_takes_less():
    pipeline = memory.real_pipeline("pixart_alpha")
    assert pipeline.packed.weights < 0.27 * pipeline.denoiser.weights
    assert pipeline.denoiser.activations <= pipeline.packed.activations < 1.5 * pipeline.denoiser.activations
