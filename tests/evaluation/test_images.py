from argparse import Namespace

import numpy as np
import pytest
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


@pytest.mark.parametrize("published_noise", [False, True])
def test_batch_size_changes_no_image(family, published_noise):
    pipeline = load_pipeline(family, "embedded", torch.device("cpu"))
    settings = Namespace(seed=1, steps=3, guidance=2.0, published_noise=published_noise)
    runs = [list(generate(pipeline, [0, 1, 2], Namespace(**vars(settings), batch_size=size), "")) for size in (3, 1)]
    assert len(runs[0]) == 3 and runs[0][0].shape == (64, 64, 3) and runs[0][0].dtype == np.uint8
    assert np.abs(np.stack(runs[0]).astype(int) - np.stack(runs[1])).max() <= 1  # a rounding at most


def test_contact_sheet_holds_every_image():
    images = np.zeros((12, 64, 64, 3), np.uint8)
    images[:, :, :, 0] = np.arange(12)[:, None, None] * 20 + 5
    sheet = np.asarray(contact_sheet([("above", images), ("below", images)]))
    for shade in images[:, 0, 0, 0]:
        found = (sheet == (shade, 0, 0)).all(axis=2).sum()
        assert found == 2 * 128 * 128  # both rows, enlarged twice
