import pickle
import re

import numpy as np
import pytest
import torch
from conftest import SPLIT_FAMILIES, tiny, tiny_model

from errors import InputError
from models.families import FAMILIES
from quant import config
from quant.file_keys import by_file_key
from quant.files import save_pickle
from quant.registry import SEARCH_SPACE, quantizer
from quant.slots import WeightKey, find_slots, free_keys, ties_of

TIED = "model.transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1.weight_quantizer"


@pytest.fixture
def slots(denoiser, family):
    return find_slots(denoiser, family.slot_rules)


def test_random_depends_on_seed_and_index_alone(slots):
    one = config.draw_random(slots, seed=1, index=5)
    assert one == config.draw_random(slots, seed=1, index=5)
    assert one != config.draw_random(slots, seed=1, index=6) and one != config.draw_random(slots, seed=2, index=5)
    config.check(one, ties_of(slots))


def test_random_covers_the_space(slots):
    drawn = [config.draw_random(slots, 0, index) for index in range(300)]
    shares = np.array([np.mean([method.endswith("3") for method in d.values()]) for d in drawn])
    assert set().union(*(d.values() for d in drawn)) == set(SEARCH_SPACE)
    assert shares.min() < 0.1 and shares.max() > 0.9 and abs(shares.mean() - 0.5) < 0.06  # p ~ U(0, 1)
    algorithms = [method.split("-")[0] for d in drawn for method in d.values()]
    assert all(abs(algorithms.count(name) / len(algorithms) - 1 / 3) < 0.02 for name in config.ALGORITHMS)


def test_random_respects_its_bounds(slots):
    for index in range(20):
        assert all(m.endswith("-4") for m in config.draw_random(slots, 0, index, 0, 0).values())
        assert all(m.endswith("-3") for m in config.draw_random(slots, 0, index, 1, 1).values())


def test_save_and_load(tmp_path, slots):
    drawn = config.draw_random(slots, 0, 0)
    config.save(drawn, slots, tmp_path / "c.pkl")
    assert config.load(tmp_path / "c.pkl", slots) == drawn


def test_free_keys_suffice(tmp_path, slots):
    drawn = config.draw_random(slots, 0, 0)
    config.save({key: drawn[key] for key in free_keys(slots)}, slots, tmp_path / "c.pkl")
    assert config.load(tmp_path / "c.pkl", slots) == drawn


def test_uniform(slots):
    assert set(config.load("uniform:kmeans-4", slots).values()) == {"kmeans-4"}


def test_rows_of_a_cache_are_no_configuration(tmp_path, slots):
    """Labelled rows are read by stages/q_config.py."""
    save_pickle([{"config": by_file_key(config.uniform(slots, "mse-4"), slots)}], tmp_path / "quant_cache.pkl")
    with pytest.raises(InputError, match=r"quant_cache\.pkl: not a configuration"):
        config.load(tmp_path / "quant_cache.pkl", slots)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.nowhere.weight_quantizer": "mse-4"}, r"model\.nowhere"),
        ({"model.proj_out_1.weight_quantizer": "mse-9"}, r"'mse-9' for model\.proj_out_1"),
        ({"model.proj_out_1.weight_quantizer": ["x"] * 4}, r"'x' for model\.proj_out_1"),
        ({"model.proj_out_1.weight_quantizer": []}, r"\[\] for model\.proj_out_1"),
        ({"model.proj_out_1.weight_quantizer": None}, r"None for model\.proj_out_1"),
        ({TIED.format(1): "mse-3"}, r"blocks\.1\.norm1\.emb.*blocks\.0\.norm1\.emb"),
    ],
)
def test_bad_configurations_are_named(tmp_path, slots, change, message):
    save_pickle(by_file_key(config.uniform(slots, "mse-4"), slots) | change, tmp_path / "c.pkl")
    with pytest.raises(InputError, match=message):
        config.load(tmp_path / "c.pkl", slots)


def test_missing_key_is_named(tmp_path, slots):
    less = by_file_key(config.uniform(slots, "mse-4"), slots)
    del less["model.proj_out_2.weight_quantizer"]
    save_pickle(less, tmp_path / "c.pkl")
    with pytest.raises(InputError, match=r"1 of .* missing, first model\.proj_out_2"):
        config.load(tmp_path / "c.pkl", slots)


@pytest.mark.parametrize("content", [3, "text", {1: 2}, None])
def test_other_pickles_are_refused(tmp_path, slots, content):
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"c\.pkl: not a configuration"):
        config.load(tmp_path / "c.pkl", slots)


