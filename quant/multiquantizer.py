"""The multiquantizer: quantizers of every weight of a denoiser, fitted once: the search space's six, or others.

The file holds scales, zero points and centroids, never quantized weights; codes are recomputed from
the float weights. It is a plain dict that loads with `torch.load(weights_only=True)`:

    format, version, precision_bits
    family: the model's name
    prefix: of the module paths if only they are in it, else ""
    slots: {file key: {shape, fingerprint, errors: {word: float}, parameters: {word: {name: tensor}}}}
    digests: {file key: of the key and its entry}
    digest: of all these but the slots

Tied weights are stored once, under the key of the slot that they share. The idea is Mills et al.'s (2025).
"""

import contextlib
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from errors import InputError, named
from quant import published, registry
from quant.digests import digest_of
from quant.entries import fingerprint, has_words, is_entry
from quant.file_keys import by_file_key, by_weight
from quant.files import load_checkpoint, save_checkpoint
from quant.memory import trim
from quant.model import QuantizedModel
from quant.slots import free_keys, in_part, move_boundaries

FORMAT = "qua2sedimo multiquantizer"
VERSION = 2  # 1 had no digests
CHECKPOINT_SECONDS = 20


class DamagedFile(InputError):
    """A multiquantizer that is not as it was written, or was written by another version: of no use, whatever it is of."""


def build(model, path, prefix="", overwrite=False, words=registry.SEARCH_SPACE):
    """Fit quantizers of `words` to all weights of a QuantizedModel, or those of modules in `prefix`, and write `path`.

    What `path` holds of these weights already stays in it, other words too, unless it is to `overwrite`. This is
    `model.fit` in a form that goes on where it was cut off, from its last checkpoint. Returns the entries that the file
    has. InputError if `path`, or that checkpoint, holds anything but quantizers of these weights, unless it may
    `overwrite` it.
    """
    partial = Path(f"{path}.partial")
    if not overwrite and not holds(path, model, prefix, words) and Path(path).exists():
        model.entries = model.entries | _own_entries(load_checkpoint(path), path, model)
    model.entries = model.entries | _resume(partial, model, overwrite)
    keys = _keys_in(model, prefix)
    device = model.weight(next(iter(model.slots))).device
    registry.fit(torch.eye(2, 4, dtype=model.dtype, device=device))  # compiles the kernels: the time left is right at once
    try:
        _fit(model, keys, words, lambda: save(model, partial, prefix))
        if not overwrite:
            holds(path, model, prefix)  # another build may have put its own there meanwhile
    except BaseException:  # an interrupt too
        save(model, partial, prefix)
        raise
    save(model, path, prefix)
    partial.unlink(missing_ok=True)
    return {key: model.entries[key] for key in keys}


def _fit(model, keys, words, checkpoint):
    """Fit what the model's weights `keys` lack of the words; calls `checkpoint` now and then."""
    saved = time.monotonic()
    sizes = {key: model.slots[key].shape.numel() for key in keys}
    with tqdm(total=sum(sizes.values()), unit=" weights", unit_scale=True) as progress:
        for number, key in enumerate(keys, start=1):
            progress.set_postfix_str(f"layer {number}/{len(keys)}", refresh=False)
            model.fit_weight(key, words)
            progress.update(sizes[key])
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                checkpoint()
                trim()
                saved = time.monotonic()


def _keys_in(model, prefix):
    """Keys of the weights that a file of the modules in `prefix` has."""
    return [key for key in free_keys(model.slots) if in_part(model.slots[key], prefix)]


def _resume(partial, model, overwrite):
    """The entries of a build that was cut off; none if there is no such, or its file is damaged."""
    if not partial.exists():
        return {}
    try:
        content = load_checkpoint(partial)
    except InputError as reason:
        tqdm.write(f"starting anew: {reason}")
        return {}
    try:
        with _ways_out():
            entries = _own_entries(content, partial, model)
    except DamagedFile as reason:
        tqdm.write(f"starting anew: {reason}")
        return {}
    except InputError:
        if overwrite:
            return {}
        raise
    tqdm.write(f"going on from {partial}: {len(entries)} layers are done")
    return entries


def holds(path, model, prefix="", words=registry.SEARCH_SPACE):
    """Whether `path` holds quantizers of `words` of all the model's weights, or of modules in `prefix`.

    InputError if it holds anything else, the quantizers of other weights above all; nothing, or some of these, is False.
    """
    if not Path(path).exists():
        return False
    with _ways_out():
        entries = _own_entries(load_checkpoint(path), path, model)
    return all(key in entries and has_words(entries[key], words) for key in _keys_in(model, prefix))


def check_replaceable(path, name):
    """InputError if a file at `path` is no multiquantizer of a model of that name, whatever its weights."""
    if Path(path).exists():
        with _ways_out():
            _read(load_checkpoint(path), path, name)


def _own_entries(content, path, model):
    """The entries {key: entry} of a file's content; InputError unless all were fitted to this model's weights."""
    entries = _read(content, path, model.name)
    own = by_weight(entries, model.slots)
    if len(own) < len(entries):
        known = by_file_key(own, model.slots)
        foreign = next(key for key in entries if key not in known)
        raise InputError(f"{path}: has {named(foreign)}, which this denoiser has not")
    check_fits(own, path, model)
    return own


@contextlib.contextmanager
def _ways_out():
    """What is wrong with a file that is to be written anew is said together with what to do."""
    try:
        yield
    except InputError as reason:
        raise type(reason)(f"{reason}; --overwrite replaces it, --output names another place") from None


