import pickle

import pytest

from errors import InputError
from evaluation import quant_cache

ROW = {
    "quantized_size": 10,
    "avg_bits": 3.5,
    "quantized_error": 0.25,
    "FID-GT-1k": 2.0,
    "bops": 0.5,
    "config": {"model.a.weight_quantizer": ["mse-4", 16, 4, 0.25]},
}


def test_exactly_the_published_keys(tmp_path):
    path = tmp_path / "quant_cache.pkl"
    quant_cache.save([ROW | {"note": "extra"}], path)
    assert pickle.loads(path.read_bytes()) == [ROW]
    assert quant_cache.load(path) == [ROW]


def test_equal_rows_give_equal_bytes(tmp_path):
    """A cache that was read and written again, with a row added, is the one written in one go."""
    path, whole = tmp_path / "resumed.pkl", tmp_path / "whole.pkl"
    second = ROW | {"config": {"model.a.weight_quantizer": ["mse-" + str(4), 16, 4, 0.5]}}
    quant_cache.save([ROW], path)
    quant_cache.save([*quant_cache.load(path), second], path)
    quant_cache.save([ROW, second], whole)
    assert path.read_bytes() == whole.read_bytes()


def test_starts_empty(tmp_path):
    assert quant_cache.load(tmp_path / "nothing.pkl") == []


@pytest.mark.parametrize("content", [{}, [1], [{"config": {}}], [ROW | {"FID-GT-1k": None}], [ROW | {"config": {"a": []}}]])
def test_other_pickles_are_refused(tmp_path, content):
    path = tmp_path / "quant_cache.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"quant_cache\.pkl"):
        quant_cache.load(path)
