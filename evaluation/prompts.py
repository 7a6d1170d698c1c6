"""Prompts that text-to-image models are labelled with: COCO captions, or any text file."""

import hashlib
import itertools
import json
from pathlib import Path

from errors import InputError, first_line

WAY_OUT = "name COCO captions (.json) or a text file of one prompt per line by --prompts or in constants.py"


def load(path, count):
    """`count` prompts from a file, without surrounding whitespace.

    A `.json` file holds COCO captions and gives its first `count`, as published; fewer are an error. Any
    other file is UTF-8 text with one prompt per line, blank lines skipped; fewer are used again in turn.
    InputError names the file and what is wrong.
    """
    path = Path(path)
    text = _read_text(path)
    if path.suffix.lower() == ".json":
        return _coco_captions(path, text, count)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return list(itertools.islice(itertools.cycle(lines), count))


def key(prompts):
    """A hash of the prompts and their order, 32 hex digits."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:32]


def _read_text(path):
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {WAY_OUT}") from None
    except (OSError, ValueError) as reason:
        raise InputError(f"{path}: not a readable UTF-8 text file ({first_line(reason)}); {WAY_OUT}") from None
    if not text.strip():
        raise InputError(f"{path}: an empty file; {WAY_OUT}")
    return text


def _coco_captions(path, text, count):
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise InputError(f"{path}: not readable JSON ({first_line(reason)}); {WAY_OUT}") from None
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise InputError(f'{path}: has no list "annotations", as COCO captions files have; {WAY_OUT}')
    if len(annotations) < count:
        raise InputError(f"{path}: holds {len(annotations)} captions and {count} are needed; lower --n_imgs, or {WAY_OUT}")
    return [_caption(path, place, annotation) for place, annotation in enumerate(annotations[:count])]


def _caption(path, place, annotation):
    caption = annotation.get("caption") if isinstance(annotation, dict) else None
    if not isinstance(caption, str):
        raise InputError(f'{path}: annotations[{place}] has no text "caption", as COCO captions files have; {WAY_OUT}')
    return caption.strip()
