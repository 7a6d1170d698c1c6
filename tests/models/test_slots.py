"""The six families' own geometry, on the meta device, and what of it the tiny and the embedded models have."""

import functools

import diffusers
import pytest
import torch
from conftest import ROOT, SPLIT_FAMILIES
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import nn
from torch.overrides import TorchFunctionMode

from models import geometry
from models.compvis import compvis_names
from models.families import FAMILIES
from quant import config
from quant.slots import WeightKey, find_slots, free_keys, in_part, move_boundaries, weight_layers

# family -> keys, weight layers, weights (published), free keys, split weights
COUNTS = {
    "pixart_alpha": (287, 287, 610_228_224, 287, 0),
    "pixart_sigma": (287, 287, 610_228_224, 287, 0),
    "hunyuan": (487, 472, 1_499_645_952, 487, 19),
    "sdxl": (803, 794, 2_565_880_320, 803, 9),
    "sdv15": (294, 282, 859_077_120, 294, 12),
    "dit": (255, 255, 716_986_368, 201, 0),
}
# CompVis name -> shape of its weight in v1-5-pruned-emaonly.ckpt
CHECKPOINT = {
    "time_embed.0": (1280, 320),
    "time_embed.2": (1280, 1280),
    "input_blocks.0.0": (320, 4, 3, 3),
    "input_blocks.1.0.in_layers.2": (320, 320, 3, 3),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k": (320, 768),
    "input_blocks.3.0.op": (320, 320, 3, 3),
    "input_blocks.4.0.in_layers.2": (640, 320, 3, 3),
    "input_blocks.4.0.emb_layers.1": (640, 1280),
    "input_blocks.4.0.skip_connection": (640, 320, 1, 1),
    "input_blocks.8.1.transformer_blocks.0.ff.net.0.proj": (10240, 1280),
    "input_blocks.11.0.out_layers.3": (1280, 1280, 3, 3),
    "middle_block.0.in_layers.2": (1280, 1280, 3, 3),
    "middle_block.1.transformer_blocks.0.attn1.to_q": (1280, 1280),
    "output_blocks.2.1.conv": (1280, 1280, 3, 3),
    "output_blocks.3.1.proj_in": (1280, 1280, 1, 1),
    "output_blocks.5.2.conv": (1280, 1280, 3, 3),
    "output_blocks.6.0.in_layers.2": (640, 1920, 3, 3),
    "output_blocks.8.2.conv": (640, 640, 3, 3),
    "output_blocks.11.1.transformer_blocks.0.attn1.to_out.0": (320, 320),
    "out.2": (4, 320, 3, 3),
}


@functools.cache
def real(name):
    with torch.device("meta"):
        return geometry.build(name)


@functools.cache
def real_slots(name):
    return find_slots(real(name), FAMILIES[name].slot_rules)


def by_file(name):
    """{file key: slot}."""
    return {slot.file_key: slot for slot in real_slots(name).values()}


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_layers_and_weights(name):
    family, slots = FAMILIES[name], real_slots(name)
    layers = [module for module in real(name).modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    weights = sum(slot.shape.numel() for slot in slots.values())
    splits = sum(key.part for key in slots)
    assert (len(slots), len(layers), weights, len(free_keys(slots)), splits) == COUNTS[name]
    assert (family.num_keys, family.num_layers, family.fp_weights) == COUNTS[name][:3]
    assert all(slot.key == key for key, slot in slots.items())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("pixart_alpha", "model.adaln_single.linear.weight_quantizer"),
        ("hunyuan", "model.blocks.39.skip_linear.weight_quantizer_0"),
        ("sdxl", "model.up_blocks.0.attentions.2.transformer_blocks.9.ff.net.2.weight_quantizer"),
        ("sdxl", "model.up_blocks.2.resnets.2.conv1.weight_quantizer_0"),
        ("sdv15", "model.output_blocks.11.0.skip_connection.weight_quantizer_0"),
        ("dit", "model.transformer_blocks.27.ff.net.0.proj.weight_quantizer"),
    ],
)
def test_keys_in_files_as_published(name, key):
    assert key in by_file(name)


