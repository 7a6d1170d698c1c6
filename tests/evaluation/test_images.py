import numpy as np
import torch

from evaluation.contact_sheet import contact_sheet
from evaluation.images import generate, noise_generators
from models.pipelines import load_pipeline


def test_noise_is_each_images_own():
    first, second = (torch.randn(4, generator=g) for g in noise_generators(42, [0, 1]))
    assert torch.equal(second, torch.randn(4, generator=torch.Generator().manual_seed(43)))
    assert not torch.equal(first, second)
    same = [torch.randn(4, generator=g) for g in noise_generators(42, [0, 1], published_noise=True)]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], first)


def test_batch_size_changes_no_image(family):
    pipeline = load_pipeline(family, "embedded", torch.device("cpu"))
    together = generate(pipeline, {"class_labels": [0, 1, 2]}, noise_generators(1, [0, 1, 2]), 3, 2.0)
    alone = [generate(pipeline, {"class_labels": [i]}, noise_generators(1, [i]), 3, 2.0)[0] for i in range(3)]
    assert together.shape == (3, 64, 64, 3) and together.dtype == np.uint8
    assert np.abs(together.astype(int) - np.stack(alone)).max() <= 1  # a rounding at most


def test_contact_sheet_holds_every_image():
    images = np.zeros((12, 64, 64, 3), np.uint8)
    images[:, :, :, 0] = np.arange(12)[:, None, None] * 20 + 5
    sheet = np.asarray(contact_sheet([("above", images), ("below", images)]))
    for shade in images[:, 0, 0, 0]:
        found = (sheet == (shade, 0, 0)).all(axis=2).sum()
        assert found == 2 * 128 * 128  # both rows, enlarged twice
