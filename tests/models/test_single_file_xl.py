"""Stable Diffusion XL in one file, and files that are no such pipeline."""

import json
import shutil

import pytest
import torch
from compvis_checkpoint import same_weights, sdxl_state
from embedded_copies import CPU, PROMPT, refusal
from no_network import no_network
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from models import single_file
from models.drawing import noise_generators
from models.families import FAMILIES
from models.pipelines import EMBEDDED_FOLDER, load_denoiser, load_sampler
from models.repository import Repository, names_below

SDXL = FAMILIES["sdxl"]


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """A pipeline whose text encoders differ in width, as the real ones do: the loader tells them apart by it."""
    folder = tmp_path_factory.mktemp("xl") / "sdxl"
    shutil.copytree(EMBEDDED_FOLDER / "sdxl", folder)
    torch.manual_seed(0)
    for name, kind, width, layers in (
        ("text_encoder", CLIPTextModel, 24, 2),
        ("text_encoder_2", CLIPTextModelWithProjection, 40, 10),
    ):
        config = json.loads((folder / name / "config.json").read_text())
        config |= {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
        kind(CLIPTextConfig(**config)).half().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def pipeline(pipeline_folder):
    return load_sampler(SDXL, str(pipeline_folder), CPU).pipeline


@pytest.fixture
def file(pipeline, pipeline_folder, tmp_path):
    """A file, and in a folder of its name beside it what configures it."""
    path = tmp_path / "sd_xl_base_1.0.safetensors"
    state = {name: weight.half().contiguous() for name, weight in sdxl_state(pipeline).items()}
    save_file(state, path)
    shutil.copytree(pipeline_folder, path.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"))
    return path


def test_the_file_is_the_folder(pipeline, file):
    with no_network() as hosts_asked:
        sampler = load_sampler(SDXL, str(file), CPU)
        denoiser = load_denoiser(SDXL, str(file), CPU)
    assert hosts_asked == []
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert same_weights(getattr(sampler.pipeline, part), getattr(pipeline, part)), part
    assert same_weights(denoiser.float(), pipeline.unet)
    assert sampler.images([PROMPT], noise_generators(1, [0]), 2, 2.0, 64).std() > 0.01


def test_configured_from_the_hubs_cache(file, pipeline_folder, monkeypatch):
    shutil.rmtree(file.with_suffix(""))
    with no_network():
        said = refusal(load_denoiser, SDXL, str(file))
    assert "stabilityai/stable-diffusion-xl-base-1.0" in said and "says nothing of how its components are configured" in said
    cached = Repository("x", pipeline_folder, names_below(pipeline_folder))
    monkeypatch.setattr(single_file, "open_repository", lambda model_id: cached)
    assert load_denoiser(SDXL, str(file), CPU).config.cross_attention_dim == 64


def rewritten(file, pipeline, change):
    state = {name: weight.half().contiguous() for name, weight in sdxl_state(pipeline).items()}
    change(state)
    save_file(state, file)
    return file


CHANGES = {
    "lacks a weight": (lambda s: s.pop("model.diffusion_model.input_blocks.0.0.bias"), "conv_in.bias"),
    "lacks a text encoder's": (lambda s: s.pop("conditioner.embedders.1.model.ln_final.bias"), "text_encoder_2"),
    "has an adapter's": (lambda s: s.update({"lora_unet_x.lora_down.weight": torch.ones(2)}), "--lora"),
    "is low-bit": (
        lambda s: s.update(
            {"model.diffusion_model.input_blocks.1.0.in_layers.2.weight": torch.ones(2, 2, dtype=torch.int8)}
        ),
        "already quantized",
    ),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_file_that_is_not_as_it_should_be(file, pipeline, name):
    change, message = CHANGES[name]
    assert message in refusal(load_sampler, SDXL, str(rewritten(file, pipeline, change)))


@pytest.mark.parametrize(("family", "part"), [("sdxl", "unet"), ("sdv15", "unet")])
def test_a_denoisers_weights_alone(tmp_path, family, part):
    path = tmp_path / "unet.safetensors"
    shutil.copy(EMBEDDED_FOLDER / family / part / "diffusion_pytorch_model.safetensors", path)
    said = refusal(load_denoiser, FAMILIES[family], str(path))
    assert "its weights are named otherwise" in said and "into a copy of its pipeline's folder" in said


@pytest.mark.parametrize("family", ["pixart_alpha", "dit", "hunyuan"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt", "ckpt"])
def test_families_of_which_diffusers_reads_no_single_files(tmp_path, family, suffix):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(b"x")
    assert f"diffusers reads no single files of {FAMILIES[family].title}" in refusal(
        load_denoiser, FAMILIES[family], str(path)
    )


def test_a_gguf_file(tmp_path):
    path = tmp_path / "model-Q4_0.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + b"\0" * 64)
    assert "a GGUF file, whose weights are already quantized" in refusal(load_denoiser, SDXL, str(path))
