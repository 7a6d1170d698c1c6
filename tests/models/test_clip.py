import json
import shutil
import time
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from no_network import no_network
from small_clip import PROMPTS, random_images
from transformers import CLIPModel

from errors import InputError
from evaluation.clip_score import ClipScore
from models import clip
from models.clip import load_clip

CPU = torch.device("cpu")


@pytest.fixture
def images():
    return random_images()


@pytest.fixture
def folder(clip_folder, tmp_path):
    """A copy of the folder, to damage."""
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def scorer(model_id):
    return ClipScore(*load_clip(model_id), CPU)


def refusal(model_id):
    with pytest.raises(InputError) as caught:
        load_clip(model_id)
    message = str(caught.value)
    assert "\n" not in message and str(model_id) in message
    assert "--clip_model" in message and "leave out --clip_score" in message
    return message


def test_half_precision_weights_are_computed_with_in_float32(clip_folder, folder):
    CLIPModel.from_pretrained(clip_folder, dtype=torch.float16).save_pretrained(folder)
    assert load_clip(folder)[0].dtype == torch.float32


def test_loading_prints_nothing(clip_folder, capfd):
    load_clip(clip_folder)
    assert capfd.readouterr() == ("", "")


def test_missing_folder_is_said_at_once(tmp_path):
    start = time.perf_counter()
    assert "no local folder" in refusal(tmp_path / "none")
    assert time.perf_counter() - start < 3


def test_without_a_network_the_hub_is_not_waited_for(monkeypatch, tmp_path):
    asked = []

    def from_pretrained(model_id, local_files_only, **kwargs):
        asked.append(local_files_only)
        raise OSError("not here\nnor there")

    def model_info(self, model_id, timeout):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(CLIPModel, "from_pretrained", from_pretrained)
    monkeypatch.setattr(clip.HfApi, "model_info", model_info)
    message = refusal(clip.CLIP_MODEL)
    assert "not in the Hub's cache, and cannot be fetched from the Hub (no network)" in message
    (tmp_path / "config.json").touch()
    assert "not a CLIPModel in transformers format (not here)" in refusal(tmp_path)
    assert asked == [True]


@pytest.fixture
def cached(clip_folder, tmp_path, monkeypatch):
    """The snapshot folder of the model `a/clip` in a Hub cache."""
    commit = "0" * 40
    model = tmp_path / "hub" / "models--a--clip"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    shutil.copytree(clip_folder, model / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return model / "snapshots" / commit


@pytest.fixture
def hub(clip_folder, monkeypatch):
    """The Hub has every model; gives the list of what is asked of it."""
    wanted = []

    def download(model_id, local_files_only=False, allow_patterns=None):
        if local_files_only:
            return snapshot_download(model_id, local_files_only=True)
        wanted.append(allow_patterns)
        return clip_folder

    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "pytorch_model.bin")]
    snapshot_download = clip.snapshot_download
    monkeypatch.setattr(clip, "snapshot_download", download)
    monkeypatch.setattr(clip.HfApi, "model_info", lambda *_, timeout: SimpleNamespace(siblings=files))
    return wanted


def test_fetched_from_the_hub_when_not_cached(hub, clip_judge, images):
    scores = scorer("another/clip").scores(images, PROMPTS)
    assert np.array_equal(scores, clip_judge.scores(images, PROMPTS))
    assert hub == [["*.json", "*.txt", "pytorch_model*.bin"]]


def test_the_cache_alone_will_do(cached, clip_judge, images):
    with no_network() as asked:
        scores = scorer("a/clip").scores(images, PROMPTS)
    assert np.array_equal(scores, clip_judge.scores(images, PROMPTS)) and asked == []


@pytest.mark.parametrize(
    "name, reason",
    [
        ("config.json", "it has no config.json"),
        ("model.safetensors", "no file named model.safetensors"),
        ("processor_config.json", "image processor"),
        ("tokenizer.json", "no vocabulary"),
    ],
)
def test_a_file_that_the_cache_lacks_is_not_called_the_network(cached, name, reason):
    (cached / name).unlink()
    with no_network():
        message = refusal("a/clip")
    assert f"{cached}, is incomplete or damaged" in message and reason in message and "no network in this test" in message


def test_a_file_that_the_cache_lacks_is_fetched(cached, hub, clip_judge, images):
    (cached / "model.safetensors").unlink()
    assert np.array_equal(scorer("a/clip").scores(images, PROMPTS), clip_judge.scores(images, PROMPTS))
    assert len(hub) == 1


def test_a_damaged_file_in_the_cache_is_to_be_deleted(cached, monkeypatch):
    (cached / "model.safetensors").write_bytes(b"nothing")
    monkeypatch.setattr(clip, "_fetch", lambda model_id, wrong: str(cached))  # all is there, says the Hub
    with pytest.raises(InputError, match="damaged") as caught:
        load_clip("a/clip")
    assert f"delete {cached.parents[1]} and run again" in str(caught.value)


def test_offline_mode_and_impossible_names_are_told(monkeypatch):
    assert "Repo id must" in refusal("/no/such/folder")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal("a/clip")


def test_a_folder_without_its_configuration(folder):
    """transformers would go on with CLIP's default sizes."""
    (folder / "config.json").unlink()
    assert "it has no config.json" in refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "processor_config.json", "config.json", "tokenizer.json"])
def test_damaged_folder(folder, name):
    (folder / name).write_text("{")
    assert "this folder is not a CLIPModel" in refusal(folder)


def test_folder_without_a_vocabulary(folder):
    """transformers 5 would go on with a tokenizer that knows two tokens."""
    (folder / "tokenizer.json").unlink()
    assert "this folder is not a CLIPModel" in refusal(folder)


@pytest.mark.parametrize(
    "part, change", [("vision_config", {"num_hidden_layers": 3}), ("text_config", {"intermediate_size": 8})]
)
def test_weights_that_do_not_fit(folder, part, change):
    """transformers would fill the gaps at random."""
    config = json.loads((folder / "config.json").read_text())
    config[part].update(change)
    (folder / "config.json").write_text(json.dumps(config))
    assert "weights do not fit" in refusal(folder)
