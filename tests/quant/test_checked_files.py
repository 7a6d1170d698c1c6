"""Files with a digest: what was written comes back, anything else counts as not there."""

import json

import numpy as np
import pytest
import torch

from quant import checked_files
from quant.checked_files import (
    from_json,
    load_array,
    load_arrays,
    load_content,
    save_array,
    save_arrays,
    save_content,
    write,
)

ARRAYS = {
    **{name: np.arange(6, dtype=name).reshape(2, 3) for name in ("u1", "i4", "i8", "f2", "f4", "f8")},
    **{"bool": np.array([True, False]), "number": np.int64(3), "empty": np.zeros((0, 4)), "turned": np.ones((2, 3)).T},
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_come_back(tmp_path, name):
    save_array(ARRAYS[name], tmp_path / "x.npy")
    found = load_array(tmp_path / "x.npy")
    assert found.dtype == ARRAYS[name].dtype and np.array_equal(found, ARRAYS[name])
    assert np.array_equal(np.load(tmp_path / "x.npy"), ARRAYS[name])  # numpy, too, reads it


def test_several_arrays_and_tensors_come_back(tmp_path):
    save_arrays(ARRAYS, tmp_path / "x.npz")
    found = load_arrays(tmp_path / "x.npz")
    assert found.keys() == ARRAYS.keys() and all(np.array_equal(found[name], ARRAYS[name]) for name in ARRAYS)
    save_content({"a": [torch.ones(2), None]}, tmp_path / "x.pt")
    assert torch.equal(load_content(tmp_path / "x.pt")["a"][0], torch.ones(2))


def test_every_flipped_bit_and_every_length_is_seen(tmp_path):
    path = tmp_path / "x.npy"
    save_array(np.arange(3.0), path)
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        assert load_array(path) is None
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert load_array(path) is None
    assert load_array(tmp_path / "not there") is None and load_array(tmp_path) is None


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|S0', 'fortran_order': False, 'shape': (3,), }",  # ends the interpreter where numpy reads it
        "{'descr': '<f8', 'fortran_order': False, 'shape': (4,), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-3,), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999999999, 99999999999999999999), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (3,), 'x': __import__('os')}",
    ],
)
def test_headers_of_others_with_a_right_digest(tmp_path, header):
    header = header.encode() + b"\n"
    write(tmp_path / "x.npy", checked_files.MAGIC, len(header).to_bytes(2, "little"), header, np.arange(3.0))
    assert load_array(tmp_path / "x.npy") is None


def test_json_with_a_digest():
    told = {"a": 1, "b": 2.5, "c": None}
    text = json.dumps(checked_files.with_digest(told))
    assert from_json(text) == told and from_json(json.dumps(told)) == told  # of earlier versions
    assert from_json(text.replace("2.5", "2.6")) is None
    assert from_json(text.replace("digest", "digesu")) is None
    for other in ("[1]", "3", "{", '{"a": "x"}', "[" * 10**5, '{"a": ' + "9" * 10**4 + "}"):
        assert from_json(other) is None
