"""What --q_config names."""

import hashlib
import pickle

import pytest

from errors import InputError
from evaluation import quant_cache
from models.families import FAMILIES
from quant import config
from quant.file_keys import by_file_key
from stages import q_config


@pytest.fixture
def loaded(load_tiny):
    return load_tiny("dit")


@pytest.fixture
def slots(loaded):
    return loaded[1]


@pytest.fixture
def entries(loaded):
    """By file key, as read without the denoiser."""
    return by_file_key(loaded[2], loaded[1])


def test_rows_of_a_cache(tmp_path, slots, entries):
    drawn = [config.draw_random(slots, 0, index) for index in range(3)]
    numbers = dict.fromkeys(quant_cache.ROW_NUMBERS, 1)
    rows = [
        numbers | {"FID-GT-1k": fid, "config": {key: [m, 1, 1, 0.0] for key, m in by_file_key(each, slots).items()}}
        for fid, each in zip([3.0, 1.0, 2.0], drawn, strict=True)
    ]
    path = tmp_path / "quant_cache.pkl"
    path.write_bytes(pickle.dumps(rows, protocol=4))
    q_config.check(f"{path}:best", entries, FAMILIES["dit"])
    assert q_config.load(f"{path}:best", slots) == drawn[1]
    assert q_config.load(f"{path}:3", slots) == drawn[2]
    for bad, message in [
        (f"{path}", "add :best"),
        (f"{path}:4", "rows 1 to 3"),
        (f"{path}:x", "rows 1 to 3"),
        (f"{path}:²", "rows 1 to 3"),
    ]:
        with pytest.raises(InputError, match=message):
            q_config.load(bad, slots)
        with pytest.raises(InputError, match=message):
            q_config.check(bad, entries, FAMILIES["dit"])


def test_a_file_of_one_configuration_and_one_method(tmp_path, slots):
    drawn, path = config.draw_random(slots, 0, 0), tmp_path / "c.pkl"
    config.save(drawn, slots, path)
    assert q_config.load(path, slots) == drawn
    assert set(q_config.load("uniform:kmeans-4", slots).values()) == {"kmeans-4"}
    with pytest.raises(InputError, match=r"c\.pkl holds one configuration, not labelled rows; leave out :best"):
        q_config.load(f"{path}:best", slots)


def test_the_key_follows_the_content(tmp_path):
    path = tmp_path / "c.pkl"
    path.write_bytes(b"one")
    assert q_config.key(f"{path}:2") == f"{path}:2 {hashlib.sha256(b'one').hexdigest()[:16]}"
    assert q_config.key("uniform:mse-4") == "uniform:mse-4"
