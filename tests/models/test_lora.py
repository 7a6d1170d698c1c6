"""Adapters fused into weights: as diffusers and PEFT do it, from files of every convention."""

import json

import peft
import pytest
import torch
from conftest import tiny
from diffusers.utils import convert_state_dict_to_kohya
from embedded_copies import CPU, refusal
from safetensors.torch import save_file

from errors import InputError
from models.families import FAMILIES
from models.lora import Lora, fuse, open_lora, read
from models.pipelines import Extras, load_denoiser, load_sampler

RANK, ALPHA = 3, 6
UNET_PATHS = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1", "conv_in")
TE_PATH = "encoder.layers.0.self_attn.q_proj"


def factors(layer, seed=0):
    """A [r, ...] and B [C, r, ...] of a layer."""
    generator = torch.Generator().manual_seed(seed)
    outputs, *rest = layer.weight.shape
    down = torch.randn(RANK, *rest, generator=generator) * 0.1
    return down, torch.randn(outputs, RANK, *(1 for _ in rest[1:]), generator=generator) * 0.1


def adapter(module, paths, prefix, ends=(".lora_A.weight", ".lora_B.weight")):
    state = {}
    for path in paths:
        for end, factor in zip(ends, factors(module.get_submodule(path)), strict=True):
            state[f"{prefix}{path}{end}"] = factor.contiguous()
    return state


def updated(module, path, scale):
    down, up = factors(module.get_submodule(path))
    product = (up.flatten(1) @ down.flatten(1)).view(module.get_submodule(path).weight.shape)
    return module.get_submodule(path).weight + scale * product


@pytest.fixture(scope="module")
def unet():
    return tiny("sdv15")


def fused(file, scale=1.0):
    copy = tiny("sdv15")
    lora = Lora(str(file), file, scale)
    fuse([lora], {"unet": copy}, "StableDiffusionPipeline", {"unet": dict(copy.config), "text_encoder": {}})
    return copy


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_diffusers_own_files(unet, tmp_path, scale):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(adapter(unet, UNET_PATHS, "unet."), file)
    ours = fused(file, scale)
    for path in UNET_PATHS:
        assert torch.allclose(ours.get_submodule(path).weight, updated(unet, path, scale), atol=1e-6), path
    untouched = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert torch.equal(ours.get_submodule(untouched).weight, unet.get_submodule(untouched).weight)


def test_it_is_what_diffusers_fuses(tmp_path):
    """With alpha and rank in the file's header, as diffusers' save_lora_adapter writes it."""
    theirs, ours = tiny("sdv15"), tiny("sdv15")
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(3)
    theirs.add_adapter(config)
    theirs.save_lora_adapter(tmp_path)
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora()
    fuse([open_lora(f"{tmp_path}:0.7")], {"unet": ours}, "StableDiffusionPipeline", {"unet": dict(ours.config)})
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.allclose(found[key], expected[key], atol=1e-6) for key in expected)
    before = tiny("sdv15").state_dict()
    changed = [key for key in found if not torch.equal(found[key], before[key])]
    assert len(changed) == 2 * sum(name.endswith("to_q") for name, _ in ours.named_modules())


def test_kohyas_files_and_their_alphas(tmp_path):
    """Of U-Net and text encoder in one file."""
    pipeline = load_sampler(FAMILIES["sdv15"], "embedded", CPU).pipeline
    state = adapter(pipeline.unet, UNET_PATHS[:1], "")
    state = {f"unet.{key}": value for key, value in state.items()}
    encoder = pipeline.text_encoder
    state |= adapter(encoder, [TE_PATH], "text_encoder.text_model.")
    kohya = convert_state_dict_to_kohya(state)
    kohya |= {f"{key.split('.')[0]}.alpha": torch.tensor(float(ALPHA)) for key in kohya if key.endswith("lora_down.weight")}
    file = tmp_path / "style.safetensors"
    save_file({key: value.contiguous() for key, value in kohya.items()}, file)
    updates = read(Lora("x", file, 0.5), "StableDiffusionPipeline", {"unet": dict(pipeline.unet.config), "text_encoder": {}})
    assert {component for component, _ in updates} == {"unet", "text_encoder"}
    assert all(update.factor == 0.5 * ALPHA / RANK for update in updates.values())
    before = {UNET_PATHS[0]: pipeline.unet, TE_PATH: encoder}
    expected = {path: updated(module, path, 0.5 * ALPHA / RANK) for path, module in before.items()}
    extras = Extras(loras=(open_lora(f"{file}:0.5"),))
    ours = load_sampler(FAMILIES["sdv15"], "embedded", CPU, extras).pipeline
    for path, module in ((UNET_PATHS[0], ours.unet), (TE_PATH, ours.text_encoder)):
        assert torch.allclose(module.get_submodule(path).weight, expected[path], atol=1e-6), path


