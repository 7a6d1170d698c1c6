"""Side files of labels: a JSON object per line, readable while a run goes on."""

import json
import math

from quant.files import atomic_write


def load(path):
    """The objects in `path`, none if it does not exist; damaged lines are left out."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [each for each in map(_parsed, lines) if isinstance(each, dict)]


def save(objects, path):
    """Write all objects in place of the old file or not at all. Numbers that are none are null."""
    with atomic_write(path) as file:
        file.write("".join(f"{json.dumps(_strict(each))}\n" for each in objects).encode())


def _strict(each):
    """What JSON can say of a dict: it has no NaN."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in each.items()}


def _parsed(line):
    try:
        return json.loads(line)
    except ValueError:
        return None
