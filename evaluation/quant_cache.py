"""Labelled configurations: the list of rows in `quant_cache.pkl` that predictors learn from."""

from pathlib import Path

from errors import InputError
from quant.config import ROW_NUMBERS, is_row
from quant.files import load_pickle, save_pickle

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


def _share_strings(data, seen):
    """A copy in which equal strings are one object: pickle writes an object again only by reference."""
    if isinstance(data, dict):
        return {seen.setdefault(key, key): _share_strings(value, seen) for key, value in data.items()}
    if isinstance(data, list):
        return [_share_strings(value, seen) for value in data]
    return seen.setdefault(data, data) if isinstance(data, str) else data
