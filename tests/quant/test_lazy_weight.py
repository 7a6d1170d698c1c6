"""What a packed layer shows as its weight: known without decoding, decoded if its values are asked for, never written."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quant import QuantizedModel
from quant.layers import PackedLayer


@pytest.fixture(params=["linear", "conv", "split"])
def layer(request):
    torch.manual_seed(0)
    float_layer = nn.Linear(24, 10) if request.param == "linear" else nn.Conv2d(24, 10, 3)
    model = nn.Sequential(float_layer)
    splits = {"0": 7} if request.param == "split" else {}
    return QuantizedModel(model, splits=splits).pack("kmeans-4", show=False)[0]


@pytest.fixture
def decodings(monkeypatch):
    """A list that grows with every decoding."""
    calls, decoded = [], PackedLayer.decoded

    def counting(layer, dtype=None):
        calls.append(dtype)
        return decoded(layer, dtype)

    monkeypatch.setattr(PackedLayer, "decoded", counting)
    return calls


def test_its_form_is_known_without_decoding(layer, decodings):
    weight = layer.weight
    shape = (10, 24) if isinstance(layer, nn.Linear) else (10, 24, 3, 3)
    assert weight.shape == weight.data.shape == weight.detach().size() == shape
    assert (weight.dtype, weight.device, weight.ndim) == (torch.float32, torch.device("cpu"), len(shape))
    assert weight.numel() == torch.Size(shape).numel() and not weight.requires_grad
    assert "shape" in repr(weight) and weight.to("cpu").shape == weight.float().shape == shape
    assert not decodings


READINGS = {
    "arithmetic": lambda weight: weight * 2 + 1,
    "of a view": lambda weight: weight.flatten(1).t() @ torch.ones(10),
    "an item": lambda weight: weight[3, 5],
    "cat": lambda weight: torch.cat([weight, weight]),
    "clone": lambda weight: weight.clone(),
    "half": lambda weight: weight.to(torch.float16),
    "data": lambda weight: weight.data.sum(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda weight: pickle.loads(pickle.dumps(weight)),
    "copied from": lambda weight: torch.zeros(weight.shape).copy_(weight),
    "linear": lambda weight: F.linear(torch.ones(2, weight[0].numel()), weight.flatten(1)),
    "chunks": lambda weight: torch.stack(weight.chunk(2)),
    "stacked": lambda weight: torch.stack([weight.data, weight.data]),
    "norm": lambda weight: torch.linalg.norm(weight),
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
def test_its_values_are_the_decoded_ones(layer, read, decodings):
    expected = read(PackedLayer.decoded(layer))
    decodings.clear()
    found = read(layer.weight)
    assert decodings and torch.equal(found.clone(), expected)


def test_what_takes_its_memory_gets_nan(layer):
    """PyTorch asks no one before it hands the memory of one tensor to another."""
    other = torch.zeros(layer.weight.shape)
    other.data = layer.weight.data
    assert torch.as_tensor(other.cpu()).isnan().all() or torch.equal(other.clone(), layer.decoded())


def test_it_is_copied_into_another_layer(layer):
    other = nn.Conv2d(24, 10, 3) if isinstance(layer, nn.Conv2d) else nn.Linear(24, 10)
    with torch.no_grad():
        other.weight.copy_(layer.weight)
    assert torch.equal(other.weight, layer.decoded())


def _set_data(layer, value):
    layer.weight.data = value


def _add_to_data(layer, value):
    layer.weight.data += value


def _set_item(layer, value):
    layer.weight[0] = value[0]


def _set_weight(layer, value):
    layer.weight = nn.Parameter(value)


def _delete(layer, _value):
    del layer.weight


def _step(layer, value):
    weight = layer.weight
    weight.grad = value
    torch.optim.SGD([weight], lr=1).step()


WRITINGS = {
    "data": _set_data,
    "add to data": _add_to_data,  # PEFT's merge, which fuse_lora calls
    "item": _set_item,
    "weight": _set_weight,
    "delete": _delete,
    "register": lambda layer, value: layer.register_parameter("weight", nn.Parameter(value)),
    "copy_": lambda layer, value: layer.weight.copy_(value),
    "add_": lambda layer, value: layer.weight.add_(value),
    "in a view": lambda layer, value: layer.weight.view(-1).mul_(2),
    "in a row": lambda layer, value: layer.weight[0].zero_(),
    "in a chunk": lambda layer, value: layer.weight.data.chunk(2)[0].fill_(1),
    "out": lambda layer, value: torch.add(value, 1, out=layer.weight),
    "foreach": lambda layer, value: torch._foreach_add_([layer.weight], 1.0),
    "init": lambda layer, value: nn.init.zeros_(layer.weight),
    "reset": lambda layer, value: layer.reset_parameters(),
    "optimizer": _step,
    "vector": lambda layer, value: nn.utils.vector_to_parameters(torch.zeros(value.numel()), [layer.weight]),
}


@pytest.mark.parametrize("write", WRITINGS.values(), ids=WRITINGS)
def test_what_would_write_to_it_is_refused(layer, write):
    before = layer.decoded()
    with pytest.raises(RuntimeError, match="packed layer cannot be written to or replaced"):
        write(layer, torch.ones(before.shape))
    assert torch.equal(layer.decoded(), before)


@pytest.mark.parametrize("ask", ["data_ptr", "untyped_storage", "numpy", "tolist"])
def test_its_memory_is_not_given(layer, ask):
    with pytest.raises(RuntimeError, match=r"no memory of its own|not supported for tensor subclasses"):
        getattr(layer.weight, ask)()
