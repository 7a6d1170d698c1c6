"""The keys of a labelled configuration that the published predictor builds its graph from, beside those of our slots.

Facts of the wire format, found by running the published graph builders (Ascend-Research/AutoBuild, branch qua2sedimo,
sdm/graph_*.py) on labelled rows of each family. A builder takes each of its keys out of a row's `config`, in whatever
order the row holds them. Those of SDXL, SDv1.5 and DiT then assert that none is left, the others do not look.
"""

import pytest
import torch

from models import geometry
from models.families import FAMILIES
from quant import config
from quant.registry import SEARCH_SPACE
from quant.slots import find_slots

SELF_ATTENTION, CROSS_ATTENTION = ([f"attn{i}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")] for i in (1, 2))
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
BLOCK = [*SELF_ATTENTION, *CROSS_ATTENTION, *FEED_FORWARD]


def keys(modules, split=()):
    """The keys of these modules, and of the second quantizers of those that are split."""
    return [f"model.{name}.weight_quantizer" for name in modules] + [f"model.{name}.weight_quantizer_0" for name in split]


def inside(paths, names):
    return [f"{path}.{name}" for path in paths for name in names]


def pixart():
    ends = ["pos_embed.proj", "caption_projection.linear_1", "caption_projection.linear_2", "proj_out"]
    time = ["emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear"]
    blocks = [f"transformer_blocks.{i}" for i in range(28)]
    return keys([*ends, *inside(["adaln_single"], time), *inside(blocks, BLOCK)])


def hunyuan_blocks(numbers):
    skips = [f"blocks.{i}.skip_linear" for i in numbers if i > 20]
    return keys([*inside([f"blocks.{i}" for i in numbers], ["norm1.linear", *BLOCK]), *skips], split=skips)


def hunyuan():
    embedders = ["text_embedder", "time_extra_emb.timestep_embedder", "time_extra_emb.extra_embedder"]
    ends = ["pos_embed.proj", *inside(embedders, ["linear_1", "linear_2"]), "norm_out.linear", "proj_out"]
    return keys(ends) + hunyuan_blocks(range(39))


def attention(path, depth=1):
    blocks = [f"{path}.transformer_blocks.{i}" for i in range(depth)]
    return [f"{path}.proj_in", f"{path}.proj_out", *inside(blocks, BLOCK)]


def sdxl_attentions():
    transformers = {"down_blocks.1": (2, 2), "down_blocks.2": (2, 10), "mid_block": (1, 10)}  # how many, how deep
    transformers |= {"up_blocks.0": (3, 10), "up_blocks.1": (3, 2)}
    for block, (count, depth) in transformers.items():
        for j in range(count):
            yield from attention(f"{block}.attentions.{j}", depth)


def sdxl():
    ends = ["conv_in", "conv_out", *inside(["time_embedding", "add_embedding"], ["linear_1", "linear_2"])]
    ends += [f"{part}_blocks.{i}.{part}samplers.0.conv" for part in ("down", "up") for i in (0, 1)]
    up = [f"up_blocks.{i}.resnets.{j}" for i in range(3) for j in range(3)]
    resnets = [f"{block}.resnets.{j}" for block in (*(f"down_blocks.{i}" for i in range(3)), "mid_block") for j in (0, 1)]
    shortcuts = ["down_blocks.1.resnets.0", "down_blocks.2.resnets.0", *up]  # the builder looks for one in every resnet
    layers = inside([*resnets, *up], ["conv1", "time_emb_proj", "conv2"]) + inside(shortcuts, ["conv_shortcut"])
    return keys([*ends, *layers, *sdxl_attentions()], split=inside(up, ["conv1"]))


def sdv15():
    ends = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.2"]
    ends += [*(f"input_blocks.{i}.0.op" for i in (3, 6, 9)), *(f"output_blocks.{i}.conv" for i in ("2.1", "5.2", "8.2"))]
    output = [f"output_blocks.{i}.0" for i in range(12)]
    resnets = [*(f"input_blocks.{i}.0" for i in (1, 2, 4, 5, 7, 8, 10, 11)), "middle_block.0", "middle_block.2"]
    shortcuts = ["input_blocks.4.0", "input_blocks.7.0", *output]  # the builder looks for one in every resnet
    layers = inside([*resnets, *output], ["in_layers.2", "emb_layers.1", "out_layers.3"])
    attentions = [*(f"input_blocks.{i}.1" for i in (1, 2, 4, 5, 7, 8)), "middle_block.1"]
    attentions += [f"output_blocks.{i}.1" for i in range(3, 12)]
    modules = [*ends, *layers, *inside(shortcuts, ["skip_connection"]), *(n for path in attentions for n in attention(path))]
    return keys(modules, split=inside(output, ["skip_connection"]))


def dit():
    embedder = [f"norm1.emb.timestep_embedder.linear_{i}" for i in (1, 2)]
    block = [*embedder, "norm1.linear", *SELF_ATTENTION, *FEED_FORWARD]
    blocks = [f"transformer_blocks.{i}" for i in range(28)]
    return keys(["pos_embed.proj", "proj_out_1", "proj_out_2", *inside(blocks, block)])


TAKEN = {"pixart_alpha": pixart, "pixart_sigma": pixart, "hunyuan": hunyuan, "sdxl": sdxl, "sdv15": sdv15, "dit": dit}

# The published builder ends before Hunyuan's last block and leaves its keys in the row.
HUNYUAN_LAST_BLOCK = hunyuan_blocks([39])
LEFT_UNREAD = {"hunyuan": HUNYUAN_LAST_BLOCK}


@pytest.fixture(scope="module", params=FAMILIES)
def slots(request):
    """(name, slots) of the real denoiser."""
    with torch.device("meta"):
        return request.param, find_slots(geometry.build(request.param), FAMILIES[request.param].slot_rules)


def test_the_published_graph_builder_finds_its_keys(slots):
    name, slots = slots
    taken, left = TAKEN[name](), LEFT_UNREAD.get(name, [])
    assert sorted(taken + left) == sorted(slot.file_key for slot in slots.values())


def test_the_published_features_can_be_computed(slots):
    """Of a key's value it takes the method, FP bytes / quantized bytes and the error."""
    name, slots = slots
    entries = {slot.tie: {"errors": dict.fromkeys(SEARCH_SPACE, 0.5)} for slot in slots.values()}
    drawn = config.draw_random(slots, seed=1, index=0)
    description = config.describe(drawn, slots, entries, FAMILIES[name].precision_bits)
    for method, fp_bytes, quantized_bytes, error in description.values():
        algorithm, bits = method.split("-")
        assert algorithm in ("mse", "kmeans", "kmeans_all") and int(bits) in (3, 4)
        assert fp_bytes > quantized_bytes > 0 and error * 100 == 50
