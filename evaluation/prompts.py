"""Prompts that text-to-image models are labelled with: COCO captions, tables, lists, or lines of text."""

import functools
import hashlib
import itertools
import json
import logging
import re
from pathlib import Path

from errors import InputError, first_line
from evaluation import prompt_json, prompt_tables

log = logging.getLogger("qua2sedimo")

WAY_OUT = (
    "--prompts, or constants.py, names COCO captions (.json), a table with a column `prompt` or `caption` "
    "(.csv, .tsv, .jsonl, .json) or a text file of one prompt per line (.txt)"
)
COMMENT = re.compile(r"#+(\s|$)")  # so `#sunset over a lake` is a prompt


def load(path, count):
    """`count` prompts from a file, without surrounding whitespace.

    Captions of COCO, in its own format or Karpathy's, give the first `count`; fewer are an error. Tables and lists
    give their prompts in file order, text one per line; blank ones are skipped, and fewer are used again in turn.
    InputError names the file and what is wrong.
    """
    path = Path(path)
    try:
        prompts = _reader(path)(_read_text(path), count)
        prompts = [prompt.strip() for prompt in prompts]
    except ValueError as reason:
        raise InputError(f"{path}: {first_line(reason, 400)}; {WAY_OUT}") from None
    return list(itertools.islice(itertools.cycle(prompts), count))


def key(prompts):
    """A hash of the prompts and their order, 32 hex digits."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:32]


def _reader(path):
    """What reads a file of this name: a function of its text and the number of prompts that are needed."""
    readers = {
        "": functools.partial(_lines, path),
        ".txt": functools.partial(_lines, path),
        ".csv": prompt_tables.from_csv,
        ".tsv": prompt_tables.from_tsv,
        ".json": prompt_json.from_json,
        ".jsonl": prompt_json.from_json_lines,
        ".ndjson": prompt_json.from_json_lines,
    }
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(f"prompts are not read from {suffix} files; unpack or convert it")
    return readers[suffix]


def _read_text(path):
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except (OSError, ValueError) as reason:
        raise ValueError(f"not a readable UTF-8 text file ({first_line(reason)})") from None
    if "\0" in text:
        raise ValueError("not a readable UTF-8 text file (it holds null characters, as UTF-16 does)")
    if not text.strip():
        raise ValueError("an empty file")
    return text


def _lines(path, text, count):
    """Lines that are neither blank nor comments; ValueError if they are not those of a plain text file."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if other := _other_format(text, lines):
        raise ValueError(f"holds {other}, not a prompt per line; give it that name")
    prompts = [line for line in lines if not COMMENT.match(line)]
    if not prompts:
        raise ValueError("holds comments alone")
    if len(prompts) < len(lines):
        log.warning("%s: lines left out as comments, which begin with `# `: %d", path, len(lines) - len(prompts))
    return prompts


def _other_format(text, lines):
    """What a text that has the form of another file is, and how that would be named; None if it has not."""
    if prompt_json.is_json(text):
        return "JSON (.json)"
    if lines[0].startswith("{") and prompt_json.is_json(lines[0]):
        return "an object per line (.jsonl)"
    if prompt_tables.is_header(lines[0], "\t") or all("\t" in line for line in lines):
        return "a table (.tsv)"
    if prompt_tables.is_header(lines[0], ","):
        return "a table (.csv)"
    return None
