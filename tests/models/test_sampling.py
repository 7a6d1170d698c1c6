"""What the flags of sampling make of a model: sizes, defaults, negative prompts, offload, precision."""

import re

import numpy as np
import pytest
import torch
from conftest import tiny
from embedded_copies import CPU, PROMPT, Copy

from errors import InputError
from models import pipelines
from models.drawing import noise_generators
from models.families import FAMILIES
from models.pipelines import Extras, load_encoder, load_sampler
from models.prompt_memo import encode_prompts, remember
from quant.slots import find_slots
from stages.common import in_precision, parser_for
from stages.sampling import add_sampling_flags, check_sampling, complete_sampling, extras_of


@pytest.fixture
def parse(monkeypatch):
    """The flags of a family's stage, parsed."""

    def parse(name, *flags):
        monkeypatch.setattr("sys.argv", ["x.py", *map(str, flags)])
        parser = parser_for(FAMILIES[name], "infer", "test")
        add_sampling_flags(parser, FAMILIES[name])
        return parser.parse_args(complete=lambda args: complete_sampling(args, FAMILIES[name]))

    return parse


NATIVE = [
    ("pixart_alpha", "transformer", 128, 1024),
    ("pixart_sigma", "transformer", 64, 512),
    ("pixart_sigma", "transformer", 256, 2048),
    ("sdv15", "unet", 96, 768),
    ("sdxl", "unet", 128, 1024),
    ("sdv15", "unet", [64, 96], "512x768"),
]


@pytest.mark.parametrize(("name", "part", "latent_pixels", "pixels"), NATIVE)
def test_another_model_is_sampled_at_its_own_size(parse, tmp_path, name, part, latent_pixels, pixels):
    copy = Copy(name, tmp_path)
    copy.change_json(f"{part}/config.json", sample_size=latent_pixels)
    args = parse(name, "--model_id", copy)
    assert args.res == pixels and (args.steps, args.guidance) == (copy.family.steps, copy.family.guidance)
    assert parse(name, "--model_id", copy, "--res", 256).res == 256
    own = parse(name)  # the family's row
    assert own.res == FAMILIES[name].resolution


def test_the_models_own_classes_and_size(parse, tmp_path):
    copy = Copy("dit", tmp_path)
    copy.change_json("transformer/config.json", sample_size=32, num_embeds_ada_norm=20)
    args = parse("dit", "--model_id", copy)
    assert args.res is None and args.num_classes == 20
    check_sampling(args, copy.family, CPU)
    check_sampling(args | {"res": 256}, copy.family, CPU)
    with pytest.raises(InputError, match="makes images of 256 px only"):
        check_sampling(args | {"res": 512}, copy.family, CPU)


def test_a_size_far_from_its_own_is_warned_of(parse, tmp_path, caplog):
    copy = Copy("sdxl", tmp_path)
    copy.change_json("unet/config.json", sample_size=128)
    for size, warned in ((1024, False), ("768x1344", False), (512, True), ("256x256", True), (2048, True)):
        caplog.clear()
        check_sampling(parse("sdxl", "--model_id", copy, "--res", size, "--no_refiner"), copy.family, CPU)
        assert ("made for 1024x1024 px" in caplog.text) == warned, size


@pytest.mark.parametrize(("given", "found"), [("768x1344", "768x1344"), ("512X512", 512), ("64", 64)])
def test_sizes(parse, given, found):
    assert parse("sdxl", "--res", given).res == found


@pytest.mark.parametrize("given", ["100", "0", "768x", "x64", "64x100", "-64", "64x64x64", "big"])
def test_no_sizes(parse, given):
    with pytest.raises(InputError, match="--res"):
        parse("sdxl", "--res", given)


@pytest.mark.parametrize("name", ["sdxl", "pixart_alpha", "hunyuan"])
def test_oblong_images(name):
    sampler = load_sampler(FAMILIES[name], "embedded", CPU)
    images = sampler.images([PROMPT], noise_generators(1, [0]), 2, 2.0, "64x128")
    assert images.shape == (1, 64, 128, 3)


def test_few_step_models_by_default(parse, tmp_path, caplog):
    copy = Copy("sdxl", tmp_path)
    copy.change_json("scheduler/scheduler_config.json", timestep_spacing="trailing")
    args = parse("sdxl", "--model_id", copy)
    assert (args.steps, args.guidance, args.refiner_id) == (4, 1.0, None) and "few-step model" in caplog.text
    args = parse("sdxl", "--model_id", copy, "--steps", 2, "--guidance", 3, "--refiner_id", "x")
    assert (args.steps, args.guidance, args.refiner_id) == (2, 3.0, "x")
    assert parse("sdxl", "--scheduler", "LCMScheduler").steps == 4 and parse("sdxl").steps == 40


