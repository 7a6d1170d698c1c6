import errno
import os
import pickle
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from errors import InputError
from quant import files
from quant.files import atomic_write, cache_folder, check_writable, load_checkpoint, load_pickle, save_pickle, save_text


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch /tmp/qua2sedimo_bomb_went_off",))


@pytest.fixture
def no_bomb():
    path = "/tmp/qua2sedimo_bomb_went_off"
    yield
    assert not os.path.exists(path)


def test_round_trip(tmp_path):
    data = [{"a": 1, "b": [1.5, "x", None, True]}]
    save_pickle(data, tmp_path / "x.pkl")
    assert load_pickle(tmp_path / "x.pkl") == data
    assert (tmp_path / "x.pkl").read_bytes()[:2] == b"\x80\x04"  # protocol 4


def test_malicious_pickle_is_refused(tmp_path, no_bomb):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([Bomb()]))
    with pytest.raises(InputError, match=r"x\.pkl.*system"):
        load_pickle(tmp_path / "x.pkl")


def test_malicious_checkpoint_is_refused(tmp_path, no_bomb):
    torch.save({"slots": Bomb()}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("load", [load_pickle, load_checkpoint])
def test_truncated_and_missing(tmp_path, load):
    whole = tmp_path / "whole"
    if load is load_pickle:
        save_pickle({"a": list(range(1000))}, whole)
    else:
        torch.save({"a": torch.arange(1000)}, whole)
    (tmp_path / "part").write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(InputError, match="part: not a readable"):
        load(tmp_path / "part")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(InputError, match="empty: not a readable"):
        load(tmp_path / "empty")
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "nothing")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half of the new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


BIG = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
WRITERS = {
    "plain": lambda file: file.write(BIG.tobytes()),
    "torch": lambda file: torch.save({"x": torch.tensor(BIG)}, file),
    "numpy": lambda file: np.save(file, BIG),
    "npz": lambda file: np.savez(file, BIG),
    "png": lambda file: Image.fromarray(BIG).save(file, "PNG"),
    "safetensors": lambda file: save_file({"x": torch.tensor(BIG)}, file.name),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_that_the_system_refuses_is_told_by_its_reason(tmp_path, small_files, writer):
    """Whatever the library says that was writing; the old file stays, and nothing else."""
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(InputError) as refused, atomic_write(path) as file:
        WRITERS[writer](file)
    assert str(refused.value) == f"{path}: cannot be written (File too large); what was there before is kept"
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.ENOSPC, "the disk, or your share of it, is full"),
        (errno.EDQUOT, "the disk, or your share of it, is full"),
        (errno.EROFS, "Read-only file system"),
        (errno.EACCES, "Permission denied"),
    ],
)
def test_the_systems_reasons(tmp_path, code, told):
    with pytest.raises(InputError) as refused, atomic_write(tmp_path / "x"):
        raise OSError(code, os.strerror(code))
    assert f"x: cannot be written ({told});" in str(refused.value)


@pytest.mark.parametrize("write", [check_writable, lambda path: save_text("x", path)])
def test_paths_that_no_file_can_have(tmp_path, write):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name, told in {"n" * 300: "File name too long", "file/x": "(Not a directory|File exists)"}.items():
        with pytest.raises(InputError, match=rf"cannot be written \({told}"):
            write(tmp_path / name)
    with pytest.raises(InputError, match=r"folder: (is a folder; name a file|cannot be written \(Is a directory)"):
        write(tmp_path / "folder")


def test_the_longest_name_that_a_file_can_have(tmp_path):
    save_text("x", tmp_path / ("n" * 255))
    check_writable(tmp_path / ("n" * 255))
    assert [path.name for path in tmp_path.iterdir()] == ["n" * 255]


def test_the_folder_is_synced_after_the_renaming(tmp_path, monkeypatch):
    synced = []

    def fsync(handle):
        synced.append((stat.S_ISDIR(os.fstat(handle).st_mode), (tmp_path / "x").exists()))
        if synced[-1][0]:
            raise OSError(errno.EINVAL, "not of folders")  # some file systems; no reason to fail

    monkeypatch.setattr(files.os, "fsync", fsync)
    save_text("x", tmp_path / "x")
    assert synced == [(False, False), (True, True)]


def test_file_systems_without_modes(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "chmod", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no modes")))
    save_text("x", tmp_path / "x")
    assert (tmp_path / "x").read_text() == "x"


@pytest.fixture
def no_cache_yet(tmp_path, monkeypatch):
    monkeypatch.delenv("QUA2SEDIMO_CACHE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    files._own_cache_folder.cache_clear()
    yield
    files._own_cache_folder.cache_clear()


def test_the_cache_is_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("QUA2SEDIMO_CACHE", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x"


def test_the_cache_is_in_the_home_folder(tmp_path, no_cache_yet, monkeypatch, caplog):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_folder() == tmp_path / "home" / ".cache" / "qua2sedimo" and cache_folder().is_dir() and not caplog.records


@pytest.mark.parametrize("home", [None, "/dev/null/nowhere"])
def test_without_a_home_the_cache_is_among_the_temporary_files(tmp_path, no_cache_yet, monkeypatch, caplog, home):
    def no_home():
        if home is None:
            raise RuntimeError("Could not determine home directory.")
        return Path(home)

    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder().parent == tmp_path / "temporary" and cache_folder().is_dir()
    assert len(caplog.records) == 1 and "QUA2SEDIMO_CACHE" in caplog.text
