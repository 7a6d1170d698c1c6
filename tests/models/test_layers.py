"""DiT-XL/2's own geometry, on the meta device."""

import pytest
import torch
from conftest import REAL_DIT, ROOT
from diffusers import DiTTransformer2DModel

from models.layers import find_slots, free_keys
from quant import config


@pytest.fixture(scope="module")
def slots(family):
    with torch.device("meta"):
        return find_slots(DiTTransformer2DModel(**REAL_DIT), family)


def test_keys_and_weights(slots, family):
    assert len(slots) == family.num_keys == 255
    assert sum(slot.shape.numel() for slot in slots.values()) == family.fp_weights == 716_986_368
    assert len(free_keys(slots)) == 201
    assert REAL_DIT["sample_size"] * 8 == family.resolution == 512
    assert "model.transformer_blocks.27.ff.net.0.proj.weight_quantizer" in slots


def test_the_timestep_embedders_are_tied(slots):
    tied = [slot for slot in slots.values() if slot.tie != slot.key]
    assert len(tied) == 2 * 27
    for slot in tied:
        assert slot.tie.startswith("model.transformer_blocks.0.norm1.emb.timestep_embedder.linear_")
        assert slots[slot.tie].shape == slot.shape


@pytest.mark.parametrize(
    ("method", "expected"),
    [("mse-4", 4.02), ("mse-3", 3.02), ("kmeans-4", 4.18), ("kmeans-3", 3.09), ("kmeans_all-4", 4.0), ("kmeans_all-3", 3.0)],
)
def test_average_bits(slots, family, method, expected):
    entry = {"errors": {method: 0.5}}
    entries = dict.fromkeys(free_keys(slots), entry)
    description = config.describe(config.uniform(slots, method), slots, entries, family.precision_bits)
    assert config.avg_bits(description, family.precision_bits) == pytest.approx(expected, abs=0.02)
    assert sum(row[1] for row in description.values()) == 1_433_972_736  # the published FP_SIZE


def test_the_embedded_model_has_the_same_keys(slots, family):
    embedded = DiTTransformer2DModel.from_pretrained(ROOT / "models/embedded/dit/transformer")
    own = find_slots(embedded, family)
    assert list(own) == list(slots)
    assert [slot.tie for slot in own.values()] == [slot.tie for slot in slots.values()]