def test_pefts_folders_for_a_transformer(tmp_path):
    """PixArt's adapters are PEFT's: alpha, rank and rank-stabilisation stand in a file beside the weights."""
    family = FAMILIES["pixart_alpha"]
    base = load_denoiser(family, "embedded", CPU)
    path = "transformer_blocks.2.attn1.to_q"
    save_file(adapter(base, [path], "base_model.model."), tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    ours = load_denoiser(family, "embedded", CPU, [open_lora(str(tmp_path))])
    expected = updated(base.float(), path, ALPHA / RANK**0.5).half()
    assert torch.equal(ours.get_submodule(path).weight, expected)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    assert "not of a plain LoRA" in refusal(load_denoiser, family, "embedded", loras=[open_lora(str(tmp_path))])


def test_several_are_added(unet, tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        save_file(adapter(unet, UNET_PATHS[:1], "unet."), file)
    copy = tiny("sdv15")
    loras = [Lora("a", files[0], 0.25), Lora("b", files[1], 0.5)]
    fuse(loras, {"unet": copy}, "StableDiffusionPipeline", {"unet": dict(copy.config)})
    path = UNET_PATHS[0]
    assert torch.allclose(copy.get_submodule(path).weight, updated(unet, path, 0.75), atol=1e-6)


WRONG = {
    "another model": (
        {"unet.other.lora_A.weight": (3, 4), "unet.other.lora_B.weight": (4, 3)},
        "another model",
    ),
    "another shape": (
        {f"unet.{UNET_PATHS[0]}.lora_A.weight": (3, 5), f"unet.{UNET_PATHS[0]}.lora_B.weight": (8, 3)},
        "shape",
    ),
    "one of two": ({f"unet.{UNET_PATHS[0]}.lora_A.weight": (3, 8)}, "one of the two weights"),
    "DoRA": ({f"unet.{UNET_PATHS[0]}.dora_scale": (8,)}, "dora_scale, of a kind of adapter that is not fused"),
    "LoHa": ({"lora_unet_x.hada_w1_a": (8, 3)}, "hada_w1_a, of a kind"),
    "a whole model": ({"unet.conv_in.weight": (8, 4, 3, 3)}, "LoRA"),
    "nothing": ({}, "is empty"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_cannot_be_fused(tmp_path, name):
    shapes, message = WRONG[name]
    file = tmp_path / "adapter.safetensors"
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, file)
    with pytest.raises(InputError, match=message) as failure:
        fused(file)
    assert "\n" not in str(failure.value) and str(file) in str(failure.value)


def test_names_and_scales(tmp_path):
    file = tmp_path / "my style.safetensors"
    file.write_bytes(b"x")
    assert open_lora(f"{file}").scale == 1 and open_lora(f"{file}:0.8").scale == 0.8 and open_lora(f"{file}:-1").scale == -1
    assert open_lora(f"{file}:0.8").name == "my_style@0.8" and open_lora(str(file)).name == "my_style"
    assert open_lora(f"{file}:0.8").key != open_lora(str(file)).key
    for text, message in (("nowhere.safetensors", "no such file"), (f"{file}:nan", "ordinary number"), ("", "no such")):
        with pytest.raises(InputError, match=message):
            open_lora(text)
    with pytest.raises(InputError, match="not a readable"):
        read(open_lora(str(file)), "StableDiffusionPipeline", {"unet": {}})
    folder = tmp_path / "several"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="which of its"):
        open_lora(str(folder))