def save(model, path, prefix=""):
    """Write what is fitted of a model's weights, or of those of modules in `prefix`."""
    entries = {key: model.entries[key] for key in _keys_in(model, prefix) if key in model.entries}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "family": model.name,
        "precision_bits": model.precision_bits,
        "prefix": prefix,
        "slots": _with_interned_keys(by_file_key(entries, model.slots)),
    }
    save_checkpoint(with_digests(content), path)


def with_digests(content):
    """The content of a file with digests of what is in it."""
    digests = {key: digest_of(key, entry) for key, entry in content["slots"].items()}
    told = {name: content[name] for name in ("format", "version", "family", "precision_bits", "prefix")}
    return told | {"slots": content["slots"], "digests": digests, "digest": digest_of(told, digests)}


def _with_interned_keys(entries):
    """The same with equal keys being one object, which pickle writes once: equal entries make equal files."""
    if not isinstance(entries, dict):
        return entries
    return {sys.intern(key): _with_interned_keys(value) for key, value in entries.items()}


def load(path, model):
    """The model with the entries of the multiquantizer at `path`, made for its weights; `model` stays as it is.

    Weights are split where the file splits them. A file in the published format is converted. Raises InputError for a
    missing, damaged or foreign file and, naming the layer, for one made from other weights.
    """
    content = load_checkpoint(path)
    if published.is_published(content):
        model = _with(model, move_boundaries(model.slots, by_weight(published.shapes(content), model.slots)))
        published.check_keys(content, path, model)
        return _with(model, model.slots, published.convert(content, path, model))
    entries = _read(content, path, model.name)
    check_complete(entries, path, model.slots)
    entries = by_weight(entries, model.slots)
    model = _with(model, move_boundaries(model.slots, {key: entry["shape"] for key, entry in entries.items()}), entries)
    check_fits(entries, path, model)
    return model


def _with(model, slots, entries=None):
    return QuantizedModel.of_slots(model.module, slots, model.dtype, entries, model.name)


def read(path, name):
    """The entries {file key: entry} in a file of a model of that name, of whatever weights.

    None of the published format, which needs the weights to be read.
    """
    content = load_checkpoint(path, lazily=True)
    return None if published.is_published(content) else _read(content, path, name)


def check_complete(entries, path, slots):
    """Raise InputError, naming the first, unless the {file key: entry} are those of the slots, no more and no fewer."""
    keys = [slots[key].file_key for key in free_keys(slots)]
    missing = [key for key in keys if key not in entries]
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(keys)} layers are missing, first {missing[0]}")
    known = {slot.file_key for slot in slots.values()}
    unknown = [key for key in entries if key not in known]
    if unknown:
        raise InputError(f"{path}: {len(unknown)} keys are not of this denoiser, first {named(unknown[0])}")


def check_fits(entries, path, model):
    """Raise InputError, naming the first layer that differs, unless entries were fitted to exactly the model's weights."""
    for key, entry in entries.items():
        if entry["fingerprint"] != fingerprint(model.weight(key)):
            raise InputError(f"{path}: made from other weights than this model's (layer {key.path})")


def part_path(path, prefix):
    """Where the part `prefix` of the multiquantizer at `path` stands: sdxl_mq.pt, sdxl_conv_in_mq.pt."""
    return path.with_name(f"{path.stem.removesuffix('_mq')}_{prefix}_mq.pt")


def stitch(model, path, prefixes, overwrite=False):
    """Write `path` from the files of all parts `prefixes` of a model; InputError if they do not make one whole.

    Parts that overlap, miss layers or come from other weights are refused, the file and layer named; and so is a file at
    `path` of anything but these weights, unless it may `overwrite` it. Returns the entries that the file has.
    """
    if not overwrite:
        holds(path, model)
    entries, origin = {}, {}
    for prefix in prefixes:
        file = part_path(path, prefix)
        if not file.is_file():
            raise InputError(f"{file}: no such part; make it with --prefix {prefix}")
        part = _read(load_checkpoint(file), file, model.name)
        for key in part:
            if key in origin:
                raise InputError(f"{file}: overlaps {origin[key]}, both have {key}; make them anew with --prefix")
        own = {k: slot for k, slot in model.slots.items() if in_part(slot, prefix) or slot.file_key in part}
        check_complete(part, file, own)
        origin |= dict.fromkeys(part, file)
        part = by_weight(part, model.slots)
        check_fits(part, file, model)
        entries |= part
    model.entries = {key: entries[key] for key in free_keys(model.slots)}
    save(model, path)
    return model.entries


def _read(content, path, name):
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: not a multiquantizer")
    version = content.get("version")
    if not isinstance(version, int) or version != VERSION:
        raise DamagedFile(f"{path}: multiquantizer version {named(version)}, this program reads {VERSION}; make it again")
    if content.get("family") != name:
        raise InputError(f"{path}: a multiquantizer of {named(content.get('family'))}, not of {name}")
    entries = content.get("slots")
    damaged = [key for key, entry in entries.items() if not is_entry(entry)] if isinstance(entries, dict) else ["slots"]
    damaged = damaged or _changed(content)
    if damaged:
        raise DamagedFile(f"{path}: damaged multiquantizer ({named(damaged[0])}); make it again")
    return entries


def _changed(content):
    """What of a file is not as it was written: keys of entries, or else its head."""
    try:
        right = with_digests(content)
    except (KeyError, ValueError, RuntimeError):  # a name that lacks, or what has no digest
        return ["its head"]
    told = content.get("digests")
    if isinstance(told, dict):
        changed = [key for key, digest in right["digests"].items() if told.get(key) != digest]
        if changed:
            return changed
    same = content.keys() == right.keys() and told == right["digests"] and content["digest"] == right["digest"]
    return [] if same else ["its head"]
