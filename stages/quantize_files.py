"""The folder that quantize.py writes: the base pipeline's files beside the packed denoisers, whole or not at all."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from errors import InputError, system_reason
from models.any_pipeline import plain_name
from models.repository import INDEX
from quant.files import system_error
from quant.leftovers import TEMPORARY
from stages.run_lock import LOCK, PID
from stages.units import as_size

LINKED_BYTES = 2**20  # smaller files, which people edit, are copied: a change would reach the other place, too
MARGIN = 1.05  # of the disk that is reckoned, for headers and pictures
PARTIAL = ".partial"
# In the work folder.
FITS, PIPELINE, BEFORE, AFTER, REPLACED, HEARD = "fits.pt", "pipeline", "before", "after", "replaced", "calibration"
OWN = {FITS, PIPELINE, BEFORE, AFTER, REPLACED, HEARD, LOCK, PID}


def check_output(output, model_id, overwrite):
    """InputError if the output is there and may not be replaced, or would take what it is made from with it."""
    base, output = Path(model_id), output.resolve()
    if base.exists() and (output == base.resolve() or output in base.resolve().parents or base.resolve() in output.parents):
        raise InputError(f"--output {output}: is, holds or lies in the model's own folder; name another")
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise InputError(f"--output {output}: is there already; --overwrite replaces it")
    if not (output / INDEX).is_file():
        raise InputError(f"--output {output}: is no pipeline (no {INDEX}), so is not replaced; name another")


def make_work_folder(output):
    """The folder beside `output` in which it is made, and in which a run that was cut off finds what it has.

    InputError if it cannot be made, or holds what no run has put there: it goes when the output is made.
    """
    folder = output.with_name(f"{output.name}{PARTIAL}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise InputError(f"{folder}: cannot be made ({system_reason(reason)})") from None
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in OWN and not path.name.startswith("."))
    if foreign:
        raise InputError(f"{folder}: is needed to make --output in, and holds {foreign[0]}; move it away, or name another")
    return folder


def check_disk(folder, files, source, packed_bytes):
    """InputError if the disk has no room for the packed denoisers and those of the `files` that cannot be linked."""
    paths = [(source.folder / name).resolve() for name in files.values()]
    copied = sum(path.stat().st_size for path in paths if not _can_be_linked(path, folder))
    needed, free = int(MARGIN * (packed_bytes + copied)), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder.parent}: the quantized pipeline takes about {as_size(needed)} of disk, and {as_size(free)} are free; "
            "give an --output on another disk"
        )


def _can_be_linked(path, folder):
    status = path.stat()
    return status.st_size >= LINKED_BYTES and status.st_dev == folder.stat().st_dev


def place_files(folder, files, source):
    """Fill `folder` with the `files` {name there: name in the source}: large ones linked where the file system can.

    Links of a Hub cache are followed; an index of shards names them as they are called here.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, origin in files.items():
        target, path = folder / name, (source.folder / origin).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if name != origin and name.endswith(".json"):
                _write_index(path, target, origin)
            else:
                link_or_copy(path, target)
        except OSError as reason:
            raise InputError(f"{target}: cannot be written ({system_reason(reason)})") from None


def link_or_copy(path, target):
    if path.stat().st_size >= LINKED_BYTES:
        with contextlib.suppress(OSError):
            os.link(path, target)
            return
    shutil.copyfile(path, target)


def _write_index(path, target, origin):
    """The index of a variant's shards under their plain names."""
    index = json.loads(path.read_text(encoding="utf-8"))
    variant = Path(origin).name.removesuffix(".json").rpartition(".index")[2].strip(".")
    variant = variant or Path(origin).name.split(".")[1]
    index["weight_map"] = {key: plain_name(shard, variant) for key, shard in index["weight_map"].items()}
    target.write_text(json.dumps(index), encoding="utf-8")


def save_denoiser(module, folder):
    """Save a packed denoiser; InputError if the disk is full or the like."""
    try:
        module.save_pretrained(folder)
    except Exception as reason:  # safetensors has one of its own
        refused = system_error(reason, folder / f".probe{TEMPORARY}")
        if refused is None:
            raise
        way_on = "the same command goes on from what it has"
        raise InputError(f"{folder}: cannot be written ({system_reason(refused)}); {way_on}") from reason


def publish(folder, output):
    """Give the finished `folder` the name `output`, everything in it on the disk; what was there is put aside before."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)
    old = folder.with_name(REPLACED)
    try:
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(output, old)
        os.replace(folder, output)
    except OSError as reason:
        if old.exists() and not output.exists():
            os.replace(old, output)
        raise InputError(f"{output}: cannot be written ({system_reason(reason)}); it is whole in {folder}") from None
    _sync(output.parent)


def _sync(path):
    with contextlib.suppress(OSError):  # not every system can, of folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def weight_file_bytes(folder):
    """Bytes of the weight files below a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.suffix in (".safetensors", ".bin"))
