"""Pickles of plain data, by this program's own reader: as Python's reads them, or refused at once."""

import functools
import math
import pickle
import struct

import pytest

from quant.plain_pickle import loads

DATA = [
    {"a": 1, "b": [1.5, "x", None, True, False], "c": (), "d": (1,), "e": ("é", -2, 3), "f": (1, 2, 3, 4)},
    {"n": [0, 255, 256, 65535, 65536, -1, 2**31 - 1, -(2**31), 2**40, -(2**60), 2**64], "x": [1e300, -0.0, math.inf]},
    *({"shared": "a" * size} for size in (0, 255, 256, 70000)),
    {1: {2.5: {None: {True: {"deep": []}}}}},
]
SHARED = pickle.dumps(functools.reduce(lambda inner, _: [inner, inner], range(40), []), protocol=4)  # 2^40 values
NESTED_TUPLE = b"\x80\x04)" + b"\x85" * 10**6 + b"."


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("data", DATA)
def test_as_pythons_own(data, protocol):
    assert repr(loads(pickle.dumps(data, protocol=protocol))) == repr(data)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x04K\x01r\x00\x00\x00\x10.", None),  # a memo index of 2^28: 4.6 GB in Python's own reader
        (NESTED_TUPLE, "nested deeper"),
        (
            b"\x80\x04}" + NESTED_TUPLE[2:-1] + b"K\x01s.",
            "keys are no plain values",
        ),  # would be hashed in as deep a recursion
        (SHARED, "in one another too often"),
        (b"\x80\x04]\x94h\x00a.", "nested deeper|too often"),  # a list that is in itself
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.", "cut off"),
        (b"\x80\x04\x8b" + struct.pack("<I", 2**31) + b"\1.", "too large"),
        (b"\x80\x04\x8a\xff" + b"\x7f" * 255 + b".", "too large"),
        (b"\x80\x04cposix\nsystem\n.", "it asks for posix.system"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "it asks for posix.system"),
        (b"\x80\x04K\x01K\x02R.", "a call"),
        (b"\x80\x04]K\x01u.", "cut off"),
        (b"\x80\x04K\x01K\x01a.", "cut off"),
        (b"\x80\x04K\x01K\x01.", "cut off"),
        (b"\x80\x04\x86.", "cut off"),
        (b"\x80\x04h\x07.", "cut off"),
        (b"\x80\x04\x8c\x02\xff\xfe.", "not UTF-8"),
        (b"\x80\x04(K\x01.", "cut off"),
        (b"(dp0\n.", "protocol 2 to 5"),
        (b"", "protocol 2 to 5"),
    ],
)
def test_refused_or_read_without_effort(content, words):
    if words is None:
        assert loads(content) == 1
    else:
        with pytest.raises(ValueError, match=words):
            loads(content)
