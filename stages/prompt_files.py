"""Prompts that text-to-image models are labelled with: COCO captions, tables, lists, or lines of text."""

import functools
import hashlib
import itertools
import json
import logging
import re
from pathlib import Path

from errors import InputError, first_line
from stages.prompt_json import from_json, from_json_lines
from stages.prompt_tables import from_csv, from_tsv, is_header

log = logging.getLogger("qua2sedimo")

WAY_OUT = (
    "--prompts, or constants.py, names COCO captions (.json), a table with a column `prompt` or `caption` "
    "(.csv, .tsv, .jsonl, .json) or a text file of one prompt per line (.txt)"
)
COMMENT = re.compile(r"#+(\s|$)")  # so `#sunset over a lake` is a prompt
JSON_START = re.compile(r'\{\s*"|\[\s*["{]')
PAGE_START = re.compile(r"<(!doctype|html|\?xml)", re.IGNORECASE)


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
        ".csv": from_csv,
        ".tsv": from_tsv,
        ".json": from_json,
        ".jsonl": from_json_lines,
        ".ndjson": from_json_lines,
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


def _lines(path, text, _count):
    """Lines that are neither blank nor comments; ValueError if they are those of another kind of file."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if other := _other_kind(lines):
        raise ValueError(other)
    prompts = [line for line in lines if not COMMENT.match(line)]
    if not prompts:
        raise ValueError("holds comments alone")
    if len(prompts) < len(lines):
        log.warning("%s: lines left out as comments, which begin with `# `: %d", path, len(lines) - len(prompts))
    return prompts


def _other_kind(lines):
    """What a text of such lines is in truth, and the way out; None if nothing speaks against a prompt per line."""
    if JSON_START.match("\n".join(lines[:2])):
        return "holds JSON; name it .json, or .jsonl if each line is an object"
    if is_header(lines[0], "\t") or all("\t" in line for line in lines):
        return "holds a table; name it .tsv"
    if is_header(lines[0], ","):
        return "holds a table; name it .csv"
    if PAGE_START.match(lines[0]):
        return "holds a web page"
    if lines[0].startswith("version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull`"
    return None
