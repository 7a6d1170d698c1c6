"""A pipeline's models as their libraries load them: precisions kept, all weights there and no others."""

import importlib
import shutil

import diffusers
import pytest
import torch
from embedded_copies import CPU, PROMPT, Copy, refusal

from models import pipelines
from models.components import TEXT_ENCODERS
from models.families import FAMILIES
from models.pipelines import EMBEDDED_FOLDER, Extras, load_denoiser, load_sampler
from stages.common import in_precision


@pytest.fixture
def copy(tmp_path):
    return Copy("pixart_alpha", tmp_path)


def dtypes(pipeline):
    return {
        f"{name}.{key}": tensor.dtype
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
        for key, tensor in part.state_dict().items()
    }


@pytest.mark.parametrize("name", [*FAMILIES, "sdxl_refiner"])
def test_every_precision_is_the_librarys_own(name, monkeypatch):
    """With the precision that a GPU computes in, float16 also for the family whose own is float32."""
    family = FAMILIES[name.removesuffix("_refiner")]
    if family.name == "sdv15":
        family = in_precision(family, "float16")
    monkeypatch.setattr(pipelines, "compute_dtype", lambda family, device, wanted=None: family.dtype)
    refined = name.endswith("_refiner")
    sampler = load_sampler(family, "embedded", CPU, Extras(str(EMBEDDED_FOLDER / name)) if refined else Extras())
    ours = sampler.refiner if refined else sampler.pipeline
    theirs = type(ours).from_pretrained(EMBEDDED_FOLDER / name, dtype=family.dtype)
    expected = dtypes(theirs)
    found = dtypes(ours)
    assert found == {key: dtype for key, dtype in expected.items() if key in found}
    assert {key.partition(".")[0] for key in expected} == {key.partition(".")[0] for key in found}
    if name == "pixart_alpha":
        assert found["text_encoder.encoder.block.0.layer.1.DenseReluDense.wo.weight"] == torch.float32
        assert found["text_encoder.encoder.block.0.layer.0.SelfAttention.o.weight"] == torch.float16


LACKING = {
    "pixart_alpha": ("text_encoder", "encoder.block.0.layer.0.SelfAttention.v.weight"),
    "hunyuan": ("text_encoder", "embeddings.word_embeddings.weight"),
    "sdxl": ("text_encoder_2", "text_projection.weight"),
    "sdv15": ("vae", "decoder.conv_out.bias"),
}


@pytest.mark.parametrize("name", list(LACKING))
def test_a_weight_that_is_missing_is_not_made_up(name, tmp_path):
    copy = Copy(name, tmp_path)
    component, key = LACKING[name]
    copy.change_weights(component, lambda state: {k: v for k, v in state.items() if not k.endswith(key)})
    said = copy.refusal()
    assert component in said and key in said and "lacks 1 weight" in said


def test_a_denoisers_missing_unexpected_and_misshapen_weights(copy):
    key = "transformer_blocks.3.attn1.to_q.weight"
    whole = copy.weights_file("transformer").read_bytes()
    copy.change_weights("transformer", lambda state: {k: v for k, v in state.items() if k != key})
    assert all(f"lacks 1 weight, first {key}" in said and "transformer" in said for said in copy.refusals())
    copy.weights_file("transformer").write_bytes(whole)
    copy.change_weights("transformer", lambda state: state | {f"{key}_extra": state[key].clone()})
    assert all(f"{key}_extra" in said and "no place for" in said for said in copy.refusals())
    copy.weights_file("transformer").write_bytes(whole)
    copy.change_weights("transformer", lambda state: state | {key: state[key][:, 1:].contiguous()})
    assert all(key in said for said in copy.refusals())


def test_a_text_encoders_unexpected_and_misshapen_weights(copy):
    whole = copy.weights_file("text_encoder").read_bytes()
    copy.change_weights("text_encoder", lambda state: state | {"encoder.block.9.layer.0.x": torch.ones(2)})
    assert "encoder.block.9.layer.0.x" in copy.refusal() and "text_encoder" in copy.refusal()
    copy.weights_file("text_encoder").write_bytes(whole)
    copy.change_weights("text_encoder", lambda state: state | {"shared.weight": state["shared.weight"][:, :-1].contiguous()})
    assert "shared.weight" in copy.refusal()


def test_the_refiners_weights_are_looked_at_too(tmp_path):
    refiner = Copy("sdxl_refiner", tmp_path)
    refiner.change_weights("unet", lambda state: {k: v for k, v in state.items() if k != "conv_in.bias"})
    said = refusal(load_sampler, FAMILIES["sdxl"], "embedded", extras=Extras(str(refiner)))
    assert "conv_in.bias" in said and "unet" in said


