import json
import shutil
import time
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from no_network import no_network
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from errors import InputError
from evaluation import clip_score
from evaluation.clip_score import ClipScore
from models.embedded.text_encoders import clip_tokenizer

CPU = torch.device("cpu")
PIXELS, TOKENS = 32, 16  # fewer tokens than the tokenizer's own limit of 77
PROMPTS = ["a red 3", "blue seven, white background", "a handwritten two, black on green " * 9, "", "zebra", "9"]


def tiny_clip(tokenizer):
    """A CLIPModel with weights large enough that pairs differ and some cosines are below zero."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**small, **special, "vocab_size": len(tokenizer), "max_position_embeddings": TOKENS}
    vision = {**small, "image_size": PIXELS, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny CLIP model in a folder."""
    folder, tokenizer = tmp_path_factory.mktemp("clip"), clip_tokenizer()
    size = {"height": PIXELS, "width": PIXELS}
    tiny_clip(tokenizer).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=size), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(saved):
    return ClipScore(saved, CPU)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the folder, to damage."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def images():
    shape = (len(PROMPTS), PIXELS, PIXELS, 3)
    return list(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def refusal(model_id):
    with pytest.raises(InputError) as caught:
        ClipScore(model_id, CPU)
    message = str(caught.value)
    assert "\n" not in message and str(model_id) in message
    assert "--clip_model" in message and "leave out --clip_score" in message
    return message


@torch.no_grad()
def cosine(model, image, prompt):
    """One pair, preprocessed by hand: tokens cut and never padded, pixels of the right size already."""
    tokens = clip_tokenizer()(prompt).input_ids
    if len(tokens) > TOKENS:
        tokens = [*tokens[: TOKENS - 1], tokens[-1]]
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
    pixels = ((torch.from_numpy(image) / 255 - mean) / std).permute(2, 0, 1)  # [3, H, W]
    said = model.get_text_features(torch.tensor([tokens]))
    shown = model.get_image_features(pixels[None])
    said, shown = (getattr(features, "pooler_output", features) for features in (said, shown))  # tensors in transformers 4
    return F.cosine_similarity(said, shown).item()


def test_equals_pairs_one_by_one(judge, saved, images):
    model = CLIPModel.from_pretrained(saved)
    cosines = [cosine(model, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert min(cosines) < -0.05 and max(cosines) > 0.05
    expected = [100 * max(value, 0) for value in cosines]
    assert judge.scores(images, PROMPTS) == pytest.approx(expected, abs=1e-3)


def test_batches_do_not_matter(judge, images):
    whole = judge.scores(images, PROMPTS)
    assert whole.shape == (len(PROMPTS),) and whole.std() > 1
    for batch_size in (1, 4):
        assert judge.scores(iter(images), PROMPTS, batch_size) == pytest.approx(whole, abs=1e-3)


def test_each_image_goes_with_its_own_prompt(judge, images):
    scores = judge.scores(images, PROMPTS)
    assert judge.scores(images[::-1], PROMPTS[::-1]) == pytest.approx(scores[::-1], abs=1e-3)
    assert np.abs(judge.scores(images[::-1], PROMPTS) - scores).max() > 1


def test_other_sizes_are_resized_and_cut_to_their_centre(judge, saved):
    wide, tall = (np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8) for shape in ((64, 96, 3), (96, 64, 3)))
    centres = [
        Image.fromarray(wide).resize((48, 32), Image.BICUBIC).crop((8, 0, 40, 32)),
        Image.fromarray(tall).resize((32, 48), Image.BICUBIC).crop((0, 8, 32, 40)),
    ]
    by_pillow = judge.scores([np.array(centre) for centre in centres], ["zebra", "9"])
    assert judge.scores([wide, tall], ["zebra", "9"]) == pytest.approx(by_pillow, abs=0.1)


def test_images_and_prompts_must_be_as_many(judge, images):
    assert judge.scores([], []).shape == (0,)
    with pytest.raises(ValueError):
        judge.scores(images, PROMPTS[:-1])
    with pytest.raises(ValueError):
        judge.scores(images[:-1], PROMPTS)


def test_half_precision_weights_are_computed_with_in_float32(saved, folder):
    CLIPModel.from_pretrained(saved, dtype=torch.float16).save_pretrained(folder)
    assert ClipScore(folder, CPU).model.dtype == torch.float32


def test_loading_prints_nothing(saved, capfd):
    ClipScore(saved, CPU)
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
    monkeypatch.setattr(clip_score.HfApi, "model_info", model_info)
    message = refusal(clip_score.CLIP_MODEL)
    assert "not in the Hub's cache, and cannot be fetched from the Hub (no network)" in message
    (tmp_path / "config.json").touch()
    assert "not a CLIPModel in transformers format (not here)" in refusal(tmp_path)
    assert asked == [True]


@pytest.fixture
def cached(saved, tmp_path, monkeypatch):
    """The snapshot folder of the model `a/clip` in a Hub cache."""
    commit = "0" * 40
    model = tmp_path / "hub" / "models--a--clip"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    shutil.copytree(saved, model / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return model / "snapshots" / commit


@pytest.fixture
def hub(saved, monkeypatch):
    """The Hub has every model; gives the list of what is asked of it."""
    wanted = []

    def download(model_id, local_files_only=False, allow_patterns=None):
        if local_files_only:
            return snapshot_download(model_id, local_files_only=True)
        wanted.append(allow_patterns)
        return saved

    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "pytorch_model.bin")]
    snapshot_download = clip_score.snapshot_download
    monkeypatch.setattr(clip_score, "snapshot_download", download)
    monkeypatch.setattr(clip_score.HfApi, "model_info", lambda *_, timeout: SimpleNamespace(siblings=files))
    return wanted


def test_fetched_from_the_hub_when_not_cached(hub, judge, images):
    scores = ClipScore("another/clip", CPU).scores(images, PROMPTS)
    assert np.array_equal(scores, judge.scores(images, PROMPTS))
    assert hub == [["*.json", "*.txt", "pytorch_model*.bin"]]


def test_the_cache_alone_will_do(cached, judge, images):
    with no_network() as asked:
        scores = ClipScore("a/clip", CPU).scores(images, PROMPTS)
    assert np.array_equal(scores, judge.scores(images, PROMPTS)) and asked == []


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


def test_a_file_that_the_cache_lacks_is_fetched(cached, hub, judge, images):
    (cached / "model.safetensors").unlink()
    assert np.array_equal(ClipScore("a/clip", CPU).scores(images, PROMPTS), judge.scores(images, PROMPTS))
    assert len(hub) == 1


def test_a_damaged_file_in_the_cache_is_to_be_deleted(cached, monkeypatch):
    (cached / "model.safetensors").write_bytes(b"nothing")
    monkeypatch.setattr(clip_score, "_fetch", lambda model_id, wrong: str(cached))  # all is there, says the Hub
    with pytest.raises(InputError, match="damaged") as caught:
        ClipScore("a/clip", CPU)
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
