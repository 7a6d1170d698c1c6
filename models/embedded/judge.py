"""What FID of an embedded model is computed with: the digit classifier's features, and the real digits as image files.

They stand in for the Inception network, which knows nothing of digits, and for folders of photographs.
"""

import hashlib

import numpy as np
from PIL import Image

from models.embedded.classifier import load_classifier
from models.embedded.digits import reference_pictures
from quant.files import atomic_folder, cache_folder


class DigitFeatures:
    """The embedded digit classifier's 64 features of an image."""

    def __init__(self, device):
        classifier = load_classifier(device)
        weights = b"".join(value.cpu().numpy().tobytes() for value in classifier.state_dict().values())
        self.name = f"digits-{hashlib.sha256(weights).hexdigest()[:8]}"  # another training, other statistics
        self.model = lambda batch: classifier.features(batch / 255)

    @staticmethod
    def resize(image):
        return np.asarray(image, dtype=np.float32)


def digit_reference_folder():
    """A folder with the real digits as PNG files, drawn on first use, and again if they are damaged."""
    pictures = reference_pictures()
    digest = hashlib.sha256(pictures.tobytes()).hexdigest()[:16]
    folder = cache_folder() / f"digits-{digest}"
    if not _holds(folder, pictures):
        with atomic_folder(folder, lambda path: _holds(path, pictures)) as new:
            for index, picture in enumerate(pictures):
                Image.fromarray(picture).save(new / f"{index:04d}.png")
    return folder


def _holds(folder, pictures):
    """Whether a folder has the PNG files of the pictures, and nothing else."""
    names = {f"{index:04d}.png" for index in range(len(pictures))}
    try:
        if {path.name for path in folder.iterdir()} != names:
            return False
        return all(map(_is_picture, (folder / name for name in sorted(names)), pictures))
    except OSError:
        return False


def _is_picture(path, picture):
    try:
        with Image.open(path) as image:
            return np.array_equal(np.asarray(image), picture)
    except Exception:  # of damaged files many types
        return False
