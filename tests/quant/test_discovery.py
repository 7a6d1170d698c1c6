"""Weights that a module reads without calling their layer are told from those it calls, and from idle ones."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, tiny, tiny_inputs
from torch import nn
from weights_elsewhere import poison, weights_elsewhere

from models.families import FAMILIES
from quant.discovery import weight_use
from quant.slots import weight_layers

POOLER = {f"time_extra_emb.pooler.{name}_proj" for name in "qkvc"}


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(context, x, weight):
        return x @ weight

    @staticmethod
    def backward(context, gradient):
        raise NotImplementedError


@torch.library.custom_op("qua2sedimo_tests::product", mutates_args=())
def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


READERS = {
    "F.linear": lambda x, layer: F.linear(x, layer.weight),
    "keyword": lambda x, layer: F.linear(input=x, weight=layer.weight),
    "operator": lambda x, layer: x @ layer.weight,
    "transposed": lambda x, layer: x @ layer.weight.T,
    "data": lambda x, layer: x + layer.weight.data[0],
    "in a list": lambda x, layer: x @ torch.cat([layer.weight, layer.weight], dim=1)[:, :3],
    "autograd function": lambda x, layer: Scaled.apply(x, layer.weight),
    "registered operator": lambda x, layer: product(x, layer.weight),
    "pointer": lambda x, layer: x + (layer.weight.data_ptr() > 0),
    "numpy": lambda x, layer: x + torch.from_numpy(layer.weight.numpy())[0],
    "parameters": lambda x, layer: x @ next(layer.parameters()),
    "forward past the hooks": lambda x, layer: layer.forward(x),
}


class Reading(nn.Module):
    """Calls one layer and uses another in a given way."""

    def __init__(self, use):
        super().__init__()
        self.called, self.used = nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False)
        self.use = use

    def forward(self, x):
        return self.use(self.called(x), self.used)


@pytest.mark.parametrize("use", READERS.values(), ids=READERS)
def test_weight_that_goes_into_an_operation_is_read(use):
    module = Reading(use)
    found = weight_use(module, lambda: module(torch.rand(2, 3)))
    assert (found.called, found.read, found.idle) == (("called",), ("used",), ())


def test_weight_whose_form_alone_is_asked_is_idle_if_nothing_calls_it():
    module = Reading(lambda x, layer: x.to(layer.weight.dtype).to(layer.weight.device)[:, : layer.weight.size(1)])
    found = weight_use(module, lambda: module(torch.rand(2, 3)))
    assert (found.called, found.read, found.asked, found.idle) == (("called",), (), ("used",), ("used",))


def test_layer_may_be_called_and_read_and_asked():
    module = Reading(lambda x, layer: layer(x.to(layer.weight.dtype)) @ layer.weight)
    found = weight_use(module, lambda: module(torch.rand(2, 3)))
    assert (found.called, found.read, found.asked, found.idle) == (("called", "used"), ("used",), ("used",), ())


def test_weight_shared_with_an_embedding_is_read():
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5)
    head.weight = embedding.weight
    module = nn.Sequential(embedding, head)
    found = weight_use(module, lambda: module(torch.tensor([1, 2])))
    assert (found.called, found.read) == (("1",), ("1",))


def test_weight_shared_by_two_layers_is_not_read():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    found = weight_use(module, lambda: module(torch.rand(2, 3)))
    assert (found.called, found.read) == (("0", "1"), ())


@pytest.mark.parametrize("kdim", [4, 3], ids=["one matrix", "three"])
def test_last_layer_of_attention_is_read(kdim):
    attention = nn.MultiheadAttention(4, 2, kdim=kdim, batch_first=True).eval()
    key = torch.rand(1, 5, kdim)
    found = weight_use(attention, lambda: attention(torch.rand(1, 2, 4), key, torch.rand(1, 5, 4)))
    assert (found.called, found.read) == ((), ("out_proj",))


def test_layer_inside_a_layer():
    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return super().forward(x) + self.inner(x) @ self.inner.weight

    module = nn.Sequential(Adapted())
    found = weight_use(module, lambda: module(torch.rand(2, 3)))
    assert (found.called, found.read) == (("0.inner",), ("0.inner",))  # its own forward leaves the outer one out


def test_nothing_stays_behind_when_the_call_fails():
    module = Reading(lambda x, layer: layer(x[:, :2]))
    with pytest.raises(RuntimeError):
        weight_use(module, lambda: module(torch.rand(2, 3)))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("name", TINY)
def test_of_the_six_only_the_pooler_of_hunyuan_is_read(name):
    denoiser = tiny(name)
    inputs = tiny_inputs(name, denoiser)
    found = weight_use(denoiser, lambda: denoiser(**inputs))
    quantized = {path for path, _ in weight_layers(denoiser, FAMILIES[name].slot_rules)}
    assert set(found.read) == (POOLER if name == "hunyuan" else set())
    assert set(found.called) == quantized and not found.asked and not found.idle


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_all_layers_but_those_read_may_hold_their_weights_elsewhere(name):
    denoiser = tiny(name)
    inputs = tiny_inputs(name, denoiser)
    expected = denoiser(**inputs, return_dict=False)[0]
    read = weight_use(denoiser, lambda: denoiser(**inputs)).read
    weights_elsewhere(denoiser, except_for=read)
    assert torch.equal(denoiser(**inputs, return_dict=False)[0], expected)
    for path in read:
        with poison(denoiser.get_submodule(path)):
            assert denoiser(**inputs, return_dict=False)[0].isnan().any()
