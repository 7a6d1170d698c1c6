"""What FID of an embedded model is computed with: the digit classifier's features, and the real digits as image files.

They stand in for the Inception network, which knows nothing of digits, and for folders of photographs.
"""

import hashlib

import numpy as np

from models.embedded.classifier import load_classifier
from models.embedded.digits import reference_pictures
from quant.files import cache_folder, save_png


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
    """A folder with the real digits as PNG files, drawn on first use."""
    pictures = reference_pictures()
    digest = hashlib.sha256(pictures.tobytes()).hexdigest()[:16]
    folder = cache_folder() / f"digits-{digest}"
    complete = folder.with_name(f"{folder.name}.complete")  # beside it: in it are images alone
    if not complete.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "complete").unlink(missing_ok=True)  # where it was in earlier versions
        for index, picture in enumerate(pictures):
            save_png(picture, folder / f"{index:04d}.png")
        complete.touch()
    return folder
