"""Modules that are not diffusers': packed, saved and loaded by the library alone."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packed_models import build, change_tensors
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune
from zoo import ZOO

from errors import InputError
from quant import QuantizedModel, digests, load_packed, pretrained, save_packed
from quant.discovery import weight_use
from quant.layers import packed_layers

WEIGHTS = "model.safetensors"


class Scaled(nn.Linear):
    """A layer that does more with its weight than multiply."""

    def forward(self, input):
        return F.linear(input, self.weight * 2, self.bias)


class Network(nn.Module):
    """A layer at two places, a Linear with a forward of its own, weights that are read, tied and not quantized."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 16)
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.convolution = nn.Conv1d(16, 16, 3, padding=1)
        self.scaled = Scaled(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.read = nn.Linear(16, 16, bias=False)
        self.out = nn.Linear(16, 9, bias=False)
        self.out.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("positions", torch.arange(7.0)[:, None] / 7, persistent=False)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions  # [N, 7, 16]
        x = self.again(F.gelu(self.first(x)))
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x)[0] + self.scaled(x) @ self.read.weight
        return self.out(self.norm(x.transpose(1, 2)).transpose(1, 2))


def network(seed=0):
    torch.manual_seed(seed)
    return Network().eval()


TOKENS = torch.arange(14).view(2, 7) % 9


@torch.no_grad()
def run(module):
    return module(TOKENS)


@pytest.fixture
def saved(tmp_path):
    """(folder of a packed network, its output)."""
    module = network()
    model = QuantizedModel(module)
    words = ["kmeans-3", "mse-4", "kmeans_all-4"]
    model.pack({key: words[number % 3] for number, key in enumerate(model.slots)}, show=False)
    save_packed(module, tmp_path / "saved")
    return tmp_path / "saved", run(module)


def test_ten_lines_do(tmp_path):
    torch.manual_seed(0)
    module, input = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 8)), torch.randn(3, 24)
    model = QuantizedModel(module)
    model.pack("mse-4", show=False)
    save_packed(module, tmp_path)
    other = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 8))
    with torch.no_grad():
        assert torch.equal(load_packed(other, tmp_path)(input), module(input))


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_it_computes_the_same_when_loaded(saved, where):
    folder, output = saved
    module = network(seed=1)
    if where == "meta":
        positions = module.positions
        module = module.to("meta")
        module.positions = positions  # which is not of what is saved
    assert load_packed(module, folder) is module
    assert torch.equal(run(module), output)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_what_is_packed_and_what_is_left(saved):
    folder, _ = saved
    module = load_packed(network(1), folder)
    paths = [path for path, _ in packed_layers(module)]
    assert paths == ["first", "again", "convolution", "attention.out_proj", "read", "out"]
    assert module.first is module.again and type(module.scaled) is Scaled
    tensors = load_file(folder / WEIGHTS)
    assert "again.codes" not in tensors and "first.codes" in tensors and "scaled.weight" in tensors


def test_weights_that_are_read_are_found_and_can_be_left():
    module = network()
    found = weight_use(module, lambda: module(TOKENS))
    assert found.read == ("attention.out_proj", "read", "out")  # `out` shares the embedding's
    QuantizedModel(module, exclude=found.read).pack("mse-4", show=False)
    assert [path for path, _ in packed_layers(module)] == ["first", "again", "convolution"]
    assert run(module).isfinite().all()


def test_packed_it_is_the_module_with_the_decoded_weights(saved):
    folder, output = saved
    module, reference = load_packed(network(1), folder), network()
    reference.out.weight = nn.Parameter(reference.out.weight.clone())  # the embedding's is not quantized
    for path, layer in packed_layers(module):
        reference.get_submodule(path).weight = nn.Parameter(layer.decoded(), requires_grad=False)
    assert torch.equal(run(reference.requires_grad_(False)), output)


def test_it_can_be_saved_again_and_copied(saved, tmp_path):
    folder, output = saved
    module = copy.deepcopy(load_packed(network(1), folder))
    save_packed(module, tmp_path / "again")
    for name in (WEIGHTS, "quantization_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    save_packed(load_packed(network(2), folder), folder)  # over what it is mapped from
    assert torch.equal(run(load_packed(network(3), folder)), output)


def test_ties_are_kept(tmp_path):
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    module[1].load_state_dict(module[0].state_dict())
    QuantizedModel(module, ties={"1": "0"}).pack("kmeans-4", show=False)
    save_packed(module, tmp_path)
    assert sorted(load_file(tmp_path / WEIGHTS)) == ["0.bias", "0.codes", "0.table", "1.bias", digests.NAME]
    loaded = load_packed(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), tmp_path)
    assert torch.equal(loaded[1].decoded(), module[0].decoded())


def test_the_precision_that_it_computes_in_is_kept(tmp_path):
    module = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    QuantizedModel(module).pack("mse-4", show=False)
    save_packed(module, tmp_path)
    loaded = load_packed(nn.Sequential(nn.Linear(8, 8)), tmp_path)
    assert loaded[0].weight.dtype == loaded[0].bias.dtype == loaded[0].table.dtype == torch.bfloat16