def test_the_timestep_embedders_are_tied():
    slots = real_slots("dit")
    tied = [slot for slot in slots.values() if slot.tie != slot.key]
    assert len(tied) == 2 * 27
    for slot in tied:
        assert slot.tie.path.startswith("transformer_blocks.0.norm1.emb.timestep_embedder.linear_")
        assert slots[slot.tie].shape == slot.shape


def test_the_pooler_is_in_no_slot():
    skipped = {f"time_extra_emb.pooler.{name}_proj" for name in "qkvc"}
    paths = {path for path, module in real("hunyuan").named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    quantized = {slot.module_path for slot in real_slots("hunyuan").values()}
    assert skipped < paths and paths - quantized == skipped
    assert {path for path, _ in weight_layers(real("hunyuan"), FAMILIES["hunyuan"].slot_rules)} == quantized


class Concatenations(TorchFunctionMode):
    """Keeps the channels of what torch.cat joined last."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.cat:
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            self.last = [tensor.shape[dim] for tensor in args[0]]
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", SPLIT_FAMILIES)
def test_boundaries_are_where_a_call_concatenates(name):
    """[channels of the hidden state, channels of the skip] that reach each split layer, seen in a call at real size."""
    denoiser, seen, joined = real(name), {}, Concatenations()
    split = [slot for slot in real_slots(name).values() if slot.inputs]

    def see(path):
        return denoiser.get_submodule(path).register_forward_pre_hook(lambda *_: seen.update({path: joined.last}))

    handles = [see(path) for path in {slot.module_path for slot in split}]
    with torch.device("meta"), torch.no_grad(), joined:
        denoiser(**geometry.example_inputs(name, denoiser, pixels=16))
    for handle in handles:
        handle.remove()
    assert len(seen) == COUNTS[name][4] and len(split) == 2 * len(seen)
    for slot in split:
        hidden, skip = seen[slot.module_path]
        assert slot.inputs == ((hidden, hidden + skip) if slot.key.part else (0, hidden)), slot
        assert slot.shape[1] == (skip if slot.key.part else hidden)


def test_sdxl_boundaries_by_hand():
    """Hidden channels come from the resnet before: the first of a block still has those of the block before it."""
    slots = real_slots("sdxl")
    inputs = [
        [slots[f"up_blocks.{i}.resnets.{j}.conv1", part].inputs for j in range(3) for part in (0, 1)] for i in range(3)
    ]
    assert inputs[0] == [(0, 1280), (1280, 2560), (0, 1280), (1280, 2560), (0, 1280), (1280, 1920)]
    assert inputs[1] == [(0, 1280), (1280, 1920), (0, 640), (640, 1280), (0, 640), (640, 960)]
    assert inputs[2] == [(0, 640), (640, 960), (0, 320), (320, 640), (0, 320), (320, 640)]


def test_part_of_a_weight():
    path = "up_blocks.1.resnets.0.conv1"
    weight = torch.randn(640, 1920, 1, 1)
    slots = real_slots("sdxl")
    halves = [slots[path, part].part_of(weight) for part in (0, 1)]
    assert torch.equal(torch.cat(halves, dim=1), weight)
    assert halves[0].shape == (640, 1280, 1, 1) and halves[1].data_ptr() != weight.data_ptr()
    halves[0].zero_()
    assert not weight[:, :1280].any() and weight[:, 1280:].all()  # views of it


def test_boundaries_move_with_the_shapes():
    slots, path = real_slots("sdxl"), "up_blocks.1.resnets.0.conv1"
    moved = move_boundaries(slots, {WeightKey(path): (640, 640, 3, 3)})
    first, rest = moved[path, 0], moved[path, 1]
    assert first.inputs == (0, 640) and first.shape == (640, 640, 3, 3)
    assert rest.inputs == (640, 1920) and rest.shape == (640, 1280, 3, 3)
    assert list(moved) == list(slots) and sum(slots[k] != moved[k] for k in slots) == 2


@pytest.mark.parametrize("shape", [(640, 0, 3, 3), (640, 1920, 3, 3), (640, 2000, 3, 3), (640, 640), ()])
def test_shapes_that_make_no_sense_move_nothing(shape):
    assert move_boundaries(real_slots("sdxl"), {WeightKey("up_blocks.1.resnets.0.conv1"): shape}) == real_slots("sdxl")


def test_every_slot_is_in_one_part():
    parts = FAMILIES["sdxl"].prefixes
    assert len(parts) == 7
    for slot in real_slots("sdxl").values():
        assert [prefix for prefix in parts if in_part(slot, prefix)] == [slot.module_path.split(".")[0]]
    assert not in_part(real_slots("sdxl")["conv_in", 0], "conv")


@pytest.mark.parametrize("compvis", CHECKPOINT)
def test_compvis_keys_have_the_checkpoint_s_weights(compvis):
    slot = by_file("sdv15")[f"model.{compvis}.weight_quantizer"]
    assert slot.shape == CHECKPOINT[compvis]
    assert real("sdv15").get_submodule(slot.module_path).weight.shape == CHECKPOINT[compvis]


def test_a_split_skip_connection_has_the_checkpoint_s_weight():
    """output_blocks.8.0.skip_connection is [640, 960, 1, 1] in the checkpoint."""
    key = "model.output_blocks.8.0.skip_connection.weight_quantizer"
    first, rest = (by_file("sdv15")[key + ending] for ending in ("", "_0"))
    assert first.shape == (640, 640, 1, 1) and rest.shape == (640, 320, 1, 1)
    assert first.module_path == rest.module_path == "up_blocks.2.resnets.2.conv_shortcut"


def test_compvis_names_are_those_that_diffusers_converts():
    """diffusers' own reader of CompVis checkpoints takes every weight to the module that the name stands for."""
    unet = real("sdv15")
    names = compvis_names(unet)
    assert len(set(names.values())) == len(names)
    own = {f"{path}.{kind}": (path, kind) for path in names for kind, _ in unet.get_submodule(path).named_parameters()}
    weights = {name: torch.empty(1) for name in own}
    checkpoint = {f"model.diffusion_model.{names[path]}.{kind}": weights[name] for name, (path, kind) in own.items()}
    converted = convert_ldm_unet_checkpoint(checkpoint, unet.config)
    assert own.keys() == converted.keys() == dict(unet.named_parameters()).keys()
    assert all(converted[name] is weights[name] for name in own)


@pytest.mark.parametrize("name", ["pixart_alpha", "pixart_sigma"])
@pytest.mark.parametrize(
    ("method", "expected"),
    [("mse-4", 4.02), ("mse-3", 3.02), ("kmeans-4", 4.18), ("kmeans-3", 3.09), ("kmeans_all-4", 4.0), ("kmeans_all-3", 3.0)],
)
def test_average_bits(name, method, expected):
    description = described(name, method)
    assert config.avg_bits(description, precision_bits=16) == pytest.approx(expected, abs=0.01)


def described(name, method):
    """A uniform configuration of the real denoiser, its errors all the same."""
    slots, family = real_slots(name), FAMILIES[name]
    entries = {key: {"errors": {method: 0.5}} for key in free_keys(slots)}
    return config.describe(config.uniform(slots, method), slots, entries, family.precision_bits)


@pytest.mark.parametrize("name", FAMILIES)
def test_full_precision_bytes(name):
    fp_bytes = sum(row[1] for row in described(name, "mse-4").values())
    assert fp_bytes == COUNTS[name][2] * (4 if name == "sdv15" else 2)
    assert fp_bytes == config.quantized_size(config.describe_full_precision(real_slots(name), FAMILIES[name].precision_bits))


def topology(denoiser, family):
    """All that does not depend on widths: modules, keys, ties and which keys are parts, in order."""
    modules = [(path, type(module).__name__) for path, module in denoiser.named_modules()]
    slots = [(s.key, s.tie, s.file_key, s.inputs is not None) for s in find_slots(denoiser, family.slot_rules).values()]
    return modules, slots


@pytest.mark.parametrize("name", FAMILIES)
def test_the_embedded_model_has_the_same_modules_and_keys(name):
    family = FAMILIES[name]
    kind = getattr(diffusers, geometry.GEOMETRIES[name][0])
    embedded = kind.from_pretrained(ROOT / "models/embedded" / name / family.denoiser)
    own_modules, own_slots = topology(embedded, family)
    modules, slots = topology(real(name), family)
    assert own_modules == modules
    assert own_slots == slots
