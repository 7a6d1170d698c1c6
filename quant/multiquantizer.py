"""The multiquantizer: quantizers of every weight of a denoiser, fitted once: the search space's six, or others.

The file holds scales, zero points and centroids, never quantized weights; codes are recomputed from
the float weights. It is a plain dict that loads with `torch.load(weights_only=True)`:

    format, version, family, precision_bits
    prefix: of the module paths if only they are in it, else ""
    slots: {key: {shape, fingerprint, errors: {word: float}, parameters: {word: {name: tensor}}}}

Tied weights are stored once, under the key of the slot that they share. The idea is Mills et al.'s (2025).
"""

import contextlib
import hashlib
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from errors import InputError
from quant import published, registry
from quant.entries import fingerprint, fit_entry, has_words, is_entry
from quant.files import atomic_write, load_checkpoint
from quant.memory import trim
from quant.model import QuantizedModel
from quant.slots import find_slots, free_keys, in_part, move_boundaries

FORMAT = "qua2sedimo multiquantizer"
VERSION = 1
CHECKPOINT_SECONDS = 20


def slot_weight(denoiser, slot, family):
    """The slot's float weight in the family's precision, which is what quantizers are fitted to."""
    return slot.part_of(denoiser.get_submodule(slot.module_path).weight.detach()).to(family.dtype)


def build(denoiser, family, path, prefix="", overwrite=False):
    """Fit all slots, or those of modules in `prefix`, a layer at a time, and write `path`.

    A build that was cut off goes on where its last checkpoint stands. InputError if `path`, or that checkpoint, holds
    anything but quantizers of these weights, unless it may `overwrite` it.
    """
    slots = find_slots(denoiser, family.slot_rules)
    check_ties(denoiser, slots, family)
    partial = Path(f"{path}.partial")
    if not overwrite:
        holds(path, denoiser, family, prefix)
    entries = _resume(partial, denoiser, slots, family, overwrite)
    keys = [key for key in free_keys(slots) if in_part(slots[key], prefix)]
    # Compiles the kernels, so that the time left is right from the start.
    registry.fit(torch.eye(2, 4, dtype=family.dtype, device=denoiser.device))
    try:
        _fit_slots(
            denoiser, family, {key: slots[key] for key in keys}, entries, lambda: save(entries, family, partial, prefix)
        )
        if not overwrite:
            holds(path, denoiser, family, prefix)  # another build may have put its own there meanwhile
    except BaseException:  # an interrupt too
        save(entries, family, partial, prefix)
        raise
    entries = {key: entries[key] for key in keys}
    save(entries, family, path, prefix)
    partial.unlink(missing_ok=True)
    return entries


def _fit_slots(denoiser, family, slots, entries, checkpoint):
    """Add what is missing of the slots to `entries`; calls `checkpoint` now and then."""
    saved = time.monotonic()
    with tqdm(total=sum(slot.shape.numel() for slot in slots.values()), unit=" weights", unit_scale=True) as progress:
        for number, (key, slot) in enumerate(slots.items(), start=1):
            progress.set_postfix_str(f"layer {number}/{len(slots)}", refresh=False)
            weight = slot_weight(denoiser, slot, family)
            own = entries.get(key)
            if own is None or own["fingerprint"] != fingerprint(weight) or not has_words(own):
                try:
                    entries[key] = fit_entry(weight)
                except ValueError as reason:
                    raise InputError(f"{slot.module_path}: {reason}") from None
            progress.update(weight.numel())
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                checkpoint()
                trim()
                saved = time.monotonic()


def check_ties(denoiser, slots, family):
    """Raise InputError where weights that the family ties are not the same weights."""
    for slot in slots.values():
        if slot.tie != slot.key:
            shared = slot_weight(denoiser, slots[slot.tie], family)
            if not torch.equal(slot_weight(denoiser, slot, family), shared):
                raise InputError(
                    f"{slot.module_path}: its weights differ from {slots[slot.tie].module_path}, which {family.title} shares"
                )


def _resume(partial, denoiser, slots, family, overwrite):
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
            entries = _own_entries(content, partial, denoiser, slots, family)
    except InputError:
        if overwrite:
            return {}
        raise
    tqdm.write(f"going on from {partial}: {len(entries)} layers are done")
    return entries


def holds(path, denoiser, family, prefix=""):
    """Whether `path` holds the search space's quantizers of all these weights, or of modules in `prefix`.

    InputError if it holds anything else, the quantizers of other weights above all; nothing, or some of these, is False.
    """
    if not Path(path).exists():
        return False
    slots = find_slots(denoiser, family.slot_rules)
    with _ways_out():
        entries = _own_entries(load_checkpoint(path), path, denoiser, slots, family)
    wanted = {key for key in free_keys(slots) if in_part(slots[key], prefix)}
    return wanted <= entries.keys() and all(has_words(entries[key]) for key in wanted)


def check_replaceable(path, family):
    """InputError if a file at `path` is no multiquantizer of the family, whatever its weights."""
    if Path(path).exists():
        with _ways_out():
            _read(load_checkpoint(path), path, family)


def _own_entries(content, path, denoiser, slots, family):
    """The entries of a file's content; InputError unless all were fitted to this denoiser's weights."""
    entries = _read(content, path, family)
    foreign = next((key for key in entries if key not in slots), None)
    if foreign is not None:
        raise InputError(f"{path}: has {foreign}, which this denoiser has not")
    misfit = _misfit(entries, denoiser, slots, family)
    if misfit is not None:
        raise InputError(f"{path}: made from other weights than this model's (layer {misfit.module_path})")
    return entries