def test_unknown_uniform_method(slots):
    with pytest.raises(InputError, match="unknown method 'mse-9'"):
        config.load("uniform:mse-9", slots)


OTHERS = ["mse-8", "kmeans-2", "kmeans_all-5", "mse-4-g16"]


@pytest.mark.parametrize("word", OTHERS)
def test_methods_outside_the_search_space_are_taken(word, slots, load_tiny):
    """Fitted, they are applied and told like the six."""
    denoiser, slots, _ = load_tiny("hunyuan")
    model = tiny_model("hunyuan", denoiser)
    weights, entries = {key: model.weight(key) for key in slots}, model.fit([word])
    chosen = config.load(f"uniform:{word}", slots)
    config.check_file(f"uniform:{word}", by_file_key(entries, slots))
    model.apply(chosen)
    described = config.describe(chosen, slots, entries, precision_bits=16)
    for key, slot in slots.items():
        expected = quantizer(word).apply(weights[key], entries[slot.tie]["parameters"][word])
        assert torch.equal(slot.part_of(denoiser.get_submodule(slot.module_path).weight), expected.float())
        size = quantizer(word).size_bytes(slot.shape, 16)
        assert described[key] == [word, slot.shape.numel() * 2, size, entries[slot.tie]["errors"][word]]


def test_methods_that_were_not_fitted_are_told(slots, load_tiny):
    """The first weight that lacks one is named, and what the multiquantizer has"""
    _, slots, entries = load_tiny("dit")
    chosen, first = config.uniform(slots, "mse-8"), next(iter(slots.values()))
    held = "mse-4, mse-3, kmeans-4, kmeans-3, kmeans_all-4, kmeans_all-3"
    for name, refuse in (
        (first.module_path, lambda: config.describe(chosen, slots, entries, 16)),
        (first.file_key, lambda: config.check_file("uniform:mse-8", by_file_key(entries, slots))),
    ):
        message = rf"^{re.escape(name)}: the multiquantizer has only {held}, not mse-8; [^\n]*$"
        with pytest.raises(InputError, match=message):
            refuse()


def test_what_random_configurations_need_is_told(load_tiny):
    _, slots, entries = load_tiny("dit")
    entries = by_file_key(entries, slots)
    config.check_space(entries)
    key = list(entries)[3]
    parameters = {word: own for word, own in entries[key]["parameters"].items() if word != "kmeans-3"}
    with pytest.raises(InputError, match=rf"^{re.escape(key)}: the multiquantizer has only .*, not kmeans-3; "):
        config.check_space(entries | {key: entries[key] | {"parameters": parameters}})


# Keys written by hand of the tiny denoisers: a weight, and one part of a split weight where the family has any.
KEYS = {
    "pixart_alpha": ["model.transformer_blocks.1.attn2.to_out.0.weight_quantizer"],
    "pixart_sigma": ["model.adaln_single.linear.weight_quantizer"],
    "hunyuan": ["model.pos_embed.proj.weight_quantizer", "model.blocks.4.skip_linear.weight_quantizer_0"],
    "sdxl": ["model.add_embedding.linear_1.weight_quantizer", "model.up_blocks.0.resnets.2.conv1.weight_quantizer_0"],
    "sdv15": ["model.input_blocks.6.0.op.weight_quantizer", "model.output_blocks.0.0.skip_connection.weight_quantizer_0"],
    "dit": ["model.transformer_blocks.1.norm1.linear.weight_quantizer"],
}
EACH_KEY = pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in KEYS.items() for key in keys])


def published_style(name, path, seed=0):
    """A {key: method} pickle of the tiny denoiser, as published ones are: plain, every key, no order promised."""
    slots = find_slots(tiny(name), FAMILIES[name].slot_rules)
    content = dict(reversed(by_file_key(config.draw_random(slots, seed, 0), slots).items()))
    path.write_bytes(pickle.dumps(content, protocol=4))
    return slots, content


@pytest.mark.parametrize("name", FAMILIES)
def test_published_pickles_load(name, tmp_path):
    slots, content = published_style(name, tmp_path / "c.pkl")
    loaded = config.load(tmp_path / "c.pkl", slots)
    assert by_file_key(loaded, slots) == content and list(loaded) == list(slots)
    assert set(KEYS[name]) <= content.keys()


