"""One block of DiT-XL/2 at full size, on random weights."""

import torch
from conftest import REAL_DIT
from diffusers import DiTTransformer2DModel

from models.layers import find_slots
from quant import config, modules, multiquantizer


@torch.no_grad()
def test_one_block_builds_saves_loads_and_applies(tmp_path, family):
    torch.manual_seed(0)
    denoiser = DiTTransformer2DModel(**REAL_DIT | {"num_layers": 1}).half()
    slots = find_slots(denoiser, family)
    path = tmp_path / "mq.pt"
    multiquantizer.build(denoiser, family, path)
    entries = multiquantizer.load(path, denoiser, family)
    layers = modules.install(denoiser, family)
    for method in ("mse-4", "kmeans-4", "kmeans_all-3"):
        config.apply(config.uniform(slots, method), layers, slots, entries)
        for layer in layers.values():
            if layer.weight[0].numel() == 16:
                continue  # as many centroids as weights: K-Means-C changes nothing
            change = (layer.weight.float() - layer.original.float()).norm() / layer.original.float().norm()
            assert 0.01 < change < 0.35
    assert entries["model.transformer_blocks.0.ff.net.2.weight_quantizer"]["shape"] == [1152, 4608]