class Tied(nn.Module):
    """Layers, and an embedding, that have one weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 16)
        self.first, self.second, self.out = (nn.Linear(16, 16) for _ in range(3))
        self.second.weight = self.first.weight
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        return self.out(self.second(F.gelu(self.first(self.embedding(tokens)))))


def test_a_weight_that_modules_share_is_quantized_for_each_alone():
    torch.manual_seed(0)
    module = Tied().eval()
    before, embedding = run(module), module.embedding.weight.clone()
    model = QuantizedModel(module)
    model.apply({"first": "mse-2", "second": "kmeans-4", "out": "mse-3"})
    applied = run(module)
    assert torch.equal(module.embedding.weight, embedding)
    model.restore()
    assert torch.equal(run(module), before)
    model.pack({"first": "mse-2", "second": "kmeans-4", "out": "mse-3"}, show=False)
    assert torch.equal(run(module), applied) and not torch.equal(applied, before)


PARAMETRIZED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.parametrize("parametrize", PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_a_parametrized_weight_is_packed_as_it_is(parametrize, tmp_path):
    def made(seed):
        torch.manual_seed(seed)
        return nn.Sequential(parametrize(nn.Linear(16, 16)), nn.Linear(16, 8)).eval()

    module, input = made(0), torch.randn(3, 16)
    with torch.no_grad():
        floats = module(input)
        QuantizedModel(module).pack("kmeans-8", show=False)
        torch.testing.assert_close(module(input), floats, rtol=1e-4, atol=1e-4)
        save_packed(module, tmp_path)
        assert torch.equal(load_packed(made(1), tmp_path)(input), module(input))


def test_weights_that_are_made_at_every_call_or_not_yet_are_told():
    pruned = nn.Sequential(prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5))
    with pytest.raises(InputError, match=r"^0: a hook makes its weight of weight_orig"):
        QuantizedModel(pruned)
    with pytest.raises(InputError, match=r"^0: has no weight yet"):
        QuantizedModel(nn.Sequential(nn.LazyLinear(8)))


def test_what_other_libraries_would_save_and_not_read_is_not_saved(tmp_path):
    """transformers fills the weights that it misses at random."""
    entry = ZOO["pixart"]
    pipeline = entry.build_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    QuantizedModel(pipeline.text_encoder).pack("mse-4", show=False)
    drawn = entry.draw(pipeline)
    for each in (pipeline, copy.deepcopy(pipeline.text_encoder)):
        with pytest.raises(InputError, match="T5EncoderModel: its save_pretrained"):
            each.save_pretrained(tmp_path)
    save_packed(pipeline.text_encoder, tmp_path / "packed")
    other = entry.build_pipeline()
    other.set_progress_bar_config(disable=True)
    load_packed(other.text_encoder, tmp_path / "packed")
    assert np.array_equal(entry.draw(other), drawn)
    denoiser = build("pixart")
    QuantizedModel(nn.ModuleDict({"denoiser": denoiser})).pack("mse-4", show=False)
    with pytest.raises(InputError, match="PixArtTransformer2DModel: its save_pretrained"):
        denoiser.save_pretrained(tmp_path)


def test_a_float_module_and_an_offloaded_one_are_not_saved(tmp_path):
    with pytest.raises(InputError, match="no packed layer"):
        save_packed(network(), tmp_path)
    module = QuantizedModel(network()).pack("mse-4", show=False)
    with pytest.raises(InputError, match="offloaded"):
        save_packed(module.to("meta"), tmp_path)
    assert not list(tmp_path.iterdir())


def change_json(folder, **changes):
    path = folder / "quantization_config.json"
    told = json.loads(path.read_text()) | changes
    del told["digest"]
    path.write_text(json.dumps(told | {"digest": pretrained._digest_of(told)}))


DAMAGE = {
    "cut": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
    "no tensors": lambda f: (f / WEIGHTS).unlink(),
    "no configuration": lambda f: (f / "quantization_config.json").unlink(),
    "no JSON": lambda f: (f / "quantization_config.json").write_text("{"),
    "a list": lambda f: (f / "quantization_config.json").write_text("[]"),
    "of another program": lambda f: change_json(f, quant_method="other"),
    "version": lambda f: change_json(f, version=7),
    "no weights": lambda f: change_json(f, weights=None),
    "same a list": lambda f: change_json(f, same=[]),
    "same as nothing": lambda f: change_json(f, same={"x": "y"}),
    "precision": lambda f: change_json(f, dtypes={"first": "int8"}),
    "precision of nothing": lambda f: change_json(f, dtypes={"first": "nn"}),
    "another method": lambda f: change_json(f, weights={"first": "mse-3"}),
    "one too many": lambda f: change_tensors(f / WEIGHTS, lambda t: t.__setitem__("x", torch.ones(1))),
    "one too few": lambda f: change_tensors(f / WEIGHTS, lambda t: t.pop("norm.bias")),
    "float shape": lambda f: change_tensors(f / WEIGHTS, lambda t: t.__setitem__("norm.bias", torch.ones(3))),
    "codes": lambda f: change_tensors(f / WEIGHTS, lambda t: t.__setitem__("first.codes", t["first.codes"][1:].clone())),
    "table": lambda f: change_tensors(f / WEIGHTS, lambda t: t["first.table"].fill_(torch.nan)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused_and_the_module_left_as_it_was(saved, damage):
    folder, _ = saved
    module = network(1)
    before = run(module)
    damage(folder)
    with pytest.raises(InputError) as told:
        load_packed(module, folder)
    assert "\n" not in str(told.value)
    assert torch.equal(run(module), before) and not list(packed_layers(module))


def test_another_module_is_refused(saved):
    with pytest.raises(InputError, match="is not in a Sequential"):
        load_packed(nn.Sequential(nn.Linear(8, 8)), saved[0])
    with pytest.raises(InputError, match="positions"):
        load_packed(network(1).to("meta"), saved[0])
