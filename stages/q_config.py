"""What --q_config names: a configuration's file, a row of labelled results, or one method for all weights."""

import hashlib
from pathlib import Path

from errors import InputError
from evaluation.quant_cache import pick_row
from quant import config
from quant.files import load_pickle


def load(spec, slots):
    """The checked configuration that `spec` names.

    `spec` is a file `name.pkl` holding {key: method}; a row of labelled results, `quant_cache.pkl:best`
    (lowest FID) or `quant_cache.pkl:3` (the third); or `uniform:kmeans-4`.
    """
    return config.load(spec, slots, _from_file)


def check(spec, entries, family):
    """InputError if `load` is going to refuse what `spec` names, as `config.check_file` has it."""
    config.check_file(spec, entries, family.slot_rules, _from_file)


def key(spec):
    """The specification and, of a file, what is in it."""
    path = Path(str(spec).rpartition(":")[0] if ":" in str(spec) else str(spec))
    return f"{spec} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}" if path.is_file() else str(spec)


def _from_file(spec):
    path, _, row = spec.rpartition(":")
    if not path.endswith(".pkl"):
        path, row = spec, None
    content = load_pickle(path)
    if isinstance(content, list):
        content = pick_row(content, path, row)
    elif row is not None:
        raise InputError(f"{spec}: {path} holds one configuration, not labelled rows; leave out :{row}")
    return config.methods_of(content, path)
