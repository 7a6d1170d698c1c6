"""Files in the published format, made here step by step as the published code makes them."""

import numpy as np
import pytest
import torch
from conftest import SPLIT_FAMILIES, tiny, tiny_dit, tiny_model
from sklearn.cluster import KMeans
from test_uaq import published_search

from errors import InputError
from models.families import FAMILIES
from quant import multiquantizer, published, uaq
from quant.registry import SEARCH_SPACE, quantizer
from quant.slots import find_slots, free_keys

SIX = {word: quantizer(word) for word in SEARCH_SPACE}


def published_kmeans(weight, bits, per_channel):
    rows = weight.reshape(len(weight), -1) if per_channel else weight.reshape(1, -1)
    out = []
    for row in rows.numpy():
        fitted = KMeans(min(2**bits, len(np.unique(row))), max_iter=100, n_init=1, random_state=0).fit(row[:, None])
        out.append(torch.from_numpy(fitted.cluster_centers_[fitted.labels_, 0]).to(weight.dtype))
    return torch.stack(out).reshape(weight.shape)


def published_uaq(weight, bits):
    found = [published_search(channel.float(), bits)[:2] for channel in weight]
    return torch.tensor(found).T.reshape(2, len(weight), *[1] * (weight.ndim - 1)).to(weight.dtype)


def published_uaq_weight(weight, pair, bits):
    """What the published forward pass computes with, in the weights' precision."""
    codes = torch.clamp((weight / pair[0]).round() + pair[1], 0, 2**bits - 1)
    return (codes - pair[1]) * pair[0]


@pytest.fixture(scope="module")
def published_file(tmp_path_factory):
    model = tiny_model("dit", tiny_dit(layers=1))
    content = {}
    for key, slot in model.slots.items():
        weight = model.weight(key)
        for name, method in SIX.items():
            if method.algorithm == "mse":
                tensor = published_uaq(weight, method.bits)
            else:
                tensor = published_kmeans(weight, method.bits, per_channel=method.algorithm == "kmeans")
            content[f"{slot.file_key}.quant_params.{name}"] = tensor
            content[f"{slot.file_key}.loss_dict.{name}"] = torch.tensor([0.1]).half()
    path = tmp_path_factory.mktemp("published") / "dit_mq.pt"
    torch.save(content, path)
    return path, content, model


def test_converts_to_the_same_weights(published_file):
    path, content, model = published_file
    loaded = multiquantizer.load(path, model)
    assert loaded.slots == model.slots and list(loaded.entries) == free_keys(model.slots)
    for key, entry in loaded.entries.items():
        weight = model.weight(key)
        for name, method in SIX.items():
            ours = method.apply(weight, entry["parameters"][name])
            theirs = content[f"{model.slots[key].file_key}.quant_params.{name}"]
            if method.algorithm == "mse":
                theirs = published_uaq_weight(weight, theirs, method.bits)
            assert torch.equal(ours, theirs), (key, name)
            assert entry["errors"][name] == uaq.total_error(weight, theirs)


def test_converted_file_saves_and_loads(published_file, tmp_path):
    path, _, model = published_file
    loaded = multiquantizer.load(path, model)
    multiquantizer.save(loaded, tmp_path / "own.pt")
    again = multiquantizer.load(tmp_path / "own.pt", model)
    assert {k: e["errors"] for k, e in again.entries.items()} == {k: e["errors"] for k, e in loaded.entries.items()}


def test_other_weights_and_missing_keys_are_refused(published_file, tmp_path):
    _path, content, model = published_file
    key = "model.proj_out_1.weight_quantizer"
    less = {k: v for k, v in content.items() if k != f"{key}.quant_params.kmeans-3"}
    torch.save(less, tmp_path / "less.pt")
    with pytest.raises(InputError, match=r"no kmeans-3 for model\.proj_out_1"):
        multiquantizer.load(tmp_path / "less.pt", model)
    torch.save(content | {f"{key}.quant_params.kmeans-3": torch.randn(32, 16).half()}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"kmeans-3 of model\.proj_out_1.*not a clustering"):
        multiquantizer.load(tmp_path / "other.pt", model)


