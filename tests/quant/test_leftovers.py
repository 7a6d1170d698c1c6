"""What a kill leaves behind goes with the next write; what is being written stays."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

from quant.files import atomic_folder, atomic_write, save_text
from quant.leftovers import remove_leftovers, remove_leftovers_once

DYING = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from quant.files import atomic_folder, atomic_write
from quant.leftovers import temporary_folder
with temporary_folder(Path(sys.argv[2]) / "folder") as new, atomic_write(Path(sys.argv[2]) / "file") as file:
    (new / "x").touch()
    file.write(b"x")
    file.flush()
    os._exit(9)
"""


@pytest.fixture
def left(tmp_path):
    """A folder in which a process has died that was writing a file and filling a folder."""
    subprocess.run([sys.executable, "-c", DYING, str(ROOT), str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers_once.cache_clear()
    return tmp_path


def test_the_next_write_removes_them(left):
    save_text("x", left / "other")
    assert [path.name for path in left.iterdir()] == ["other"]


def test_what_is_being_written_stays(tmp_path):
    (tmp_path / ".mine.tmp").touch()  # not of this program
    with atomic_write(tmp_path / "a") as file:
        file.write(b"x")
        remove_leftovers(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"x" and (tmp_path / ".mine.tmp").exists()


def fill(new):
    Image.new("L", (1, 1)).save(new / "x.png")


def is_filled(path):
    return (path / "x.png").exists()


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "a", is_filled) as new:
        fill(new)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "a", is_filled) as new:
        fill(new)
    assert is_filled(tmp_path / "a") and len(list(tmp_path.iterdir())) == 1


def test_the_first_of_two_folders_stays_and_a_damaged_one_goes(tmp_path):
    with atomic_folder(tmp_path / "a", is_filled) as new:
        fill(new)
        with atomic_folder(tmp_path / "a", is_filled) as quicker:
            fill(quicker)
        first = os.stat(tmp_path / "a").st_ino
    assert os.stat(tmp_path / "a").st_ino == first
    (tmp_path / "a" / "x.png").unlink()
    (tmp_path / "a" / "other").touch()
    with atomic_folder(tmp_path / "a", is_filled) as new:
        fill(new)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.png"] and len(list(tmp_path.iterdir())) == 1
