"""Side files of labels: a JSON object of numbers per line, readable while a run goes on, each with its digest."""

import json
import math

from quant.checked_files import from_json, is_number, with_digest
from quant.files import atomic_write


def load(path, *needed):
    """The objects in `path` that have the whole numbers `needed`, none if it does not exist; damaged lines are left out."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    return [each for each in map(from_json, lines) if each is not None and _is_sound(each, needed)]


def _is_sound(each, needed):
    numbers = all(value is None or is_number(value) for value in each.values())
    return numbers and all(isinstance(each.get(name), int) for name in needed)


def save(objects, path):
    """Write all objects in place of the old file or not at all. Numbers that are none are null."""
    with atomic_write(path) as file:
        file.write("".join(f"{json.dumps(with_digest(_strict(each)))}\n" for each in objects).encode())


def _strict(each):
    """What JSON can say of a dict: it has no NaN."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in each.items()}
