"""Which way packed linear layers take on a GPU, by shape."""

import json

import pytest
import torch

from errors import InputError
from quant.kernels import shapes

A100, RTX_4090, H100 = (8, 0), (8, 9), (9, 0)


@pytest.fixture(autouse=True)
def unmeasured(tmp_path, monkeypatch):
    monkeypatch.setenv("QUA2SEDIMO_CACHE", str(tmp_path))
    shapes.use(None)
    yield tmp_path / "gpu_shapes.json"
    shapes.use(None)


def test_reckoned():
    """Few rows are bound by reading weights; whole numbers pay in large products, and later on an H100."""
    assert shapes.choose("linear", H100, 16, 1152, 6912) == "fused"
    assert shapes.choose("linear", H100, 2048, 1152, 1152) == "scratch"
    assert shapes.choose("linear_a8", H100, 8192, 1408, 6144) == "int8"
    assert shapes.choose("linear_a8", H100, 2048, 1152, 1152) == "half"
    assert shapes.choose("linear_a8", RTX_4090, 2048, 1152, 1152) == "int8"
    for capability in ((7, 5), A100, (10, 0), (12, 0)):
        assert shapes.choose("linear_a8", capability, 2**20, 4096, 4096) == "int8"


def test_what_was_measured_goes_before(unmeasured):
    """For its bucket alone: sizes round up to powers of two."""
    key = shapes.key("linear", H100, 2048, 1152, 1152)
    shapes.save({key: "fused"})
    assert json.loads(unmeasured.read_text()) == {key: "fused"}
    assert shapes.choose("linear", H100, 1025, 2048, 1200) == "fused"
    for other in ((H100, 1024, 1152, 1152), (H100, 2048, 1024, 1152), (A100, 2048, 1152, 1152)):
        assert shapes.choose("linear", *other) == "scratch"
    shapes.use({})
    assert shapes.choose("linear", H100, 2048, 1152, 1152) == "scratch"
    shapes.use(None)
    assert shapes.chosen("linear", torch.empty(2, 1024, 1152), 2048, 1152) == "fused"


@pytest.mark.parametrize("text", ["{", "[]", '{"linear 9.0 1x1x1": "int8"}', '{"other 9.0 1x1x1": "half"}', "\x00"])
def test_another_file_is_not_gone_by(unmeasured, text, caplog):
    unmeasured.write_text(text)
    assert shapes.choose("linear", H100, 1, 1, 1) == shapes.reckoned("linear", H100, 1, 1, 1)
    assert "gpu_shapes.json: not a table of ways by shape; remove it" in caplog.text


def test_nothing_else_is_saved(unmeasured):
    with pytest.raises(InputError, match="what was measured"):
        shapes.save({"linear 9.0 1x1x1": "fast"})
    assert not unmeasured.exists()
