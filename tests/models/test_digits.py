import numpy as np
import pytest
import torch

from models.embedded.digits import INKS_ON_PAPERS, PALETTE, draw, load_scans, random_pairs, reference_pictures

COLORS = torch.tensor(list(PALETTE.values())) / 255


@pytest.fixture(scope="module")
def drawn():
    """Pictures of the held-out scans, and the places of their colours."""
    scans, _ = load_scans("test")
    generator = torch.Generator().manual_seed(0)
    pairs = random_pairs(len(scans), generator)
    return draw(scans, pairs, generator), pairs


def test_splits_part_the_scans():
    sizes = [len(load_scans(split)[0]) for split in ("train", "test", "all")]
    assert sizes == [1437, 360, 1797]
    scans, labels = load_scans()
    assert scans.shape == (1797, 1, 8, 8) and scans.min() >= 0 and scans.max() == 1
    assert set(labels.tolist()) == set(range(10))
    assert torch.equal(load_scans("test")[0], scans[::5])


def test_digits_have_a_margin_and_their_two_colours(drawn):
    pictures, pairs = drawn
    assert pictures.shape == (360, 3, 64, 64) and pictures.min() >= 0 and pictures.max() <= 1
    ink, paper = COLORS[torch.tensor(INKS_ON_PAPERS)[pairs]].unbind(1)  # [360, 3]
    corner = pictures[:, :, :1, :1]
    assert torch.allclose(corner[..., 0, 0], paper, atol=1e-6)
    inked = (pictures - corner).abs().amax(1) > 0.02  # [360, 64, 64]
    reach = [reaching(inked, margin) for margin in (1, 2, 3)]
    assert all(count <= most for count, most in zip(reach, (0, 7, 30), strict=True)), reach
    full_ink = ((pictures - ink[..., None, None]).abs().amax(1) < 1e-3).flatten(1).sum(1)
    assert (full_ink > 40).all() and (inked.flatten(1).float().mean(1) < 0.5).all()


def reaching(inked, margin):
    """How many pictures have ink in their outermost `margin` pixels."""
    outside = inked.clone()
    outside[:, margin:-margin, margin:-margin] = False
    return int(outside.flatten(1).any(1).sum())


def test_every_colour_comes_on_every_other():
    assert len(set(INKS_ON_PAPERS)) == 30 and all(ink != paper for ink, paper in INKS_ON_PAPERS)
    pairs = random_pairs(2000, torch.Generator().manual_seed(0))
    assert set(pairs.tolist()) == set(range(30))


def test_drawing_is_by_its_generator_alone(drawn):
    scans, _ = load_scans("test")
    generator = torch.Generator().manual_seed(0)
    pairs = random_pairs(len(scans), generator)
    assert torch.equal(draw(scans, pairs, generator), drawn[0])
    assert not torch.equal(draw(scans, pairs, generator), drawn[0])  # placed anew


def test_reference_pictures():
    pictures = reference_pictures()
    assert pictures.shape == (1797, 64, 64, 3) and pictures.dtype == np.uint8
    palette = {tuple(color) for color in PALETTE.values()}
    assert {tuple(picture[0, 0].tolist()) for picture in pictures} == palette
