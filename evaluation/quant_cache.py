"""Labelled configurations: the list of rows in `quant_cache.pkl` that predictors learn from."""

import math
import re
from pathlib import Path

from errors import InputError
from quant.checked_files import is_number
from quant.files import load_pickle, save_pickle

ROW_NUMBERS = ("quantized_size", "avg_bits", "quantized_error", "FID-GT-1k", "bops")
KEYS = (*ROW_NUMBERS, "config")
CLIP_SCORE = "CLIP-score"  # a further key of rows that were labelled with --clip_score


def load(path):
    """The rows in `path`, none if it does not exist."""
    if not Path(path).exists():
        return []
    rows = load_pickle(path)
    if not isinstance(rows, list) or not all(is_row(row) for row in rows):
        raise InputError(f"{path}: not a list of labelled configurations; move it away to start anew")
    return rows


def save(rows, path):
    """Write all rows, with exactly the published keys and the CLIP score if there, in place of the old file or not at all.

    Equal rows give equal bytes, whether they were read from a file or measured just now.
    """
    save_pickle(_share_strings([{key: row[key] for key in (*KEYS, CLIP_SCORE) if key in row} for row in rows], {}), path)


def is_row(row):
    """Whether `row`, read from a file, is a labelled configuration."""
    return (
        isinstance(row, dict)
        and all(is_number(row.get(name)) for name in ROW_NUMBERS)
        and isinstance(row.get("config"), dict)
        and all(isinstance(key, str) and _is_choice(value) for key, value in row["config"].items())
    )


def _is_choice(value):
    """Whether it is a weight's [method, FP bytes, quantized bytes, error]."""
    return (
        isinstance(value, list) and len(value) == 4 and isinstance(value[0], str | None) and all(map(is_number, value[1:]))
    )


def by_fid(row):
    """Sorts rows by FID, those whose FID is not a number last."""
    return math.isnan(row["FID-GT-1k"]), row["FID-GT-1k"]


def pick_row(rows, path, row):
    """The configuration, {key: [method, ...]}, of the row that `row` names: None, `best` (lowest FID) or a number from 1."""
    if not rows or not all(is_row(r) for r in rows):
        raise InputError(f"{path}: not a list of labelled configurations")
    if row is None:
        raise InputError(f"{path}: holds {len(rows)} labelled configurations; add :best or :<number> to choose one")
    if row == "best":
        return min(rows, key=by_fid)["config"]
    if not re.fullmatch(r"[0-9]{1,9}", row) or not 1 <= int(row) <= len(rows):
        raise InputError(f"{path}:{row}: no such row; it has rows 1 to {len(rows)}, and :best")
    return rows[int(row) - 1]["config"]


def _share_strings(data, seen):
    """A copy in which equal strings are one object: pickle writes an object again only by reference."""
    if isinstance(data, dict):
        return {seen.setdefault(key, key): _share_strings(value, seen) for key, value in data.items()}
    if isinstance(data, list):
        return [_share_strings(value, seen) for value in data]
    return seen.setdefault(data, data) if isinstance(data, str) else data