@pytest.mark.parametrize("value", ["text", torch.tensor(1.0), torch.ones(32, 16).int()])
def test_other_values_are_refused(published_file, tmp_path, value):
    _, content, model = published_file
    torch.save(content | {"model.proj_out_1.weight_quantizer.quant_params.mse-3": value}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=r"mse-3 of model\.proj_out_1.* is not a tensor of weights"):
        multiquantizer.load(tmp_path / "odd.pt", model)


def test_published_bytes_by_hand(published_file):
    """The estimate is what the tensors of a real published-format file take."""
    _, content, model = published_file
    assert published.file_bytes(model) == sum(tensor.nbytes for tensor in content.values())


# Split weights. A "published" K-Means weight need only be a clustering, so theirs here are cheap.


def rounded_rows(weight, bits):
    """Each row of `weight` rounded to 2^bits evenly spaced values between its least and its largest."""
    low, high = weight.aminmax(dim=1, keepdim=True)
    step = (high - low).float() / (2**bits - 1)
    return (((weight - low) / step).round() * step + low).to(weight.dtype)


def published_slot(weight, method):
    """A slot's tensor under one method, as a published file holds it."""
    if method.algorithm == "mse":
        pair = torch.stack(uaq.fit(weight, method.bits))
        return pair.reshape(2, len(weight), *[1] * (weight.ndim - 1)).to(weight.dtype)
    rows = 1 if method.algorithm == "kmeans_all" else len(weight)
    return rounded_rows(weight.reshape(rows, -1), method.bits).reshape(weight.shape)


def published_parts(denoiser, family):
    """{file key: weight} of a published file; SDXL's are cut at the layer's output channels, as published."""
    weights = {}
    for slot in find_slots(denoiser, family.slot_rules).values():
        layer = denoiser.get_submodule(slot.module_path)
        weight = layer.weight.detach().to(family.dtype)
        if slot.inputs is not None:
            cut = layer.out_channels if family.name == "sdxl" else slot.inputs[0] or slot.inputs[1]
            weight = weight[:, cut:] if slot.key.part else weight[:, :cut]
        weights[slot.file_key] = weight.contiguous()
    return weights


@pytest.fixture(scope="module")
def published_splits(tmp_path_factory):
    """{family: (path, content, weights)} of a published-style file of each tiny split denoiser."""
    folder, made = tmp_path_factory.mktemp("published"), {}
    for name in SPLIT_FAMILIES:
        weights = published_parts(tiny(name), FAMILIES[name])
        content = {
            f"{key}.quant_params.{method.name}": published_slot(weight, method)
            for key, weight in weights.items()
            for method in SIX.values()
        }
        content |= {k.replace("quant_params", "loss_dict"): torch.tensor([0.1]).half() for k in content}
        torch.save(content, folder / f"{name}_mq.pt")
        made[name] = folder / f"{name}_mq.pt", content, weights
    return made


@pytest.mark.parametrize("name", SPLIT_FAMILIES)
def test_split_files_apply_to_exactly_the_published_weights(name, published_splits):
    path, content, weights = published_splits[name]
    model = multiquantizer.load(path, tiny_model(name))
    slots = model.slots
    assert {slot.file_key: slot.shape for slot in slots.values()} == {key: weight.shape for key, weight in weights.items()}
    for method in SIX.values():
        model.apply(method.name)
        expected = {}  # module path -> the published weights of its parts
        for slot in slots.values():
            theirs = content[f"{slot.file_key}.quant_params.{method.name}"]
            if method.algorithm == "mse":
                theirs = published_uaq_weight(weights[slot.file_key], theirs, method.bits)
            expected.setdefault(slot.module_path, []).append(theirs.float())
        for module_path, halves in expected.items():
            assert torch.equal(model.module.get_submodule(module_path).weight, torch.cat(halves, dim=1)), module_path


