"""Frechet Inception distance (Heusel et al., 2017) between image folders, by clean-fid (Parmar et al., 2022).

The embedded models are judged by a small digit classifier instead of the Inception network, through
clean-fid's own hook for another feature extractor.
"""

import contextlib
import hashlib
import itertools
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from cleanfid import features as clean_features
from cleanfid import fid as clean_fid
from cleanfid.resize import build_resizer
from cleanfid.utils import EXTENSIONS
from torchvision.transforms.functional import to_tensor

from errors import InputError, first_line
from evaluation.images import save_png
from models.embedded.classifier import load_classifier
from models.embedded.digits import reference_pictures
from quant.storage import atomic_write


class InceptionFeatures:
    """clean-fid's Inception network: 2,048 features of an image."""

    name = "inception"
    resize = None  # clean-fid's own, to 299 x 299

    def __init__(self, device):
        try:
            self.model = clean_features.build_feature_extractor("clean", device, use_dataparallel=False)
        except (OSError, RuntimeError) as reason:
            raise InputError(
                "the Inception weights for FID are not at /tmp/inception-2015-12-05.pt and cannot be downloaded "
                f"({reason}); put the file there, or try `--model_id embedded`, which needs no download"
            ) from None


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


def folder_features(folder, extractor, device, batch_size=64):
    """Features [N, F] of the images below `folder`, in sorted order; InputError names an unreadable one."""
    try:
        return clean_fid.get_files_features(
            image_files(folder),
            extractor.model,
            num_workers=0,
            batch_size=batch_size,
            device=device,
            custom_fn_resize=extractor.resize,
            verbose=False,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError) as reason:  # unreadable, not an image, or of another size
        raise InputError(f"{folder}: an image cannot be used ({first_line(reason)})") from None


def image_features(images, extractor, device, batch_size=64):
    """Features [N, F] of images (uint8 [H, W, 3]): those that `folder_features` has of their PNG files."""
    resize = extractor.resize or build_resizer("clean")
    pending, features = iter(images), []
    while batch := [to_tensor(resize(image)) for image in itertools.islice(pending, batch_size)]:
        features.append(clean_fid.get_batch_features(torch.stack(batch), extractor.model, device))
    return np.concatenate(features)


def image_files(folder):
    """The image files below `folder`, sorted; InputError if there are none."""
    files = sorted(str(p) for p in Path(folder).rglob("*") if p.suffix[1:].lower() in EXTENSIONS)
    if not files:
        what = "holds no images" if Path(folder).is_dir() else "no such folder"
        raise InputError(f"{folder}: {what}; reference folders are named in constants.py or by --reference")
    return files


def statistics(features):
    """Mean [F] and covariance [F, F] of features [N, F]."""
    return features.mean(axis=0), np.cov(features, rowvar=False)


def distance(features, reference):
    """FID between features [N, F] and the reference's (mean, covariance)."""
    return float(clean_fid.frechet_distance(*statistics(features), *reference))


def reference_statistics(folder, extractor, device):
    """Statistics of a reference folder, computed once and cached by extractor and `folder_key`."""
    path = cache_folder() / "fid" / f"{extractor.name}-{folder_key(folder)}.npz"
    unusable = contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile)  # none yet, or damaged
    with unusable, np.load(path, allow_pickle=False) as stored:
        return stored["mean"], stored["covariance"]
    features = folder_features(folder, extractor, device)
    if len(features) < 2:
        raise InputError(f"{folder}: one image has no spread to compare with; FID needs many")
    mean, covariance = statistics(features)
    with atomic_write(path) as file:
        np.savez(file, mean=mean, covariance=covariance)
    return mean, covariance


def cache_folder():
    """Where computed things are kept between runs: $QUA2SEDIMO_CACHE, or ~/.cache/qua2sedimo."""
    return Path(os.environ.get("QUA2SEDIMO_CACHE", Path.home() / ".cache" / "qua2sedimo"))


def digit_reference_folder():
    """A folder with the real digits as PNG files, drawn on first use."""
    pictures = reference_pictures()
    digest = hashlib.sha256(pictures.tobytes()).hexdigest()[:16]
    folder = cache_folder() / f"digits-{digest}"
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(pictures):
            save_png(picture, folder / f"{index:04d}.png")
        (folder / "complete").touch()
    return folder


def folder_key(folder, times=True):
    """A hash of the names, sizes and (`times`) modification times of the images below `folder`."""
    digest = hashlib.sha256()
    for file in image_files(folder):
        info = os.stat(file)
        digest.update(f"{os.path.relpath(file, folder)} {info.st_size} {times and info.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]