@contextlib.contextmanager
def _ways_out():
    """What is wrong with a file that is to be written anew is said together with what to do."""
    try:
        yield
    except InputError as reason:
        raise InputError(f"{reason}; --overwrite replaces it, --output names another place") from None


def save(entries, family, path, prefix=""):
    content = {
        "format": FORMAT,
        "version": VERSION,
        "family": family.name,
        "precision_bits": family.precision_bits,
        "prefix": prefix,
        "slots": _with_interned_keys(entries),
    }
    with atomic_write(path) as file:
        torch.save(content, file)


def _with_interned_keys(entries):
    """The same with equal keys being one object, which pickle writes once: equal entries make equal files."""
    if not isinstance(entries, dict):
        return entries
    return {sys.intern(key): _with_interned_keys(value) for key, value in entries.items()}


def load(path, denoiser, family):
    """The multiquantizer at `path`, made for this denoiser's weights: (slots, entries {key: entry}).

    The slots are the denoiser's, split where the file splits them. A file in the published format is
    converted. Raises InputError for a missing, damaged or foreign file and, naming the layer, for one
    made from other weights.
    """
    check_exists(path, family)
    content = load_checkpoint(path)
    slots = find_slots(denoiser, family.slot_rules)
    check_ties(denoiser, slots, family)
    if published.is_published(content):
        slots = move_boundaries(slots, published.shapes(content))
        published.check_keys(content, path, slots, family)
        weights = {key: slot_weight(denoiser, slots[key], family) for key in free_keys(slots)}
        return slots, published.convert(content, path, weights)
    entries = _read(content, path, family)
    slots = move_boundaries(slots, {key: entry["shape"] for key, entry in entries.items()})
    check_complete(entries, path, slots)
    check_fits(entries, path, denoiser, slots, family)
    return slots, entries


def load_model(path, denoiser, family):
    """The denoiser as a QuantizedModel with the multiquantizer at `path`; see `load`."""
    slots, entries = load(path, denoiser, family)
    return QuantizedModel.of_slots(denoiser, slots, family.dtype, entries)


def read(path, family):
    """The entries in a file, of whatever weights; None of the published format, which needs the weights to be read."""
    check_exists(path, family)
    content = load_checkpoint(path, lazily=True)
    return None if published.is_published(content) else _read(content, path, family)


def check_exists(path, family):
    if not Path(path).is_file():
        raise InputError(
            f"{path}: no such multiquantizer; make it with `python scripts/{family.name}_multiquantizer.py` "
            "(and the same --model_id), or name another with --multi_chkpt"
        )


def file_key(path, family):
    """A hash of the file's bytes."""
    check_exists(path, family)
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def check_complete(entries, path, slots):
    """Raise InputError, naming the first, unless the entries are those of the slots, no more and no fewer."""
    keys = free_keys(slots)
    missing = [key for key in keys if key not in entries]
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(keys)} layers are missing, first {missing[0]}")
    unknown = [key for key in entries if key not in slots]
    if unknown:
        raise InputError(f"{path}: {len(unknown)} keys are not of this denoiser, first {unknown[0]}")


def check_fits(entries, path, denoiser, slots, family):
    """Raise InputError unless the entries were fitted to exactly this denoiser's weights."""
    misfit = _misfit(entries, denoiser, slots, family)
    if misfit is not None:
        raise InputError(
            f"{path}: made from other weights than this model's (layer {misfit.module_path}); "
            f"make its own with `python scripts/{family.name}_multiquantizer.py`"
        )


def _misfit(entries, denoiser, slots, family):
    """The first slot whose entry was fitted to other weights than the denoiser's; None if there is none."""
    for key, entry in entries.items():
        if key in slots and entry["fingerprint"] != fingerprint(slot_weight(denoiser, slots[key], family)):
            return slots[key]
    return None


def part_path(path, prefix):
    """Where the part `prefix` of the multiquantizer at `path` stands: sdxl_mq.pt, sdxl_conv_in_mq.pt."""
    return path.with_name(f"{path.stem.removesuffix('_mq')}_{prefix}_mq.pt")


def stitch(denoiser, family, path, overwrite=False):
    """Write `path` from the files of all the family's parts; InputError if they do not make one whole.

    Parts that overlap, miss layers or come from other weights are refused, the file and layer named; and so is a file at
    `path` of anything but these weights, unless it may `overwrite` it.
    """
    slots = find_slots(denoiser, family.slot_rules)
    if not overwrite:
        holds(path, denoiser, family)
    entries, origin = {}, {}
    for prefix in family.prefixes:
        file = part_path(path, prefix)
        if not file.is_file():
            raise InputError(f"{file}: no such part; make it with --prefix {prefix}")
        part = _read(load_checkpoint(file), file, family)
        for key in part:
            if key in origin:
                raise InputError(f"{file}: overlaps {origin[key]}, both have {key}; make them anew with --prefix")
        own = {key: slot for key, slot in slots.items() if in_part(slot, prefix) or key in part}
        check_complete(part, file, own)
        check_fits(part, file, denoiser, slots, family)
        origin |= dict.fromkeys(part, file)
        entries |= part
    entries = {key: entries[key] for key in free_keys(slots)}
    save(entries, family, path)
    return entries


def _read(content, path, family):
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: not a multiquantizer")
    if content.get("version") != VERSION:
        raise InputError(f"{path}: multiquantizer version {content.get('version')}, this program reads {VERSION}")
    if content.get("family") != family.name:
        raise InputError(f"{path}: a multiquantizer of {content.get('family')}, not of {family.name}")
    entries = content.get("slots")
    damaged = [key for key, entry in entries.items() if not is_entry(entry)] if isinstance(entries, dict) else ["slots"]
    if damaged:
        raise InputError(f"{path}: damaged multiquantizer ({damaged[0]}); make it anew")
    return entries
