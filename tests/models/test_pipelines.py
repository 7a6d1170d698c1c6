import json
import shutil

import pytest
import torch
from conftest import ROOT, tiny_dit
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, DiTPipeline, UNet2DModel

from errors import InputError
from models.embedded.train import build_vae
from models.pipelines import defaults, is_embedded, load_pipeline, native_resolution, pick_device
from stages.common import multiquantizer_path

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def local_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "dit"
    DiTPipeline(transformer=tiny_dit(), vae=build_vae(), scheduler=DDIMScheduler()).save_pretrained(folder)
    return folder


def test_loads_a_local_folder(local_folder, family):
    pipeline = load_pipeline(family, str(local_folder), CPU)
    assert type(pipeline).__name__ == "DiTPipeline"
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipeline.transformer.dtype == torch.float32  # on the CPU
    weight = pipeline.transformer.proj_out_1.weight
    assert torch.equal(weight, weight.half().float())  # of the family's precision


def test_embedded_is_the_folder_itself(family):
    folder = ROOT / "models" / "embedded" / "dit"
    assert is_embedded(family, "embedded") and is_embedded(family, str(folder))
    assert not is_embedded(family, family.model_id)
    assert defaults(family, str(folder)) is family.embedded and defaults(family, family.model_id) is family


def test_embedded_folder_is_small():
    files = [path for path in (ROOT / "models/embedded/dit").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5_000_000


def test_the_null_class_is_the_pipelines_own():
    settings = json.loads((ROOT / "models/embedded/dit/transformer/config.json").read_text())
    assert settings["num_embeds_ada_norm"] == 1000 and settings["num_layers"] == 28


def test_an_unreachable_model_is_one_sentence(family, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"facebook/nothing-here.*--model_id embedded") as failure:
        load_pipeline(family, "facebook/nothing-here", CPU)
    assert "\n" not in str(failure.value)


def test_a_folder_that_is_no_pipeline(family, tmp_path):
    with pytest.raises(InputError, match="not a DiTPipeline"):
        load_pipeline(family, str(tmp_path), CPU)


def test_a_damaged_weight_file(family, local_folder, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(local_folder, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        load_pipeline(family, str(folder), CPU)


def test_another_pipeline(family, tmp_path):
    unet = UNet2DModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(InputError, match="DiTPipeline"):
        load_pipeline(family, str(tmp_path / "ddpm"), CPU)


@pytest.mark.parametrize("name", ["nonsense", "meta", "cuda:77"])
def test_bad_device(name):
    with pytest.raises(InputError, match=f"--device {name}"):
        pick_device(name)


@pytest.mark.parametrize("index", ["{}", "[]", "{"])
def test_a_damaged_index(family, local_folder, tmp_path, index):
    folder = tmp_path / "damaged"
    shutil.copytree(local_folder, folder)
    (folder / "model_index.json").write_text(index)
    with pytest.raises(InputError, match="damaged"):
        load_pipeline(family, str(folder), CPU)


def test_resolution_is_the_models_own(family, local_folder):
    assert native_resolution(load_pipeline(family, str(local_folder), CPU), family) == 64


def test_every_model_has_its_own_multiquantizer(family):
    names = [multiquantizer_path(family, m).name for m in (family.model_id, "embedded", "facebook/DiT-XL-2-256")]
    assert names == ["dit_mq.pt", "dit_embedded_mq.pt", "dit_DiT-XL-2-256_mq.pt"]


def test_vae_halves_three_times():
    assert isinstance(build_vae(), AutoencoderKL)
    assert build_vae().encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 4, 8, 8)
