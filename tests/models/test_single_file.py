"""Stable Diffusion 1.5 from a CompVis checkpoint: the embedded one written as such a file, and the shipped configuration."""

import contextlib
import json
import shutil
import sys
import time
import types
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from compvis_checkpoint import compvis_state, same_weights
from conftest import ROOT
from no_network import no_network
from transformers import CLIPTextConfig, CLIPTextModel

from errors import InputError
from models import geometry
from models.drawing import noise_generators
from models.facts import native_pixels
from models.families import FAMILIES
from models.pipelines import EMBEDDED_FOLDER, load_denoiser, load_sampler, model_of
from models.single_file import SD1_CONFIG

CPU = torch.device("cpu")
SDV15 = FAMILIES["sdv15"]
LOADERS = [load_sampler, load_denoiser]
IN_LAYERS = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


@pytest.fixture(scope="module")
def embedded():
    return load_sampler(SDV15, "embedded", CPU)


@pytest.fixture(scope="module")
def state(embedded):
    return compvis_state(embedded.pipeline)


@pytest.fixture
def write(tmp_path):
    """Write a checkpoint, its configuration beside it, into the test's folder; gives its path."""

    def write(content):
        path = tmp_path / "sd-v1.ckpt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        no_weights = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(EMBEDDED_FOLDER / "sdv15", path.with_suffix(""), ignore=no_weights, dirs_exist_ok=True)
        return path

    return write


def refusal(load, path, family=SDV15):
    with no_network(), pytest.raises(InputError) as failure:
        load(family, str(path), CPU)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def image(sampler):
    return sampler.images(["a red seven on a blue background"], noise_generators(3, [0]), 4, 3.0, 64)


def test_the_file_is_the_folder(embedded, state, write):
    path = write({"state_dict": state, "global_step": 3})
    with no_network() as hosts_asked:
        sampler = load_sampler(SDV15, str(path), CPU)
        denoiser = load_denoiser(SDV15, str(path), CPU)
    assert hosts_asked == []
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(sampler.pipeline, part), getattr(embedded.pipeline, part)), part
    assert same_weights(denoiser, embedded.denoiser)
    scheduler = sampler.pipeline.scheduler
    assert type(scheduler) is diffusers.PNDMScheduler and scheduler.config.skip_prk_steps
    assert scheduler.config.steps_offset == 1 and not scheduler.config.set_alpha_to_one
    assert native_pixels(SDV15, model_of(SDV15, str(path))) == (64, 64)
    assert np.array_equal(image(sampler), image(embedded))


def test_the_denoiser_needs_no_other_part(embedded, state, write):
    """Neither text encoder and autoencoder nor vocabulary, which the published file lacks."""
    unet_alone = {"state_dict": {name: weight for name, weight in state.items() if ".diffusion_model." in name}}
    path = write(unet_alone)
    shutil.rmtree(path.with_suffix("") / "tokenizer")
    with no_network() as hosts_asked:
        assert same_weights(load_denoiser(SDV15, str(path), CPU), embedded.denoiser)
    assert hosts_asked == []
    assert "Failed to load" in refusal(load_sampler, write(unet_alone))


@contextlib.contextmanager
def lightning_installed():
    """Gives a class of PyTorch Lightning, which is not there when the file is read."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    parents = {parent: types.ModuleType(parent) for parent in ("pytorch_lightning", "pytorch_lightning.callbacks")}
    with mock.patch.dict(sys.modules, parents | {name: module}):
        yield module.ModelCheckpoint


def test_a_trainers_bookkeeping_is_passed_over(embedded, state, write):
    """The published file is not tensors alone: https://github.com/huggingface/diffusers/issues/8874."""
    with lightning_installed() as callback:
        held = {"best_model_score": np.float64(0.5), "object": callback()}
        path = write({"state_dict": state, "callbacks": {callback: held}})
    for load in LOADERS:
        loaded = load(SDV15, str(path), CPU)
        assert same_weights(getattr(loaded, "denoiser", loaded), embedded.denoiser)


