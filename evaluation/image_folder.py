"""Folders of images as people have them: which files count, and the pixels of each."""

import collections
import hashlib
import logging
import os
from pathlib import Path

import numpy as np
from cleanfid.utils import EXTENSIONS
from PIL import Image

from errors import InputError, first_line

log = logging.getLogger("qua2sedimo")

# What clean-fid counts, but for arrays, and more that Pillow reads.
SUFFIXES = {f".{name.lower()}" for name in EXTENSIONS - {"npy"}} | {
    *(".apng", ".avif", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".pbm", ".pfm", ".pnm"),
}
LITTER = ("__MACOSX", "@eaDir")  # folders that archivers and network drives leave, with thumbnails and the like
WAY_OUT = "reference folders are named in constants.py or by --reference"


def image_files(folder, say=False):
    """The images below `folder`, through links too, sorted; InputError if there are none, or a link leads nowhere.

    A file counts by its suffix. One that is reached in two ways counts once, under its own name rather than a link's.
    With `say` the log tells what was left out.
    """
    if not Path(folder).is_dir():
        what = "is a file, not a folder of images" if Path(folder).exists() else "no such folder"
        raise InputError(f"{folder}: {what}; {WAY_OUT}")
    try:
        files, left_out = _walk(str(Path(folder)))
    except OSError as reason:
        raise InputError(f"{reason.filename or folder}: cannot be looked into ({reason.strerror})") from None
    others = ", ".join(f"{count} {what}" for what, count in left_out.most_common())
    if not files:
        raise InputError(f"{folder}: holds no images{f' (not counted: {others})' if others else ''}; {WAY_OUT}")
    if say and others:
        log.warning("%s: not counted as images: %s", folder, others)
    return sorted(files)


def folder_key(folder, times=True):
    """A hash of the names, sizes and (`times`) modification times of the images below `folder`."""
    digest = hashlib.sha256()
    for file in image_files(folder):
        info = os.stat(file)
        line = f"{os.path.relpath(file, folder)} {info.st_size} {times and info.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))  # names need not be UTF-8
    return digest.hexdigest()[:32]


def _walk(folder):
    """Paths of images below `folder`, and a Counter of what else is there.

    Linked folders are walked once no others are left, linked files come last: links are never preferred.
    """
    files, links, left_out = {}, [], collections.Counter()  # files: {real path: path}
    seen, waiting = set(), collections.deque([folder])
    while waiting:
        place = waiting.popleft()
        real = os.path.realpath(place)
        if real in seen:
            left_out["linked twice"] += 1
            continue
        seen.add(real)
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            if entry.is_dir() and not _is_litter(entry):
                if not entry.is_symlink():
                    waiting.appendleft(entry.path)
                elif Path(os.path.realpath(entry.path)) in (Path(real), *Path(real).parents):
                    left_out["linked to a folder around it"] += 1
                else:
                    waiting.append(entry.path)
            elif why := _why_left_out(entry):
                left_out[why] += 1
            elif entry.is_symlink():
                links.append(entry.path)
            else:
                files[os.path.join(real, entry.name)] = entry.path
    for link in links:
        if files.setdefault(os.path.realpath(link), link) != link:
            left_out["linked twice"] += 1
    return files.values(), left_out


def _is_litter(entry):
    return entry.name.startswith(".") or entry.name in LITTER


def _why_left_out(entry):
    """What a file is that does not count as an image; None if it does. InputError for a link to nothing."""
    if _is_litter(entry):
        return "hidden"
    if not os.path.exists(entry.path):
        target = os.readlink(entry.path)
        raise InputError(f"{entry.path}: a link to {target}, which is not there; mend the link or remove it")
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in SUFFIXES and entry.is_file():
        return None
    return f"of {suffix}" if suffix else "without a suffix"


def read_rgb(path):
    """The pixels of an image file, uint8 [H, W, 3], and whether further frames follow, which are not read.

    8-bit files without transparency give what clean-fid reads, so turns in EXIF are not made. Deeper gray values
    keep their upper 8 bits, what is transparent lies on white. InputError names a file that is no image, or damaged.
    """
    try:
        if not os.path.getsize(path):
            raise ValueError("an empty file")
        with Image.open(path) as image:
            image.load()
            more = image.format != "MPO" and getattr(image, "is_animated", False)  # cameras add previews as MPO
            if image.mode.startswith(("I", "F")):
                return np.repeat(_eight_bits(image)[..., None], 3, axis=2), more
            return np.asarray(_opaque(image)), more
    except Exception as reason:  # damaged files raise many types
        raise InputError(f"{path}: an image cannot be used ({first_line(reason)}); mend the file or remove it") from None


def _opaque(image):
    """An RGB picture of one with 8 bits a channel, on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _eight_bits(image):
    """Gray values, uint8 [H, W], of a picture with more than 8 bits; ValueError if their scale is not known."""
    values = np.asarray(image)
    if image.mode == "F":
        gray = _eight_bits_of_floats(values)
    elif values.min() < 0 or values.max() >= 2**16:
        raise ValueError(f"gray values from {values.min()} to {values.max()}, which are not 16 bits")
    else:
        holds_bytes = image.format == "TIFF" and image.mode == "I" and values.max() < 2**8  # widened, not scaled
        gray = values if holds_bytes else values >> 8
    gray = gray.astype(np.uint8)
    if "transparency" in image.info:
        gray[values == image.info["transparency"]] = 255
    return gray


def _eight_bits_of_floats(values):
    """Floats from 0 to 1, or whole numbers from 0 to 255."""
    if values.min() >= 0 and values.max() <= 1:
        return np.round(values * 255)
    if values.min() >= 0 and values.max() <= 255 and (values == np.round(values)).all():
        return values
    raise ValueError("gray values that are neither from 0 to 1 nor whole numbers from 0 to 255")
