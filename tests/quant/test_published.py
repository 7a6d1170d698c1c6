"""Files in the published format, made here step by step as the published code makes them."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from test_uaq import published_search

from errors import InputError
from models.layers import find_slots, free_keys
from quant import methods, multiquantizer, published


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
def published_file(tmp_path_factory, family):
    from conftest import tiny_dit

    denoiser = tiny_dit(layers=1)
    content = {}
    for key, slot in find_slots(denoiser, family).items():
        weight = multiquantizer.slot_weight(denoiser, slot, family)
        for name, method in methods.METHODS.items():
            if method.algorithm == "mse":
                tensor = published_uaq(weight, method.bits)
            else:
                tensor = published_kmeans(weight, method.bits, per_channel=method.algorithm == "kmeans")
            content[f"{key}.quant_params.{name}"] = tensor
            content[f"{key}.loss_dict.{name}"] = torch.tensor([0.1]).half()
    path = tmp_path_factory.mktemp("published") / "dit_mq.pt"
    torch.save(content, path)
    return path, content, denoiser


def test_converts_to_the_same_weights(published_file, family):
    path, content, denoiser = published_file
    entries = multiquantizer.load(path, denoiser, family)
    slots = find_slots(denoiser, family)
    assert list(entries) == free_keys(slots)
    for key, entry in entries.items():
        weight = multiquantizer.slot_weight(denoiser, slots[key], family)
        for name, method in methods.METHODS.items():
            ours = methods.apply(name, weight, entry["parameters"][name])
            theirs = content[f"{key}.quant_params.{name}"]
            if method.algorithm == "mse":
                theirs = published_uaq_weight(weight, theirs, method.bits)
            assert torch.equal(ours, theirs), (key, name)
            assert entry["errors"][name] == methods.error(weight, theirs)


def test_converted_file_saves_and_loads(published_file, family, tmp_path):
    path, _, denoiser = published_file
    entries = multiquantizer.load(path, denoiser, family)
    multiquantizer.save(entries, family, tmp_path / "own.pt")
    again = multiquantizer.load(tmp_path / "own.pt", denoiser, family)
    assert {k: e["errors"] for k, e in again.items()} == {k: e["errors"] for k, e in entries.items()}


def test_other_weights_and_missing_keys_are_refused(published_file, family, tmp_path):
    _path, content, denoiser = published_file
    key = "model.proj_out_1.weight_quantizer"
    less = {k: v for k, v in content.items() if k != f"{key}.quant_params.kmeans-3"}
    torch.save(less, tmp_path / "less.pt")
    with pytest.raises(InputError, match=r"no kmeans-3 for model\.proj_out_1"):
        multiquantizer.load(tmp_path / "less.pt", denoiser, family)
    torch.save(content | {f"{key}.quant_params.kmeans-3": torch.randn(32, 16).half()}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"kmeans-3 of model\.proj_out_1.*not a clustering"):
        multiquantizer.load(tmp_path / "other.pt", denoiser, family)


def test_untied_weights_are_refused(published_file, family):
    """The file holds the first block's embedder alone, which says nothing of another that differs."""
    from conftest import tiny_dit

    denoiser = tiny_dit(layers=2)
    with torch.no_grad():
        denoiser.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.weight[0, 0] += 0.5
    with pytest.raises(InputError, match=r"blocks\.1\.norm1\.emb\.timestep_embedder\.linear_1: its weights differ"):
        multiquantizer.load(published_file[0], denoiser, family)


@pytest.mark.parametrize("value", ["text", torch.tensor(1.0), torch.ones(32, 16).int()])
def test_other_values_are_refused(published_file, family, tmp_path, value):
    _, content, denoiser = published_file
    torch.save(content | {"model.proj_out_1.weight_quantizer.quant_params.mse-3": value}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=r"mse-3 of model\.proj_out_1.* is not a tensor of weights"):
        multiquantizer.load(tmp_path / "odd.pt", denoiser, family)


def test_published_bytes_by_hand(published_file, family):
    """The estimate is what the tensors of a real published-format file take."""
    _, content, denoiser = published_file
    assert published.file_bytes(denoiser, family) == sum(tensor.nbytes for tensor in content.values())