class Harmful:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_file_runs_no_code(state, write, tmp_path):
    loot = tmp_path / "loot"
    path = write({"state_dict": state, "x": Harmful(exec, f"open({str(loot)!r}, 'w')")})
    admitted = set(torch.serialization.get_safe_globals())
    load_denoiser(SDV15, str(path), CPU)
    assert not loot.exists() and set(torch.serialization.get_safe_globals()) == admitted


def test_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in LOADERS:
        said = refusal(load, SDV15.model_id)
        assert said.startswith(f"{SDV15.model_id}: no such checkpoint; download v1-5-pruned-emaonly.ckpt")
        assert "put it there" in said and "--model_id embedded" in said


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("damage", ["junk", "half of it", "a list", "another shape", "a missing weight"])
def test_a_damaged_file(state, write, load, damage):
    path = write({"state_dict": state})
    contents = {
        "junk": b"junk" * 1000,
        "half of it": path.read_bytes()[: path.stat().st_size // 2],
        "a list": [1, 2],
        "another shape": state | {IN_LAYERS: torch.zeros(3, 3)},
        "a missing weight": {name: weight for name, weight in state.items() if name != IN_LAYERS},
    }
    assert f"{path}: this file is not a checkpoint of Stable Diffusion 1.5 (" in refusal(load, write(contents[damage]))


def test_a_text_encoder_that_is_not_all_there(state, write):
    missing = "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"
    path = write({name: weight for name, weight in state.items() if name != missing})
    assert "not all weights of its text_encoder" in refusal(load_sampler, path)


@pytest.mark.parametrize(("name", "why"), [("pixart_alpha", "diffusers reads no single files of"), ("sdxl", "needs a")])
def test_no_file_for_another_family(state, write, name, why):
    for load in LOADERS:
        said = refusal(load, write(state), FAMILIES[name])
        assert why in said and FAMILIES[name].pipeline in said


def test_a_missing_vocabulary_is_not_waited_for(state, write):
    path = write(state)
    shutil.rmtree(path.with_suffix("") / "tokenizer")
    start = time.monotonic()
    said = refusal(load_sampler, path)
    assert "holds no vocabulary" in said and "vocab.json and merges.txt" in said and time.monotonic() - start < 5
    assert str(path.with_suffix("") / "tokenizer") in said


def test_the_vocabulary_s_two_files_are_enough(embedded, state, write):
    path = write(state)
    folder = path.with_suffix("") / "tokenizer"
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]
    shutil.rmtree(folder)
    folder.mkdir()
    assert "holds no vocabulary" in refusal(load_sampler, path)  # transformers makes an empty one of an empty folder
    (folder / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in vocabulary["merges"]))
    ours, its = load_sampler(SDV15, str(path), CPU).pipeline.tokenizer, embedded.pipeline.tokenizer
    assert ours.model_max_length == 77
    for text in ("a red seven on a blue background", "Zebra, ünï 12"):
        assert ours(text, padding="max_length").input_ids == its(text, padding="max_length").input_ids


def test_a_file_without_a_folder_is_configured_by_the_projects(state, write):
    path = write(state)
    shutil.rmtree(path.with_suffix(""))
    assert "expected shape torch.Size([1280, 320])" in refusal(load_denoiser, path)
    path.with_suffix("").mkdir()
    assert "expected shape torch.Size([1280, 320])" in refusal(load_denoiser, path)


def shapes(module):
    return {name: tuple(weight.shape) for name, weight in module.state_dict().items()}


def test_the_shipped_configuration_is_the_real_geometry():
    assert (ROOT / SDV15.model_id).with_suffix("") == SD1_CONFIG
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(SD1_CONFIG / "unet")
        assert shapes(unet) == shapes(geometry.build("sdv15"))
        vae = diffusers.AutoencoderKL.from_config(SD1_CONFIG / "vae")
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(SD1_CONFIG / "text_encoder"))
    count = {part: sum(weight.numel() for weight in part.parameters()) for part in (unet, vae, text_encoder)}
    assert list(count.values()) == [859_520_964, 83_653_863, 123_060_480]
    assert vae.config.scaling_factor == 0.18215 and unet.config.sample_size == 64
