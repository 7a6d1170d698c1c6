"""A file that grows by records, cut off and damaged anywhere."""

import pytest
import torch

from errors import InputError
from stages.record_file import HEAD, RecordFile

SETTINGS = {"probe": "exact", "seed": 1}
NAMES = [["a", number] for number in range(4)]


def record(number):
    return {"values": torch.full((number + 1, 3), number / 7), "half": torch.arange(number + 2).half()}


def complete(path):
    """Add what is missing, as a run does that was begun again; returns what was missing."""
    with RecordFile(path, SETTINGS) as file:
        missing = [name for name in NAMES if name not in file]
        for name in missing:
            file.add(name, record(name[1]))
    return missing


@pytest.fixture
def whole(tmp_path):
    path = tmp_path / "whole"
    assert complete(path) == NAMES
    return path.read_bytes()


def offsets(content):
    """Where records begin, the settings' first."""
    found, at = [], 0
    while at < len(content):
        found.append(at)
        at += HEAD + int.from_bytes(content[at : at + 8], "little")
    return [*found, at]


def test_what_is_added_is_read_again(tmp_path, whole):
    file = RecordFile(tmp_path / "whole", SETTINGS)
    assert file.names == NAMES and ["a", 9] not in file
    for name in NAMES:
        assert all(torch.equal(value, file[name][key]) for key, value in record(name[1]).items())
    assert complete(tmp_path / "whole") == [] and (tmp_path / "whole").read_bytes() == whole


def test_cut_off_anywhere_it_ends_in_the_same_bytes(tmp_path, whole):
    starts, path = offsets(whole), tmp_path / "cut"
    for length in range(starts[1], len(whole), 7):
        path.write_bytes(whole[:length])
        kept = sum(end <= length for end in starts[2:])
        assert complete(path) == NAMES[kept:]
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damaged", range(4))
@pytest.mark.parametrize("place", [9, HEAD, HEAD + 30, -1])
def test_a_damaged_record_is_made_again_in_its_place(tmp_path, whole, damaged, place):
    starts, path = offsets(whole)[1:], tmp_path / "damaged"
    content = bytearray(whole)
    content[starts[damaged] + place if place >= 0 else starts[damaged + 1] - 1] ^= 1
    path.write_bytes(content)
    assert complete(path) == [NAMES[damaged]]
    assert path.read_bytes() == whole


def test_with_a_damaged_length_what_follows_is_made_again(tmp_path, whole):
    starts, path = offsets(whole)[1:], tmp_path / "damaged"
    for changed in (1, 255):
        content = bytearray(whole)
        content[starts[1]] ^= changed
        path.write_bytes(content)
        assert complete(path) == NAMES[1:] and path.read_bytes() == whole


def test_each_byte_is_written_once(tmp_path, whole):
    path, written = tmp_path / "counted", 0
    with RecordFile(path, SETTINGS) as file:
        write = file.file.write

        class Counting:
            def __getattr__(self, name):
                return getattr(raw, name)

            def write(self, content):
                nonlocal written
                written += len(content)
                return write(content)

        raw, file.file = file.file, Counting()
        for name in NAMES:
            file.add(name, record(name[1]))
    assert path.read_bytes() == whole and written == len(whole) - offsets(whole)[1]


@pytest.mark.parametrize("content", [b"", b"short", b"PK\x03\x04" + bytes(500), bytes(500)])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(InputError, match="other: holds no sensitivities, or is damaged; give another --sensitivity"):
        RecordFile(tmp_path / "other", SETTINGS)


def test_other_settings_are_refused(tmp_path, whole):
    with pytest.raises(InputError, match="was measured with probe exact, not sketch; give another --sensitivity, or delete"):
        RecordFile(tmp_path / "whole", SETTINGS | {"probe": "sketch"})


def test_two_runs_do_not_add_at_once(tmp_path, whole):
    with RecordFile(tmp_path / "whole", SETTINGS), pytest.raises(InputError, match="another run is adding to it"):
        RecordFile(tmp_path / "whole", SETTINGS).__enter__()
