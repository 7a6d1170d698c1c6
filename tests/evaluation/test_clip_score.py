import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_clip import PROMPTS, TOKENS, random_images
from transformers import CLIPModel

from models.embedded.text_encoders import clip_tokenizer


@pytest.fixture
def images():
    return random_images()


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


def test_equals_pairs_one_by_one(clip_judge, clip_folder, images):
    model = CLIPModel.from_pretrained(clip_folder)
    cosines = [cosine(model, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert min(cosines) < -0.05 and max(cosines) > 0.05
    expected = [100 * max(value, 0) for value in cosines]
    assert clip_judge.scores(images, PROMPTS) == pytest.approx(expected, abs=1e-3)


def test_batches_do_not_matter(clip_judge, images):
    whole = clip_judge.scores(images, PROMPTS)
    assert whole.shape == (len(PROMPTS),) and whole.std() > 1
    for batch_size in (1, 4):
        assert clip_judge.scores(iter(images), PROMPTS, batch_size) == pytest.approx(whole, abs=1e-3)


def test_each_image_goes_with_its_own_prompt(clip_judge, images):
    scores = clip_judge.scores(images, PROMPTS)
    assert clip_judge.scores(images[::-1], PROMPTS[::-1]) == pytest.approx(scores[::-1], abs=1e-3)
    assert np.abs(clip_judge.scores(images[::-1], PROMPTS) - scores).max() > 1


def test_other_sizes_are_resized_and_cut_to_their_centre(clip_judge):
    wide, tall = (np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8) for shape in ((64, 96, 3), (96, 64, 3)))
    centres = [
        Image.fromarray(wide).resize((48, 32), Image.BICUBIC).crop((8, 0, 40, 32)),
        Image.fromarray(tall).resize((32, 48), Image.BICUBIC).crop((0, 8, 32, 40)),
    ]
    by_pillow = clip_judge.scores([np.array(centre) for centre in centres], ["zebra", "9"])
    assert clip_judge.scores([wide, tall], ["zebra", "9"]) == pytest.approx(by_pillow, abs=0.1)


def test_images_and_prompts_must_be_as_many(clip_judge, images):
    assert clip_judge.scores([], []).shape == (0,)
    with pytest.raises(ValueError):
        clip_judge.scores(images, PROMPTS[:-1])
    with pytest.raises(ValueError):
        clip_judge.scores(images[:-1], PROMPTS)