def test_an_unfused_adapter_says_that_it_is_one(copy):
    def unfused(state):
        for key in [key for key in state if key.endswith(".attn1.to_q.weight")]:
            path = key.removesuffix(".weight")
            state[f"{path}.base_layer.weight"] = weight = state.pop(key)
            state[f"{path}.lora_A.default.weight"] = weight[:4].clone()
            state[f"{path}.lora_B.default.weight"] = weight[:, :4].clone()

    copy.change_weights("transformer", unfused)
    assert all("holds an adapter's weights" in said and "--lora" in said for said in copy.refusals())


@pytest.mark.parametrize("file", ["adapter_config.json", "pytorch_lora_weights.safetensors"])
def test_an_adapters_folder(tmp_path, file):
    (tmp_path / file).write_text("{}")
    said = refusal(load_denoiser, FAMILIES["sdxl"], str(tmp_path))
    assert "holds an adapter" in said and "--lora" in said


def test_a_denoisers_folder_alone():
    said = refusal(load_denoiser, FAMILIES["dit"], str(EMBEDDED_FOLDER / "dit" / "transformer"))
    assert "holds a DiTTransformer2DModel alone" in said and "model_index.json" in said


@pytest.mark.parametrize("settings", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "sdnq"}, {}])
def test_what_another_program_has_quantized(copy, settings):
    copy.change_json("text_encoder/config.json", quantization_config=settings or None)
    if settings:
        assert f"text_encoder is already quantized by {settings['quant_method']}" in copy.refusal()
    load_denoiser(copy.family, str(copy), CPU)  # has nothing to do with its text encoder
    copy.change_json("transformer/config.json", quantization_config=settings)
    if settings:
        assert all("transformer is already quantized" in said for said in copy.refusals())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_low_bit_weights(copy, dtype):
    key = "transformer_blocks.3.attn1.to_q.weight"
    copy.change_weights("transformer", lambda state: state | {key: state[key].to(dtype)})
    assert all(key in said and "already quantized" in said for said in copy.refusals())


def test_a_component_of_an_unknown_class_or_code_of_its_own(copy):
    index = copy.folder / "model_index.json"
    plain = index.read_text()
    copy.change_json("model_index.json", text_encoder=["transformers", "NoSuchEncoder"])
    assert "text_encoder is a NoSuchEncoder, which transformers" in copy.refusal()
    index.write_text(plain)
    copy.change_json("model_index.json", transformer=["my_code", "Transformer"])
    assert all("needs code of its own (my_code.Transformer)" in said for said in copy.refusals())
    index.write_text(plain)
    copy.change_json("model_index.json", transformer=[None, None])
    assert all("names no transformer" in said for said in copy.refusals())


def test_a_missing_package_is_named(copy, monkeypatch):
    """As where protobuf or sentencepiece is not installed: a library's long message, its package in ours."""

    def fail(*_args, **_named):
        raise ImportError(
            "T5Tokenizer requires the X library\nbut it was not found. You can install it with pip:\npip install x"
        )

    monkeypatch.setattr(diffusers.PixArtAlphaPipeline, "from_pretrained", fail)
    assert "needs a package that is not installed: pip install x" in copy.refusal()


@pytest.mark.parametrize("lost", ["tokenizer", "tokenizer/tokenizer.json"])
def test_a_tokenizer_without_a_vocabulary(copy, lost):
    path = copy.folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "tokenizer" in copy.refusal()


def test_a_pointer_in_place_of_a_file(copy):
    copy.weights_file("transformer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert all("git lfs pull" in said for said in copy.refusals())
    copy.weights_file("transformer").write_text("")
    assert all("an empty file" in said for said in copy.refusals())


@pytest.mark.parametrize("name", ["sdv15", "hunyuan"])
def test_the_safety_checker_is_left_out(name, tmp_path):
    """It would blacken images; here it would fail, since its files are not there."""
    copy = Copy(name, tmp_path)
    copy.change_json(
        "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    pipeline = copy.load().pipeline
    assert pipeline.safety_checker is None and pipeline.feature_extractor is None


def test_no_installed_package_draws_a_watermark(monkeypatch):
    package = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl"
    for each in map(importlib.import_module, (package, f"{package}_img2img")):
        monkeypatch.setattr(each, "is_invisible_watermark_available", lambda: True)
        monkeypatch.setattr(each, "StableDiffusionXLWatermarker", object, raising=False)
    sampler = load_sampler(FAMILIES["sdxl"], "embedded", CPU, Extras(str(EMBEDDED_FOLDER / "sdxl_refiner")))
    assert sampler.pipeline.watermark is None and sampler.refiner.watermark is None


def test_text_encoders_alone_and_all_but_them(monkeypatch):
    """Neither what encodes nor what draws holds the other on the device."""
    family = FAMILIES["hunyuan"]
    encoder = pipelines.load_encoder(family, "embedded", CPU)
    assert not isinstance(encoder.pipeline.transformer, torch.nn.Module) and not hasattr(encoder.pipeline.vae, "decode")
    drawing = load_sampler(family, "embedded", CPU, text_encoders=False)
    assert all(getattr(drawing.pipeline, name, None) is None for name in TEXT_ENCODERS)
    encoder.encode(PROMPT, 2.0, 64)
