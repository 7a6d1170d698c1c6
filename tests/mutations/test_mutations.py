"""Mutated files of every kind: refused in one line, gone on without, or read; never a traceback, a hang or a silent change.

`MUTATIONS=20 pytest -s -m "" tests/mutations` multiplies the numbers of the short tests; MUTATIONS_SEED draws others.
"""

import contextlib
import hashlib
import os
import random
import signal
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from errors import InputError
from mutations.kinds import KINDS
from stages.common import log

resource = pytest.importorskip("resource")
MORE = int(os.environ.get("MUTATIONS", 10))  # times as many in the long tests
SEED = int(os.environ.get("MUTATIONS_SEED", 0))
SECONDS, BYTES = 10, 2**30
LONGEST = 1000  # characters of a refusal


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("QUA2SEDIMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(log, "disabled", True)


@contextlib.contextmanager
def bounded():
    """Whatever takes longer than SECONDS, or more than BYTES of memory, fails: here, if the reader hides that it has."""

    def too_long(_signal, _frame):
        raise TimeoutError(f"longer than {SECONDS} s")

    before, limits = signal.signal(signal.SIGALRM, too_long), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 4 * BYTES, limits[1]))
    start, most = time.monotonic(), peak_bytes()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        assert time.monotonic() - start < SECONDS, f"longer than {SECONDS} s"
        assert peak_bytes() - most < BYTES, f"more than {BYTES:,} bytes"


def peak_bytes():
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def frozen(value):
    """What was read, as one value that can be compared: NaN equals itself."""
    if torch.is_tensor(value):
        value = value.detach().cpu().contiguous()
        raw = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return "tensor", str(value.dtype), tuple(value.shape), hashlib.sha256(raw).hexdigest()
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.shape, hashlib.sha256(np.ascontiguousarray(value)).hexdigest()
    if isinstance(value, dict):
        return "dict", tuple(sorted(((repr(key), frozen(each)) for key, each in value.items()), key=str))
    if isinstance(value, list | tuple):
        return "list", tuple(map(frozen, value))
    return repr(value)


def is_seen(read, whole):
    """Whether nothing of what was read is other than the sound file has it: all is as there, or not there."""
    if read is None or read in ({}, []):
        return True
    if isinstance(read, list) and isinstance(whole, list):
        there = list(map(frozen, whole))
        return all(frozen(each) in there for each in read)
    return frozen(read) == frozen(whole)


def outcome(kind, path, whole, bytes_alone):
    """`refused`, `same` or `read` of a mutated file; AssertionError for what may not be."""
    try:
        with bounded():
            read = kind.read(path)
    except InputError as refusal:
        message = str(refusal)
        assert len(message) < LONGEST + len(str(path)) * 3, f"a refusal of {len(message)} characters"
        return "refused"
    if bytes_alone and kind.has_digest:
        assert is_seen(read, whole), "changed in silence"
        return "same"
    return "read"


def run(kind, folder, count, seed):
    """Mutate a file of the kind `count` times; returns what failed {what: number}, with an example each."""
    path = kind.make(folder)
    files = {file: file.read_bytes() for file in kind.beside(path)}
    whole = kind.read(path)
    failures = {}
    for number in range(count):
        rng = random.Random(f"{kind.name} {seed} {number}")
        file = rng.choice(sorted(files))
        anew = kind.rewrite is not None and rng.random() < 0.4
        try:
            if anew:
                with contextlib.suppress(InputError, ValueError, TypeError, OverflowError, AttributeError, RuntimeError):
                    kind.rewrite(file, rng)  # what cannot even be written is no file
            else:
                file.write_bytes(kind.mutate(files[file], rng))
            bytes_alone = not anew and file.read_bytes() != files[file]
            outcome(kind, path, whole, bytes_alone)
        except Exception as reason:
            what = f"{type(reason).__name__}: {str(reason)[:150]}"
            failures.setdefault(what, []).append(f"seed {seed}, number {number}, {file.name}")
        for each, content in files.items():
            if not each.exists() or each.read_bytes() != content:
                each.parent.mkdir(parents=True, exist_ok=True)
                each.write_bytes(content)
    return failures


def check(kind, folder, count, seed):
    start = time.process_time()
    failures = run(kind, folder, count, seed)
    told = "\n".join(f"{len(where)} x {what} ({where[0]})" for what, where in failures.items())
    print(
        f"{kind.name}: {count} mutations, {sum(map(len, failures.values()))} failures, {time.process_time() - start:.1f} s"
    )
    assert not failures, f"{kind.name}\n{told}"


@pytest.mark.parametrize("name", KINDS)
def test_a_few_mutations(name, tmp_path):
    kind = KINDS[name]
    check(kind, tmp_path, kind.count, SEED)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_mutations(name, tmp_path):
    kind = KINDS[name]
    check(kind, tmp_path, kind.count * MORE, SEED + 1)