def test_another_precision(parse):
    args = parse("sdxl", "--dtype", "bfloat16")
    assert str(args.multi_chkpt) == "multiquantizers/sdxl_bfloat16_mq.pt"
    assert str(parse("sdxl", "--dtype", "float16").multi_chkpt) == "multiquantizers/sdxl_mq.pt"
    family = in_precision(FAMILIES["dit"], "float32")
    assert family.precision_bits == 32 and FAMILIES["dit"].precision_bits == 16
    denoiser = pipelines.load_denoiser(in_precision(FAMILIES["dit"], "bfloat16"), "embedded", CPU)
    assert denoiser.dtype == torch.bfloat16


def test_an_adapter_is_in_the_multiquantizers_name(parse, tmp_path):
    file = tmp_path / "style.safetensors"
    file.write_bytes(b"x")
    args = parse("sdxl", "--lora", f"{file}:0.5", file)
    assert re.fullmatch(r"multiquantizers/sdxl_style@0\.5-\w{8}_style-\w{8}_mq\.pt", str(args.multi_chkpt))
    assert args.lora_key.count(":") == 2 and [each.scale for each in extras_of(args).loras] == [0.5, 1.0]


@pytest.mark.parametrize("name", ["pixart_alpha", "hunyuan", "sdxl", "sdv15"])
def test_negative_prompts(name):
    """They change images, and are the same encoded beforehand, each for its own prompt."""
    family, prompts = FAMILIES[name], [PROMPT, "a green 3 on white"]
    refiner = Extras(pipelines.refiner_of(family, "embedded"))
    extras = Extras(refiner.refiner_id, negative_prompt="blue")
    images = {}
    for each in (refiner, extras):
        sampler = load_sampler(family, "embedded", CPU, each)
        images[each] = sampler.images(prompts, noise_generators(1, range(2)), 3, 3.0, 64)
    assert np.abs(images[extras] - images[refiner]).max() > 0.02
    embeddings = encode_prompts(load_encoder(family, "embedded", CPU, extras), prompts, 3.0, 64)
    sampler = load_sampler(family, "embedded", CPU, extras, text_encoders=False)
    remember(sampler, embeddings)
    again = sampler.images(prompts, noise_generators(1, range(2)), 3, 3.0, 64)
    assert np.abs(again - images[extras]).max() < 0.02


def images_of(sampler):
    prompts = [3] if sampler.family.num_classes else [PROMPT]
    return sampler.images(prompts, noise_generators(1, [0]), 5, 2.0, 64)


@pytest.mark.parametrize("name", ["sdxl", "pixart_alpha"])
def test_offload_draws_the_same(name):
    """diffusers' own hooks, here with the CPU for a GPU; `gather` takes the weights back and `place` hooks them again."""
    family = FAMILIES[name]
    plain, hooked = (Extras(pipelines.refiner_of(family, "embedded"), offload=each) for each in ("none", "model"))
    expected = images_of(load_sampler(family, "embedded", CPU, plain))
    sampler = load_sampler(family, "embedded", CPU, hooked, place=False)
    assert not hasattr(sampler.denoiser, "_hf_hook")
    for _ in range(2):
        sampler.place(CPU)
        assert hasattr(sampler.denoiser, "_hf_hook") and np.array_equal(images_of(sampler), expected)
        sampler.gather()
        assert not hasattr(sampler.denoiser, "_hf_hook")


def test_two_pipelines_that_share_a_model_hook_it_once():
    family = FAMILIES["sdxl"]
    extras = Extras(pipelines.refiner_of(family, "embedded"), offload="sequential")
    sampler = load_sampler(family, "embedded", CPU, extras, place=False)
    sampler.place(CPU)
    assert sampler.refiner.vae is sampler.pipeline.vae and all(weight.is_meta for weight in sampler.refiner.vae.parameters())
    sampler.gather()
    assert not any(
        weight.is_meta for each in sampler.pipelines for weight in (*each.unet.parameters(), *each.vae.parameters())
    )


def test_offload_is_for_gpus(parse):
    args = parse("dit", "--model_id", "embedded", "--offload", "model")
    with pytest.raises(InputError, match="--offload model: is for GPUs"):
        check_sampling(args, FAMILIES["dit"], CPU)


@pytest.mark.parametrize("name", ["sdxl", "sdv15"])
def test_a_u_net_without_a_middle_block(name):
    unet = tiny(name, mid_block_type=None)
    slots = find_slots(unet, FAMILIES[name].slot_rules)
    assert slots and not any("mid_block" in slot.module_path for slot in slots.values())
    split = [slot for slot in slots.values() if slot.inputs]
    (first,) = [slot for slot in split if slot.module_path.startswith("up_blocks.0.resnets.0.") and not slot.key.part]
    assert first.inputs == (0, unet.down_blocks[-1].resnets[-1].conv1.weight.shape[0])


@pytest.mark.parametrize(
    "changes",
    [{"time_cond_proj_dim": 256}, {"in_channels": 9}, {"encoder_hid_dim": 64, "encoder_hid_dim_type": "text_proj"}],
)
def test_a_u_net_of_another_kind(tmp_path, changes):
    copy = Copy("sdv15", tmp_path)
    copy.change_json("unet/config.json", **changes)
    assert all(next(iter(changes)) in said for said in copy.refusals())
