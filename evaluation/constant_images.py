"""Images of one constant colour: what a safety checker, or a broken configuration, leaves."""

import logging

import numpy as np

log = logging.getLogger("qua2sedimo")


def is_constant(images, broken=False):
    """Which images (uint8 [N, H, W, 3]) are of one constant colour, those that are `broken` (bool [N]) aside: bool [N]."""
    return (images == images[:, :1, :1]).all(axis=(1, 2, 3)) & ~np.asarray(broken)


def say_constant(name, constant):
    """Log how many images are of one constant colour (`constant`, bool [N]), if any: a blackened image is."""
    if count := int(np.sum(constant)):
        log.warning("%s: %d of %d images are of one constant colour", name, count, len(constant))
