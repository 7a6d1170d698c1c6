import os
import pickle

import pytest
import torch

from errors import InputError
from quant.storage import atomic_write, load_checkpoint, load_pickle, save_pickle


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
