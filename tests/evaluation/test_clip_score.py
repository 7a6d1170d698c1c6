import json
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
    assert "cannot be fetched from the Hub (no network)" in refusal(clip_score.CLIP_MODEL)
    assert "not a CLIPModel in transformers format (not here)" in refusal(tmp_path)
    assert asked == [True, True]


def test_fetched_from_the_hub_when_not_cached(saved, monkeypatch, judge, images):
    def on_the_hub(cls):
        load = cls.from_pretrained

        def from_pretrained(model_id, local_files_only, **kwargs):
            if local_files_only:
                raise OSError("not in the cache")
            return load(saved, **kwargs)

        return from_pretrained

    for cls in (CLIPModel, CLIPProcessor):
        monkeypatch.setattr(cls, "from_pretrained", on_the_hub(cls))
    monkeypatch.setattr(clip_score.HfApi, "model_info", lambda self, model_id, timeout: None)
    scores = ClipScore(clip_score.CLIP_MODEL, CPU).scores(images, PROMPTS)
    assert np.array_equal(scores, judge.scores(images, PROMPTS))


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
