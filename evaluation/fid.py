"""Frechet Inception distance (Heusel et al., 2017) between image folders, by clean-fid (Parmar et al., 2022).

Another extractor of features may take the Inception network's place, through clean-fid's own hook for it: an object with
`name`, of what is cached; `resize`, of an image, None for clean-fid's own; and `model`, from a batch to its features.
"""

import itertools
import logging
import platform
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from cleanfid import fid as clean_fid
from cleanfid.downloads_helper import inception_url
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from torch.hub import download_url_to_file
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from errors import InputError, first_line
from evaluation.constant_images import is_constant, say_constant
from evaluation.image_folder import folder_key, image_files, read_rgb
from quant.checked_files import are_arrays, load_arrays, save_arrays
from quant.files import cache_folder

log = logging.getLogger("qua2sedimo")

INCEPTION_FILE = Path("." if platform.system() == "Windows" else "/tmp") / Path(inception_url).name  # as clean-fid has it


class InceptionFeatures:
    """clean-fid's Inception network: 2,048 features of an image; InputError if its file is damaged or cannot be fetched."""

    name = "inception"
    resize = None  # clean-fid's own, to 299 x 299

    def __init__(self, device):
        if not INCEPTION_FILE.exists():
            _fetch_inception()
        try:
            with INCEPTION_FILE.open("rb"):
                network = InceptionV3W(str(INCEPTION_FILE.parent), download=False)
        except OSError as reason:
            raise InputError(f"{INCEPTION_FILE}: cannot be read ({reason.strerror}); FID needs it") from None
        except Exception as reason:  # damaged files raise many types
            raise InputError(
                f"{INCEPTION_FILE}: not clean-fid's Inception network, or damaged ({first_line(reason)}); "
                "delete it and run again, which downloads it"
            ) from None
        self.model = network.eval().to(device)


def _fetch_inception():
    """Download the network's file, whole or not at all."""
    try:
        download_url_to_file(inception_url, str(INCEPTION_FILE))
    except (OSError, HTTPException) as reason:  # of the network, or of the disk
        raise InputError(
            f"{INCEPTION_FILE}: the Inception network, which FID needs, is not there and cannot be downloaded "
            f"({first_line(reason)}); put the file there, or try `--model_id embedded`, which needs no download"
        ) from None


def folder_features(folder, extractor, device, batch_size=64):
    """Features [N, F] of the images below `folder`, in sorted order; InputError names an unreadable one."""
    pictures = _pictures(image_files(folder, say=True), same_size=extractor.resize is not None)
    return image_features(pictures, extractor, device, batch_size)


def _pictures(files, same_size):
    """Yield the pixels of image files under a progress bar; InputError if they must be of the same size and are not."""
    first, constant, animated = None, [], 0
    for file in tqdm(files, desc="reference", unit="img"):
        picture, more_frames = read_rgb(file)
        first = picture if first is None else first
        if same_size and picture.shape != first.shape:
            sizes = [f"{width} x {height}" for height, width, _ in (picture.shape, first.shape)]
            raise InputError(f"{file}: an image cannot be used (it is {sizes[0]} pixels, {files[0]} is {sizes[1]})")
        constant.append(is_constant(picture[None])[0])
        animated += more_frames
        yield picture
    if animated:
        log.warning("reference: %d of %d images have several frames, of which only the first is used", animated, len(files))
    say_constant("reference", constant)


def image_features(images, extractor, device, batch_size=64):
    """Features [N, F] of images (uint8 [H, W, 3]): those that `folder_features` has of their PNG files."""
    resize = extractor.resize or build_resizer("clean")
    pending, features = iter(images), []
    while batch := [to_tensor(resize(image)) for image in itertools.islice(pending, batch_size)]:
        features.append(clean_fid.get_batch_features(torch.stack(batch), extractor.model, device))
    return np.concatenate(features)


def statistics(features):
    """Mean [F] and covariance [F, F] of features [N, F]."""
    return features.mean(axis=0), np.cov(features, rowvar=False)


def distance(features, reference):
    """FID between features [N, F] and the reference's (mean, covariance)."""
    return float(clean_fid.frechet_distance(*statistics(features), *reference[:2]))


KINDS = {"mean": ("f", 1), "covariance": ("f", 2), "images": ("i", 0)}  # of a Reference's arrays


class Reference(NamedTuple):
    """Statistics of a folder of real images."""

    mean: np.ndarray  # [F]
    covariance: np.ndarray  # [F, F]
    images: int  # how many there are


def reference_statistics(folder, extractor, device):
    """The Reference of a folder, computed once and cached by extractor and `folder_key`; says how many images it is."""
    path = cache_folder() / "fid" / f"{extractor.name}-{folder_key(folder)}.npz"
    reference = _cached_statistics(path)
    if reference is not None:
        image_files(folder, say=True)
    else:
        features = folder_features(folder, extractor, device)
        if len(features) < 2:
            raise InputError(f"{folder}: one image has no spread to compare with; FID needs many")
        reference = Reference(*statistics(features), len(features))
        save_arrays(reference._asdict(), path)
    log.info("reference: %d images of %s", reference.images, folder)
    return reference


def _cached_statistics(path):
    """None if there are none yet, or they are damaged, or do not say of how many images they are."""
    stored = load_arrays(path)
    if stored is None or stored.keys() != KINDS.keys() or not are_arrays(stored, KINDS):
        return None
    return Reference(stored["mean"], stored["covariance"], int(stored["images"]))