@EACH_KEY
def test_missing_keys_of_each_family_are_named(name, key, tmp_path):
    slots, content = published_style(name, tmp_path / "c.pkl")
    save_pickle({k: v for k, v in content.items() if k != key}, tmp_path / "c.pkl")
    with pytest.raises(InputError, match=rf"c\.pkl: 1 of {len(slots)} keys are missing, first {key}$"):
        config.load(tmp_path / "c.pkl", slots)


@EACH_KEY
def test_unknown_keys_of_each_family_are_named(name, key, tmp_path):
    slots, content = published_style(name, tmp_path / "c.pkl")
    unknown = key.removesuffix("_0") + "_1"
    save_pickle(content | {unknown: "mse-4"}, tmp_path / "c.pkl")
    with pytest.raises(InputError, match=rf"c\.pkl: 1 keys are not of this denoiser, first {unknown}$"):
        config.load(tmp_path / "c.pkl", slots)


def test_a_weight_is_named_by_its_path_and_a_part_by_its_number():
    """Of SDv1.5 too, whose files have other names; a part named by itself has the last word."""
    model, split = tiny_model("sdv15"), "up_blocks.0.resnets.0.conv_shortcut"
    by_path = {key.path: "mse-4" for key in model.slots}
    chosen = model.configuration({(split, 1): "mse-3"} | by_path)
    assert chosen[split, 0] == "mse-4" and chosen[split, 1] == "mse-3" and list(chosen) == list(model.slots)
    told = by_file_key(chosen, model.slots)
    assert [key for key, method in told.items() if method == "mse-3"] == [KEYS["sdv15"][1]]
    with pytest.raises(InputError, match=r"first up_blocks\.0\.resnets\.0\.conv_shortcut \(part 2\)$"):
        model.configuration(by_path | {WeightKey(split, 2): "mse-3"})
    with pytest.raises(InputError, match=r"1 keys are not of this denoiser, first nowhere$"):
        model.configuration(by_path | {"nowhere": "mse-3"})


@pytest.mark.parametrize("name", FAMILIES)
def test_another_family_s_configuration_is_refused(name, tmp_path):
    other = {"pixart_alpha": "dit", "pixart_sigma": "hunyuan", "hunyuan": "sdv15", "sdxl": "sdv15", "sdv15": "sdxl"}
    slots = find_slots(tiny(name), FAMILIES[name].slot_rules)
    published_style(other.get(name, "pixart_alpha"), tmp_path / "c.pkl")
    with pytest.raises(InputError, match="keys are not of this denoiser"):
        config.load(tmp_path / "c.pkl", slots)


@pytest.mark.parametrize("name", FAMILIES)
def test_random_configurations_check_and_load(name, tmp_path):
    slots = find_slots(tiny(name), FAMILIES[name].slot_rules)
    for index in range(5):
        drawn = config.draw_random(slots, 0, index)
        config.check(drawn, ties_of(slots))
        config.save({key: drawn[key] for key in free_keys(slots)}, slots, tmp_path / "c.pkl")
        assert config.load(tmp_path / "c.pkl", slots) == drawn


@pytest.mark.parametrize("name", SPLIT_FAMILIES)
def test_the_parts_of_a_weight_are_drawn_apart(name):
    slots = find_slots(tiny(name), FAMILIES[name].slot_rules)
    rest = [key for key in slots if key.part]
    drawn = [config.draw_random(slots, 0, index) for index in range(20)]
    pairs = {(configuration[key.path, 0], configuration[key]) for configuration in drawn for key in rest}
    assert rest and len(pairs) > 20  # of 36, at random


@pytest.mark.parametrize(
    ("method", "overhead_numbers"),
    [("mse-4", (2 * 16, 2 * 16)), ("kmeans-3", (8 * 16, 8 * 16)), ("kmeans_all-3", (8, 8)), ("kmeans_all-4", (16, 16))],
)
def test_each_part_pays_its_own_overhead(method, overhead_numbers, load_tiny):
    """A [16, 32] skip_linear is two [16, 16] halves, each with its own scales or centroids of two bytes."""
    _, slots, entries = load_tiny("hunyuan")
    described = config.describe(config.uniform(slots, method), slots, entries, precision_bits=16)
    keys = [("blocks.5.skip_linear", part) for part in (0, 1)]
    for key, overhead in zip(keys, overhead_numbers, strict=True):
        assert described[key][:3] == [method, 16 * 16 * 2, 16 * 16 * quantizer(method).bits // 8 + 2 * overhead]
        assert described[key][3] == entries[key]["errors"][method]
    assert described[keys[0]][3] != described[keys[1]][3]
