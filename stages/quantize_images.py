"""The pictures before and after that quantize.py draws: one at a time, from noise that depends on their number alone."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from errors import InputError, first_line
from evaluation.contact_sheet import contact_sheet
from models.any_pipeline import call_arguments, takes_words, without_bars
from models.drawing import noise_generators
from quant.files import save_png, save_text
from stages.pictures import is_whole

SETTINGS = "settings.json"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def prompts_of(found_class, chosen, count, classes):
    """What `count` pictures show: the `chosen` in turn, by default a sentence or class numbers spread over all."""
    if takes_words(found_class):
        chosen = chosen or ["a lion riding a bike in Paris"]
        return [chosen[number % len(chosen)] for number in range(count)]
    if not chosen:
        return [number % classes for number in range(count)]
    try:
        numbers = [int(text) for text in chosen]
    except ValueError as reason:
        raise InputError(f"--prompt: {found_class.__name__} draws classes, so give their numbers ({reason})") from None
    for number in numbers:
        if not 0 <= number < classes:
            raise InputError(f"--prompt {number}: the model has classes 0 to {classes - 1}")
    return [numbers[index % len(numbers)] for index in range(count)]


def opened(name, value):
    """The value of the argument `name` of --call: a picture where it is the name of a picture's file."""
    if not isinstance(value, str) or Path(value).suffix.lower() not in PICTURES:
        return value
    try:
        return Image.open(value).convert("RGB")
    except Exception as reason:  # as many types as there are formats
        raise InputError(f"--call {name}={value}: cannot be read as a picture ({first_line(reason)})") from None


class Wanted:
    """What is drawn: prompts, and how the pipeline is called for each."""

    def __init__(self, found_class, prompts, args):
        self.found_class, self.prompts, self.args = found_class, prompts, args
        self.more = {name: opened(name, value) for name, value in args.call}

    def call(self, number, **changes):
        """Arguments of the pipeline's call for a picture."""
        args = self.args
        more = self.more | changes
        call = call_arguments(self.found_class, self.prompts[number], args.steps, args.res, more)
        return call | {"generator": noise_generators(args.seed, [number])}

    @property
    def settings(self):
        """What a picture depends on beside the weights, as JSON."""
        args = self.args
        told = {"prompts": self.prompts, "steps": args.steps, "res": args.res, "seed": args.seed, "call": self._call_told()}
        return json.dumps(told, sort_keys=True)

    def _call_told(self):
        """The arguments of --call {name: value}, pictures by their contents."""
        return {name: fingerprint(value) if isinstance(value, Image.Image) else value for name, value in self.more.items()}


def fingerprint(picture):
    return f"picture {hashlib.sha256(picture.tobytes()).hexdigest()[:8]}"


def draw_missing(pipeline, wanted, folder, title, settings):
    """The paths of the pictures in `folder`, those that are missing drawn; all anew if they are of other `settings`.

    InputError if what the pipeline makes is no picture, or not made of numbers.
    """
    paths = prepared(folder, len(wanted.prompts), settings)
    missing = [number for number, path in enumerate(paths) if not is_whole(path)]
    with without_bars(pipeline), torch.no_grad():
        for number in tqdm(missing, desc=title, unit="img", leave=False):
            save_png(picture(pipeline, pipeline(**wanted.call(number))), paths[number])
    return paths


def prepared(folder, count, settings):
    """The paths of a folder's pictures, which is emptied if they were drawn by other settings."""
    if not (folder / SETTINGS).is_file() or (folder / SETTINGS).read_bytes() != settings.encode():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_text(settings, folder / SETTINGS)
    return [folder / f"{number:03d}.png" for number in range(count)]


def all_there(folder, count, settings):
    """Whether nothing is to be drawn."""
    return all(is_whole(path) for path in prepared(folder, count, settings))


def picture(pipeline, output):
    """The picture, or a video's first, uint8 [H, W, 3], of what a pipeline returned."""
    made = next((getattr(output, name) for name in ("images", "frames") if hasattr(output, name)), None)
    if made is None:
        raise InputError(f"{type(pipeline).__name__}: makes no pictures; --n_imgs 0 leaves them out")
    while not hasattr(made, "shape") and isinstance(made, list | tuple):
        made = made[0]  # a list of Pillow's pictures, or of frames
    values = np.asarray(made)
    while values.ndim > 3:
        values = values[0]
    if values.ndim == 2:
        values = np.repeat(values[:, :, None], 3, axis=2)
    if values.dtype == np.uint8:
        return values[:, :, :3]
    if not np.isfinite(values).all():
        raise InputError(f"{type(pipeline).__name__}: draws values that are not numbers; try --dtype float32")
    return (values.clip(0, 1) * 255).round().astype(np.uint8)[:, :, :3]


def sheet_of(rows, path):
    """Write the contact sheet of `rows`, a list of (caption, paths)."""
    save_png(contact_sheet(rows), path)
