"""A file of records that grows by one at a time: what a long measurement found so far, whatever cuts it off.

The first record tells the settings that all others depend on. A record is

    length      8 bytes, little-endian: bytes of the content
    digest      32 bytes: SHA-256 of the content
    content     4 bytes, the length of the name; the name as JSON; tensors in the safetensors format

A record that was cut off at the end is dropped; one that is damaged in the middle is a gap, which the next new record of its
length fills. So if records come in the same order, the file is the same however often its making was cut off. A byte is
written once.
"""

import hashlib
import json
import os
import struct
from pathlib import Path

import safetensors.torch

from errors import InputError, system_reason
from quant.files import atomic_write

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LENGTH, NAME = struct.Struct("<Q"), struct.Struct("<I")
HEAD = LENGTH.size + hashlib.sha256().digest_size
SETTINGS = "settings"


class RecordFile:
    """The records {name: {tensor's name: tensor}} of the file at `path`, made with `settings`, a plain dict of JSON's kinds.

    A name is a list of strings and numbers. InputError if the file is another, or was made with other settings; it names
    `flag`, by which another file is chosen. While it is entered as a context it is locked for this process to `add` to.
    """

    def __init__(self, path, settings, flag="--sensitivity"):
        self.path, self.settings, self.flag = Path(path), settings, flag
        self.places, self.gaps, self.end = {}, [], 0  # name -> (offset, bytes) of the content; (offset, bytes) of records
        self.file = None
        self._scan()

    def __contains__(self, name):
        return _key(name) in self.places

    def __getitem__(self, name):
        offset, size = self.places[_key(name)]
        with self.path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        (length,) = NAME.unpack(content[: NAME.size])
        return safetensors.torch.load(content[NAME.size + length :])

    @property
    def names(self):
        """Names of all records, in the order of the file."""
        return [json.loads(key) for key in self.places]

    def _scan(self):
        """Find the records of the file; nothing is changed in it."""
        self.places, self.gaps, self.end = {}, [], 0
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        except OSError as reason:
            raise InputError(f"{self.path}: cannot be read ({system_reason(reason)})") from reason
        gaps = []
        with file:
            self._check_settings(file)
            total = self.path.stat().st_size
            while (offset := file.tell()) + HEAD <= total:
                head = file.read(HEAD)
                (size,) = LENGTH.unpack(head[: LENGTH.size])
                if offset + HEAD + size > total:
                    break
                content = file.read(size)
                if hashlib.sha256(content).digest() != head[LENGTH.size :]:
                    gaps.append((offset, HEAD + size))
                    continue
                name = _name_of(content)
                if name is None:
                    raise InputError(f"{self.path}: has a record that this program did not write; delete it")
                self.places[_key(name)] = (offset + HEAD, size)
                self.gaps, self.end = list(gaps), file.tell()  # a gap at the end is none: it is dropped

    def _check_settings(self, file):
        way_out = f"give another {self.flag}, or delete it"
        head = file.read(HEAD)
        size = LENGTH.unpack(head[: LENGTH.size])[0] if len(head) == HEAD else None
        content = file.read(size) if size is not None and size < 2**24 else b""
        name = _name_of(content) if content and hashlib.sha256(content).digest() == head[LENGTH.size :] else None
        if not name or name[0] != SETTINGS or len(name) != 2 or not isinstance(name[1], dict):
            raise InputError(f"{self.path}: holds no sensitivities, or is damaged; {way_out}")
        kept = name[1]
        for name, value in self.settings.items():
            if kept.get(name) != value:
                raise InputError(f"{self.path}: was measured with {name} {kept.get(name)}, not {value}; {way_out}")
        self.end = file.tell()

    def __enter__(self):
        try:
            if not self.path.exists():
                with atomic_write(self.path) as file:
                    file.write(_packed([SETTINGS, self.settings], {}))
            self.file = self.path.open("r+b")
        except OSError as reason:
            raise InputError(f"{self.path}: cannot be written ({system_reason(reason)})") from reason
        self._lock()
        self._scan()  # another process may have added to it
        return self

    def __exit__(self, *_reason):
        self.file.close()
        self.file = None

    def _lock(self):
        """Refuse another process that adds to the file, where the system can tell."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.file.close()
            raise InputError(f"{self.path}: another run is adding to it; wait, or give another {self.flag}") from None
        except OSError:  # a file system without locks
            return

    def add(self, name, tensors):
        """Write a record, synced before it returns."""
        record = _packed(name, tensors)
        gap = next((gap for gap in self.gaps if gap[1] == len(record)), None)
        offset = self.end if gap is None else gap[0]
        try:
            if gap is None:
                self.file.truncate(self.end)
            self.file.seek(offset)
            self.file.write(record)
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as reason:
            raise InputError(
                f"{self.path}: cannot be written ({system_reason(reason)}); what it had before is kept"
            ) from reason
        if gap is None:
            self.end += len(record)
        else:
            self.gaps.remove(gap)
        self.places[_key(name)] = (offset + HEAD, len(record) - HEAD)


def _key(name):
    return json.dumps(name)


def _packed(name, tensors):
    text = _key(name).encode()
    content = NAME.pack(len(text)) + text + safetensors.torch.save({key: tensors[key].contiguous() for key in tensors})
    return LENGTH.pack(len(content)) + hashlib.sha256(content).digest() + content


def _name_of(content):
    """The name in a record's content, a list; None if it has none."""
    try:
        (size,) = NAME.unpack(content[: NAME.size])
        name = json.loads(content[NAME.size : NAME.size + size])
    except (struct.error, ValueError, RecursionError):
        return None
    return name if isinstance(name, list) else None
