"""Loading: folders good and bad, the Hub out of reach, devices."""

import json
import shutil
import time

import huggingface_hub
import pytest
import torch
from conftest import tiny_dit
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from no_network import no_network

from errors import InputError
from models.embedded.denoisers import build_vae
from models.facts import native_pixels
from models.families import FAMILIES
from models.pipelines import (
    EMBEDDED_FOLDER,
    Extras,
    defaults,
    is_embedded,
    load_denoiser,
    load_sampler,
    meta_denoiser,
    model_of,
    pick_device,
    refiner_of,
)
from stages.common import multiquantizer_path

CPU = torch.device("cpu")
LOADERS = [load_sampler, load_denoiser]


@pytest.fixture(scope="module")
def local_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "dit"
    DiTPipeline(transformer=tiny_dit(), vae=build_vae(), scheduler=DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(local_folder, tmp_path):
    """A copy of the local folder to do damage to."""
    return shutil.copytree(local_folder, tmp_path / "damaged")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def refusal(load, *arguments):
    """What a loader says to what it does not load: one line."""
    with pytest.raises(InputError) as failure:
        load(*arguments, CPU)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def test_loads_a_local_folder(local_folder, family):
    sampler = load_sampler(family, str(local_folder), CPU)
    assert type(sampler.pipeline) is DiTPipeline and sampler.refiner is None
    assert type(sampler.pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert sampler.denoiser is sampler.pipeline.transformer
    assert sampler.denoiser.dtype == torch.float32  # on the CPU
    weight = sampler.denoiser.proj_out_1.weight
    assert torch.equal(weight, weight.half().float())  # of the family's precision
    assert native_pixels(family, model_of(family, str(local_folder))) == (64, 64)


def test_embedded_is_the_folder_itself(family):
    folder = EMBEDDED_FOLDER / "dit"
    assert is_embedded(family, "embedded") and is_embedded(family, str(folder))
    assert not is_embedded(family, family.model_id) and not is_embedded(FAMILIES["sdxl"], str(folder))
    assert defaults(family, str(folder)) is family.embedded and defaults(family, family.model_id) is family


def test_the_refiner_goes_with_its_model():
    sdxl = FAMILIES["sdxl"]
    assert refiner_of(sdxl, "embedded") == str(EMBEDDED_FOLDER / "sdxl_refiner")
    assert refiner_of(sdxl, sdxl.model_id) == "stabilityai/stable-diffusion-xl-refiner-1.0"
    assert [name for name, family in FAMILIES.items() if refiner_of(family, "embedded")] == ["sdxl"]


def size_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


def test_embedded_folders_are_small():
    sizes = {path.name: size_bytes(path) for path in EMBEDDED_FOLDER.iterdir() if path.is_dir()}
    assert set(FAMILIES) | {"sdxl_refiner"} <= set(sizes)
    assert max(sizes.values()) <= 6_000_000, sizes
    assert size_bytes(EMBEDDED_FOLDER) <= 30_000_000


def test_the_null_class_is_the_pipelines_own():
    settings = json.loads((EMBEDDED_FOLDER / "dit/transformer/config.json").read_text())
    assert settings["num_embeds_ada_norm"] == 1000 and settings["num_layers"] == 28


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_another_familys_folder_is_refused(name, load):
    """Also by pipelines that the other's parts would fit: PixArt-alpha and PixArt-Sigma."""
    names = list(FAMILIES)
    other = FAMILIES[names[(names.index(name) + 1) % len(names)]]
    said = refusal(load, FAMILIES[name], str(EMBEDDED_FOLDER / other.name))
    assert f"holds a {other.pipeline}," in said and said.endswith(f"needs a {FAMILIES[name].pipeline}")


def test_another_pipeline_is_no_refiner():
    sdxl = FAMILIES["sdxl"]
    with pytest.raises(InputError, match=r"holds a StableDiffusionXLPipeline, .* needs a StableDiffusionXLImg2ImgPipeline"):
        load_sampler(sdxl, "embedded", CPU, Extras(str(EMBEDDED_FOLDER / "sdxl")))


@pytest.mark.parametrize("load", LOADERS)
def test_an_unreachable_model(family, offline, load):
    said = refusal(load, family, "facebook/nothing-here")
    assert "facebook/nothing-here" in said and "--model_id embedded" in said


@pytest.mark.parametrize("load", LOADERS)
def test_a_network_that_fails_is_not_waited_for(family, load):
    start = time.monotonic()
    with no_network() as hosts_asked:
        assert "cannot be fetched from the Hub" in refusal(load, family, "facebook/nothing-here")
    assert hosts_asked and time.monotonic() - start < 5


@pytest.mark.parametrize("load", LOADERS)
def test_a_folder_that_is_no_pipeline(family, tmp_path, load):
    assert "not a DiTPipeline" in refusal(load, family, str(tmp_path))


@pytest.mark.parametrize("load", LOADERS)
def test_a_damaged_weight_file(family, damaged, load):
    weights = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(damaged) in refusal(load, family, str(damaged))


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("index", ["{}", "[]", "{"])
def test_a_damaged_index(family, damaged, index, load):
    (damaged / "model_index.json").write_text(index)
    assert str(damaged) in refusal(load, family, str(damaged))


@pytest.mark.parametrize("name", ["nonsense", "meta", "cuda:77"])
def test_bad_device(name):
    with pytest.raises(InputError, match=f"--device {name}"):
        pick_device(name)


def test_every_model_has_its_own_multiquantizer(family):
    names = [multiquantizer_path(family, m).name for m in (family.model_id, "embedded", "facebook/DiT-XL-2-256")]
    assert names == ["dit_mq.pt", "dit_embedded_mq.pt", "dit_facebook--DiT-XL-2-256_mq.pt"]


def test_a_meta_copy_has_the_shapes_alone():
    denoiser = tiny_dit()
    copy = meta_denoiser(denoiser)
    shapes = {name: weight.shape for name, weight in denoiser.state_dict().items()}
    assert {name: weight.shape for name, weight in copy.state_dict().items()} == shapes
    assert all(weight.is_meta for weight in copy.parameters()) and not any(w.is_meta for w in denoiser.parameters())


def test_vae_halves_three_times():
    assert isinstance(build_vae(), AutoencoderKL)
    assert build_vae().encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 4, 8, 8)
