"""Pictures of handwritten digits: scikit-learn's 8x8 scans drawn in coloured ink on coloured paper."""

import itertools
import math

import torch
import torch.nn.functional as F

SIZE_PX = 64
PALETTE = {
    "red": (204, 36, 42),
    "green": (36, 150, 62),
    "blue": (34, 72, 196),
    "yellow": (246, 206, 44),
    "black": (22, 22, 26),
    "white": (250, 248, 242),
}
INKS_ON_PAPERS = tuple(itertools.permutations(range(len(PALETTE)), 2))  # 30 pairs (ink, paper) of palette places
DIGIT_SHARE = 0.76  # side of the 8x8 scan over the side of the picture; the rest is margin
EDGE = (0.34, 0.72)  # scan intensity at which ink begins and is full: makes strokes crisp


def load_scans(split="all"):
    """The scans [N, 1, 8, 8] in 0..1 and their labels [N].

    `split` is "all" (1,797), "train" (four of every five) or "test" (every fifth).
    """
    from sklearn.datasets import load_digits  # imported late: the rest of this module is asked for by every script

    digits = load_digits()
    scans = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # [N, 1, 8, 8]
    labels = torch.from_numpy(digits.target).long()  # [N]
    is_test = torch.arange(len(labels)) % 5 == 0
    keep = {"all": torch.ones_like(is_test), "test": is_test, "train": ~is_test}[split]
    return scans[keep], labels[keep]


def random_placement(count, generator):
    """Affine maps [count, 2, 3] that turn (8 degrees), scale (8 %) and shift (3 px) a digit a little."""
    turn, scale, dx, dy = (2 * torch.rand(4, count, generator=generator) - 1).unbind()
    angle = turn * math.radians(8)
    zoom = (1 + 0.08 * scale) / DIGIT_SHARE
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    shift = 6 / SIZE_PX / DIGIT_SHARE  # 3 px in the -1..1 coordinates of the scan
    return torch.stack([cos, -sin, shift * dx, sin, cos, shift * dy], dim=1).view(count, 2, 3)


def random_pairs(count, generator):
    """Places [count] in INKS_ON_PAPERS, at random."""
    return torch.randint(len(INKS_ON_PAPERS), (count,), generator=generator)


def palette_colors(pairs):
    """RGB in 0..1 [2, N, 3, 1, 1] of the inks and of the papers of `pairs` [N], places in INKS_ON_PAPERS."""
    colors = torch.tensor(list(PALETTE.values()), device=pairs.device) / 255  # [6, 3]
    places = torch.tensor(INKS_ON_PAPERS, device=pairs.device)[pairs]  # [N, 2]
    return colors[places].transpose(0, 1)[..., None, None]


def draw(scans, pairs, generator):
    """Pictures [N, 3, 64, 64] in 0..1 of scans [N, 1, 8, 8] in the colours `pairs` [N], each placed at random."""
    count = len(scans)
    placement = random_placement(count, generator).to(scans.device)
    grid = F.affine_grid(placement, [count, 1, SIZE_PX, SIZE_PX], align_corners=False)
    smooth = F.grid_sample(F.pad(scans, [1] * 4), grid * 0.8, mode="bicubic", align_corners=False)
    ramp = ((smooth - EDGE[0]) / (EDGE[1] - EDGE[0])).clamp(0, 1)
    coverage = ramp * ramp * (3 - 2 * ramp)  # [N, 1, 64, 64], 1 is ink
    ink, paper = palette_colors(pairs.to(scans.device))
    return coverage * ink + (1 - coverage) * paper


def reference_pictures():
    """The real digits as uint8 pictures [1797, 64, 64, 3], each placed and coloured at random from one fixed seed."""
    scans, _ = load_scans()
    generator = torch.Generator().manual_seed(0)
    pictures = draw(scans, random_pairs(len(scans), generator), generator)
    return (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
