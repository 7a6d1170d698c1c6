"""Pictures of handwritten digits: scikit-learn's 8x8 scans drawn as ink on paper with a margin."""

import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

SIZE_PX = 64
INK = (24, 32, 96)  # dark blue
PAPER = (250, 247, 238)  # warm white
DIGIT_SHARE = 0.76  # side of the 8x8 scan over the side of the picture; the rest is margin
EDGE = (0.34, 0.72)  # scan intensity at which ink begins and is full: makes strokes crisp


def load_scans(split="all"):
    """The scans [N, 1, 8, 8] in 0..1 and their labels [N].

    `split` is "all" (1,797), "train" (four of every five) or "test" (every fifth).
    """
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


def draw(scans, generator=None):
    """Pictures [N, 3, 64, 64] in 0..1 of scans [N, 1, 8, 8]; with a generator each is placed at random."""
    count = len(scans)
    if generator is None:
        placement = torch.eye(2, 3).repeat(count, 1, 1) / DIGIT_SHARE
    else:
        placement = random_placement(count, generator)
    grid = F.affine_grid(placement.to(scans.device), [count, 1, SIZE_PX, SIZE_PX], align_corners=False)
    smooth = F.grid_sample(F.pad(scans, [1] * 4), grid * 0.8, mode="bicubic", align_corners=False)
    ramp = ((smooth - EDGE[0]) / (EDGE[1] - EDGE[0])).clamp(0, 1)
    ink = ramp * ramp * (3 - 2 * ramp)  # [N, 1, 64, 64], 1 is ink
    color = torch.tensor([INK, PAPER], device=scans.device).view(2, 1, 3, 1, 1) / 255
    return ink * color[0] + (1 - ink) * color[1]


def reference_pictures():
    """The real digits as uint8 pictures [1797, 64, 64, 3], each placed at random from one fixed seed."""
    scans, _ = load_scans()
    pictures = draw(scans, torch.Generator().manual_seed(0))
    return (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