def test_published_sdxl_boundaries_are_taken_from_the_shapes(published_splits, tmp_path):
    """The published cut differs from ours in the first resnet of the second and the third up-block."""
    own = tiny_model("sdxl")
    loaded = multiquantizer.load(published_splits["sdxl"][0], own)
    slots = loaded.slots
    moved = {slot.module_path for key, slot in slots.items() if slot != own.slots[key]}
    assert moved == {"up_blocks.1.resnets.0.conv1", "up_blocks.2.resnets.0.conv1"}
    for path, (cut, total) in {"up_blocks.1.resnets.0.conv1": (12, 28), "up_blocks.2.resnets.0.conv1": (8, 20)}.items():
        assert slots[path, 0].inputs == (0, cut) and slots[path, 1].inputs == (cut, total)
    multiquantizer.save(loaded, tmp_path / "own.pt")  # converted, it keeps them
    assert multiquantizer.load(tmp_path / "own.pt", own).slots == slots


@pytest.mark.parametrize("name", SPLIT_FAMILIES)
def test_published_bytes_of_split_files(name, published_splits):
    content = published_splits[name][1]
    assert published.file_bytes(tiny_model(name)) == sum(tensor.nbytes for tensor in content.values())


def test_published_bytes_of_a_part(published_splits):
    content, parts = published_splits["sdxl"][1], FAMILIES["sdxl"].prefixes
    for prefix in parts:
        own = sum(tensor.nbytes for key, tensor in content.items() if key.startswith(f"model.{prefix}."))
        assert published.file_bytes(tiny_model("sdxl"), prefix) == own > 0


SPLIT_KEYS = {
    "hunyuan": "model.blocks.5.skip_linear.weight_quantizer",
    "sdxl": "model.up_blocks.1.resnets.0.conv1.weight_quantizer",
    "sdv15": "model.output_blocks.8.0.skip_connection.weight_quantizer",
}


@pytest.mark.parametrize("ending", ["", "_0"])
@pytest.mark.parametrize("name", SPLIT_FAMILIES)
def test_missing_parts_are_named(name, ending, published_splits, tmp_path):
    missing = SPLIT_KEYS[name] + ending
    less = {key: value for key, value in published_splits[name][1].items() if not key.startswith(f"{missing}.")}
    assert len(less) == len(published_splits[name][1]) - 12
    torch.save(less, tmp_path / "less.pt")
    with pytest.raises(InputError, match=rf"less\.pt: has no [\w-]+ for {missing}$"):
        multiquantizer.load(tmp_path / "less.pt", tiny_model(name))


@pytest.mark.parametrize("name", SPLIT_FAMILIES)
def test_unknown_keys_are_named(name, published_splits, tmp_path):
    unknown = SPLIT_KEYS[name].replace(".weight", ".nowhere.weight")
    more = published_splits[name][1] | {f"{unknown}.quant_params.mse-4": torch.ones(2, 3, 1)}
    torch.save(more, tmp_path / "more.pt")
    with pytest.raises(InputError, match=rf"more\.pt: 1 keys are not of this denoiser, first {unknown}$"):
        multiquantizer.load(tmp_path / "more.pt", tiny_model(name))


def test_keys_of_skipped_layers_are_passed_over(published_splits, tmp_path):
    """Published Hunyuan files quantize the pooler's projections too, though nothing calls them."""
    _, content, _ = published_splits["hunyuan"]
    extra = {f"model.time_extra_emb.pooler.{n}_proj.weight_quantizer.quant_params.mse-4": torch.ones(2, 3) for n in "qkvc"}
    torch.save(content | extra, tmp_path / "more.pt")
    loaded = multiquantizer.load(tmp_path / "more.pt", tiny_model("hunyuan"))
    assert list(loaded.entries) == list(loaded.slots) and not any("pooler" in key.path for key in loaded.slots)


def test_parts_that_do_not_join_are_named(published_splits, tmp_path):
    """A boundary that suits the first part alone leaves the second too wide."""
    _, content, _ = published_splits["sdxl"]
    key = SPLIT_KEYS["sdxl"]
    shorter = {name: content[name][:, :-1] for name in content if name.startswith(f"{key}.quant_params.kmeans")}
    torch.save(content | shorter, tmp_path / "odd.pt")
    with pytest.raises(
        InputError, match=rf"odd\.pt: kmeans-4 of {key}_0 has shape \[12, 16, 3, 3\], the weight \[12, 17, 3, 3\]"
    ):
        multiquantizer.load(tmp_path / "odd.pt", tiny_model("sdxl"))
