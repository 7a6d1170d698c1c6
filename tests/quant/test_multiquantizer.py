import copy
import re
import shutil

import pytest
import torch
from conftest import SPLIT_FAMILIES, tiny, tiny_dit, tiny_model

from errors import InputError
from models.families import FAMILIES
from quant import entries as entries_module
from quant import model as model_module
from quant import multiquantizer
from quant.file_keys import by_file_key, file_key
from quant.model import QuantizedModel
from quant.registry import quantizer
from quant.slots import WeightKey, find_slots, free_keys


@pytest.fixture
def built(tmp_path, model):
    path = tmp_path / "dit_mq.pt"
    return path, multiquantizer.build(model, path)


def with_entries(model, entries):
    return QuantizedModel.of_slots(model.module, model.slots, model.dtype, entries, model.name)


def same_entries(one, other):
    """Whether two multiquantizers hold the same slots, in the same order, fingerprints, errors and parameters."""
    plain = [{k: {n: v for n, v in e.items() if n != "parameters"} for k, e in mq.items()} for mq in (one, other)]
    if plain[0] != plain[1] or list(one) != list(other):
        return False
    return all(
        parameters.keys() == other[key]["parameters"][method].keys()
        and all(torch.equal(tensor, other[key]["parameters"][method][name]) for name, tensor in parameters.items())
        for key, entry in one.items()
        for method, parameters in entry["parameters"].items()
    )


@pytest.mark.parametrize("name", ["dit", *SPLIT_FAMILIES])
def test_build_save_load(name, tmp_path, load_tiny):
    family = FAMILIES[name]
    denoiser, slots, entries = load_tiny(name)
    assert slots == find_slots(denoiser, family.slot_rules) and list(entries) == free_keys(slots)
    model = QuantizedModel.of_slots(denoiser, slots, family.dtype, entries, name)
    multiquantizer.save(model, tmp_path / "again.pt")
    assert same_entries(multiquantizer.load(tmp_path / "again.pt", model).entries, entries)
    for key, entry in entries.items():
        weight = model.weight(key)
        assert entry["shape"] == list(weight.shape) == list(slots[key].shape)
        for method, parameters in entry["parameters"].items():
            assert entry["errors"][method] == pytest.approx(quantizer(method).error(weight, parameters), rel=2e-6)


def test_tied_weights_are_fitted_once(built):
    assert len(built[1]) == 21 - 2  # one timestep embedder, not two


@pytest.mark.parametrize("name", SPLIT_FAMILIES)
def test_parts_are_fitted_to_their_own_channels(name, load_tiny):
    denoiser, slots, entries = load_tiny(name)
    split = [slot for slot in slots.values() if slot.key.part]
    for rest in split:
        weight = denoiser.get_submodule(rest.module_path).weight.detach().to(FAMILIES[name].dtype)
        first = slots[rest.module_path, 0]
        channels = [first.shape[1], rest.shape[1]]
        for slot, part in zip((first, rest), weight.split(channels, dim=1), strict=True):
            assert entries[slot.key]["fingerprint"] == entries_module.fingerprint(part)
    assert split


def test_file_holds_no_weights(built):
    content = torch.load(built[0], weights_only=True)
    for entry in content["slots"].values():
        for parameters in entry["parameters"].values():
            assert all(tensor.numel() <= 16 * entry["shape"][0] for tensor in parameters.values())


def test_other_weights_are_refused_by_name(built, model):
    with torch.no_grad():
        model.module.transformer_blocks[1].ff.net[2].weight[3, 4] += 0.5
    with pytest.raises(InputError, match=r"transformer_blocks\.1\.ff\.net\.2"):
        multiquantizer.load(built[0], model)


def test_untied_weights_are_refused_by_name(denoiser):
    with torch.no_grad():
        denoiser.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.weight[0, 0] += 0.5
    with pytest.raises(InputError, match=r"blocks\.1\.norm1\.emb\.timestep_embedder\.linear_2: its weights differ"):
        tiny_model("dit", denoiser)


def test_missing_layers_are_named(built, tmp_path, model):
    content = torch.load(built[0], weights_only=True)
    del content["slots"][file_key("proj_out_2")]
    torch.save(multiquantizer.with_digests(content), tmp_path / "less.pt")
    with pytest.raises(InputError, match="proj_out_2"):
        multiquantizer.load(tmp_path / "less.pt", model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "sdxl"}, "of sdxl, not of dit"),
        ({"version": 99}, "version 99"),
        ({"format": "x"}, "not a multiquantizer"),
    ],
)
def test_foreign_files_are_refused(built, tmp_path, model, change, message):
    torch.save(torch.load(built[0], weights_only=True) | change, tmp_path / "foreign.pt")
    with pytest.raises(InputError, match=message):
        multiquantizer.load(tmp_path / "foreign.pt", model)


def damage_parameter(method, name, value):
    def damage(content):
        content["slots"][file_key("proj_out_1")]["parameters"][method][name] = value

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.update(slots=[1, 2]),
        lambda content: content["slots"].update({file_key("proj_out_1"): "text"}),
        lambda content: content["slots"][file_key("proj_out_1")].pop("fingerprint"),
        lambda content: content["slots"][file_key("proj_out_1")]["parameters"].pop("kmeans-3"),
        lambda content: content["slots"][file_key("proj_out_1")]["errors"].update({"mse-3": "text"}),
        lambda content: content["slots"][file_key("proj_out_1")]["errors"].update({"mse-3": 10**400}),
        damage_parameter("mse-4", "scale", torch.ones(3)),
        damage_parameter("mse-4", "scale", torch.full([32], torch.nan)),
        damage_parameter("mse-4", "zero_point", torch.ones(32)),
        damage_parameter("kmeans-4", "centroids", torch.ones(32, 40)),
        damage_parameter("kmeans-3", "centroids", torch.arange(32 * 8.0).flip(0).view(32, 8)),
        damage_parameter("kmeans_all-4", "centroids", torch.ones(2, 8)),
        damage_parameter("kmeans-4", "boundaries", torch.zeros(32, 10_000)),
        damage_parameter("mse-4", "boundaries", torch.zeros(32)),
        damage_parameter("mse-4", "zero_point", torch.full([32], 2**62)),
        damage_parameter("mse-4", "zero_point", torch.full([32], 2**31 - 1, dtype=torch.int32)),
        lambda content: content["slots"][file_key("proj_out_1")].update(more=1),
    ],
)
def test_damaged_files_are_refused(built, tmp_path, model, damage):
    content = torch.load(built[0], weights_only=True)
    damage(content)
    if isinstance(content["slots"], dict):
        content = multiquantizer.with_digests(content)
    torch.save(content, tmp_path / "damaged.pt")
    with pytest.raises(InputError, match=r"damaged\.pt: damaged multiquantizer"):
        multiquantizer.load(tmp_path / "damaged.pt", model)


def test_entries_hold_whatever_words(tmp_path, model):
    """Not the six, nor the same in all: the file loads, is no full multiquantizer, and what it lacks is fitted."""
    words = [["mse-8"], ["kmeans-2", "mse-4-g16"], ["kmeans_all-5"]]
    for number, key in enumerate(free_keys(model.slots)):
        model.fit_weight(key, words[number % 3])
    entries, model.entries = model.entries, {}
    assert all(entries_module.is_entry(entry) for entry in entries.values())
    multiquantizer.save(with_entries(model, entries), tmp_path / "other.pt")
    assert same_entries(multiquantizer.load(tmp_path / "other.pt", model).entries, entries)
    assert not multiquantizer.holds(tmp_path / "other.pt", model)
    shutil.copy(tmp_path / "other.pt", tmp_path / "mq.pt.partial")
    assert all(entries_module.has_words(entry) for entry in multiquantizer.build(model, tmp_path / "mq.pt").values())


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(precision_bits=32),
        lambda content: content.update(prefix="proj_out_1"),
        lambda content: content.update(more=1),
        lambda content: content.pop("digest"),
        lambda content: content.pop("digests"),
        lambda content: content["slots"].pop(file_key("proj_out_1")),
        lambda content: content["slots"][file_key("proj_out_1")]["errors"].update({"mse-3": 0.5}),
        lambda content: content["slots"][file_key("proj_out_1")]["parameters"]["mse-3"]["scale"].mul_(2),
        lambda content: content["slots"][file_key("proj_out_1")].update(fingerprint="0" * 32),
        damage_parameter("mse-4", "scale", torch.ones(32).to_sparse()),
    ],
)
def test_what_is_not_as_it_was_written_is_refused(built, tmp_path, model, change):
    content = torch.load(built[0], weights_only=True)
    change(content)
    torch.save(content, tmp_path / "changed.pt")
    with pytest.raises(InputError, match=r"changed\.pt: damaged multiquantizer .*; make it again"):
        multiquantizer.load(tmp_path / "changed.pt", model)


def test_a_file_of_the_version_before_is_refused(built, tmp_path, model):
    torch.save(torch.load(built[0], weights_only=True) | {"version": 1}, tmp_path / "old.pt")
    with pytest.raises(InputError, match=r"old\.pt: multiquantizer version 1, this program reads 2; make it again"):
        multiquantizer.load(tmp_path / "old.pt", model)


def change_words(change):
    def damage(content):
        entry = content["slots"][file_key("proj_out_1")]
        for each in ("parameters", "errors"):
            entry[each] = change(entry[each])

    return damage


@pytest.mark.parametrize(
    "change",
    [lambda held: {}, lambda held: held | {"mse-9": held["mse-4"]}, lambda held: held | {3: held["mse-4"]}, lambda held: []],
)
def test_entries_of_no_words_or_unknown_ones_are_damaged(built, tmp_path, model, change):
    content = torch.load(built[0], weights_only=True)
    change_words(change)(content)
    torch.save(multiquantizer.with_digests(content), tmp_path / "damaged.pt")
    with pytest.raises(InputError, match=r"damaged\.pt: damaged multiquantizer"):
        multiquantizer.load(tmp_path / "damaged.pt", model)


def test_damaged_checkpoint_starts_anew(tmp_path, model):
    (tmp_path / "mq.pt.partial").write_bytes(b"nothing of use")
    assert len(multiquantizer.build(model, tmp_path / "mq.pt")) == 19


def test_interrupted_build_goes_on(tmp_path, model, monkeypatch):
    """A build stopped after five layers fits only the others when started again, to the same file."""
    path = tmp_path / "mq.pt"
    fitted = []

    def fit_five(weight, words):
        if len(fitted) == 5:
            raise KeyboardInterrupt
        fitted.append(weight)
        return entries_module.fit_entry(weight, words)

    monkeypatch.setattr(model_module, "fit_entry", fit_five)
    with pytest.raises(KeyboardInterrupt):
        multiquantizer.build(model, path)
    assert not path.exists() and len(torch.load(f"{path}.partial", weights_only=True)["slots"]) == 5

    again = []
    monkeypatch.setattr(model_module, "fit_entry", lambda *given: again.append(given) or entries_module.fit_entry(*given))
    entries = multiquantizer.build(tiny_model("dit"), path)
    assert len(again) == len(entries) - 5
    assert not path.with_suffix(".pt.partial").exists()
    multiquantizer.build(tiny_model("dit"), tmp_path / "other.pt")
    assert path.read_bytes() == (tmp_path / "other.pt").read_bytes()


def test_what_a_model_has_fitted_is_not_fitted_again(tmp_path, model, monkeypatch):
    model.fit(show=False)
    monkeypatch.setattr(model_module, "fit_entry", lambda *_: pytest.fail("fitted again"))
    assert same_entries(multiquantizer.build(model, tmp_path / "mq.pt"), model.entries)
    assert list(torch.load(tmp_path / "mq.pt", weights_only=True)["slots"]) == list(by_file_key(model.entries, model.slots))


def test_nan_weight_is_named(tmp_path, model):
    with torch.no_grad():
        model.module.proj_out_1.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"proj_out_1.*NaN"):
        multiquantizer.build(model, tmp_path / "mq.pt")


def test_precision_of_the_run_does_not_matter(model):
    """Half-precision weights, as on a GPU, have the fingerprints of the same values in float32."""
    half = tiny_model("dit", tiny_dit().half())
    for key in model.slots:
        assert entries_module.fingerprint(model.weight(key)) == entries_module.fingerprint(half.weight(key))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folder of a tiny SDXL's seven parts, each fitted by itself."""
    folder, model = tmp_path_factory.mktemp("parts"), tiny_model("sdxl")
    for prefix in FAMILIES["sdxl"].prefixes:
        multiquantizer.build(model, multiquantizer.part_path(folder / "sdxl_mq.pt", prefix), prefix)
    return folder


@pytest.fixture
def stitched(parts, tmp_path):
    """Stitch a copy of the parts, changed as asked: stitched(model, {prefix: change of its content or None})."""

    def stitch(model, changes=None):
        folder = shutil.copytree(parts, tmp_path / "parts")
        for prefix, change in (changes or {}).items():
            file = folder / f"sdxl_{prefix}_mq.pt"
            content = torch.load(file, weights_only=True)
            file.unlink()
            if change is not None:
                change(content["slots"])
                torch.save(multiquantizer.with_digests(content), file)
        return multiquantizer.stitch(model, folder / "sdxl_mq.pt", FAMILIES["sdxl"].prefixes)

    return stitch


def test_part_paths(tmp_path):
    assert multiquantizer.part_path(tmp_path / "sdxl_mq.pt", "conv_in") == tmp_path / "sdxl_conv_in_mq.pt"
    assert multiquantizer.part_path(tmp_path / "other.pt", "conv_in") == tmp_path / "other_conv_in_mq.pt"


def test_each_part_holds_its_own_modules(parts, load_tiny):
    _, slots, entries = load_tiny("sdxl")
    for prefix in FAMILIES["sdxl"].prefixes:
        content = torch.load(parts / f"sdxl_{prefix}_mq.pt", weights_only=True)
        expected = [key for key in entries if slots[key].module_path.split(".")[0] == prefix]
        assert (
            list(content["slots"]) == [slots[key].file_key for key in expected] and expected and content["prefix"] == prefix
        )


def test_stitched_parts_are_what_one_build_gives(stitched, load_tiny, tmp_path):
    _, slots, entries = load_tiny("sdxl")
    assert same_entries(stitched(tiny_model("sdxl")), entries)
    loaded = multiquantizer.load(tmp_path / "parts/sdxl_mq.pt", tiny_model("sdxl"))
    assert loaded.slots == slots and same_entries(loaded.entries, entries)


def entry_of(parts, prefix, key):
    return torch.load(parts / f"sdxl_{prefix}_mq.pt", weights_only=True)["slots"][file_key(key)]


@pytest.mark.parametrize(("holder", "owner"), [("conv_out", "conv_in"), ("conv_in", "conv_out")])
def test_overlapping_parts_are_refused(stitched, parts, holder, owner):
    """Whichever of the two is read first, the later file and the key are named."""
    entry = entry_of(parts, owner, owner)
    message = rf"sdxl_conv_out_mq\.pt: overlaps .*sdxl_conv_in_mq\.pt, both have {re.escape(file_key(owner))};"
    with pytest.raises(InputError, match=message):
        stitched(tiny_model("sdxl"), {holder: lambda slots: slots.update({file_key(owner): entry})})


def test_a_missing_part_is_refused(stitched, tmp_path):
    with pytest.raises(InputError, match=r"sdxl_mid_block_mq\.pt: no such part; make it with --prefix mid_block"):
        stitched(tiny_model("sdxl"), {"mid_block": None})
    assert not (tmp_path / "parts/sdxl_mq.pt").exists()


def test_a_part_that_misses_layers_is_refused(stitched):
    key = file_key("up_blocks.1.resnets.0.conv1", 1)
    message = rf"sdxl_up_blocks_mq\.pt: 1 of \d+ layers are missing, first {re.escape(key)}$"
    with pytest.raises(InputError, match=message):
        stitched(tiny_model("sdxl"), {"up_blocks": lambda slots: slots.pop(key)})


def test_a_part_with_other_layers_is_refused(stitched, parts):
    entry = entry_of(parts, "conv_in", "conv_in")
    with pytest.raises(InputError, match=r"sdxl_conv_in_mq\.pt: 1 keys are not of this denoiser, first model\.nowhere"):
        stitched(tiny_model("sdxl"), {"conv_in": lambda slots: slots.update({file_key("nowhere"): entry})})


def test_parts_of_other_weights_are_refused(stitched):
    denoiser = tiny("sdxl")
    with torch.no_grad():
        denoiser.mid_block.resnets[0].conv2.weight[0, 0] += 0.5
    message = r"sdxl_mid_block_mq\.pt: made from other weights .*\(layer mid_block\.resnets\.0\.conv2\)"
    with pytest.raises(InputError, match=message):
        stitched(tiny_model("sdxl", denoiser))


def test_a_part_alone_is_no_multiquantizer(parts):
    file = parts / "sdxl_down_blocks_mq.pt"
    with pytest.raises(InputError, match=r"layers are missing, first model\.conv_in\.weight_quantizer"):
        multiquantizer.load(file, tiny_model("sdxl"))


def test_other_weights_in_one_part_of_a_layer_are_refused(tiny_mq, load_tiny):
    denoiser, slots, _ = load_tiny("hunyuan")
    rest = slots["blocks.5.skip_linear", 1]
    with torch.no_grad():
        denoiser.get_submodule(rest.module_path).weight[0, rest.inputs[0]] += 0.5
    with pytest.raises(InputError, match=r"layer blocks\.5\.skip_linear"):
        multiquantizer.load(tiny_mq("hunyuan"), tiny_model("hunyuan", denoiser))


def test_the_split_is_the_file_s(tmp_path, load_tiny):
    """A file whose weights are cut elsewhere loads with its own boundaries."""
    denoiser, slots, entries = load_tiny("sdxl")
    model = tiny_model("sdxl", denoiser)
    key, rest = (WeightKey("up_blocks.1.resnets.0.conv1", part) for part in (0, 1))
    weight = denoiser.get_submodule(slots[key].module_path).weight.detach().half()
    moved = dict(entries)
    moved[key], moved[rest] = (entries_module.fit_entry(part) for part in (weight[:, :5], weight[:, 5:]))
    multiquantizer.save(with_entries(model, moved), tmp_path / "moved.pt")
    own_slots = multiquantizer.load(tmp_path / "moved.pt", model).slots
    assert own_slots[key].inputs == (0, 5) and own_slots[rest].inputs == (5, weight.shape[1])
    wrong = copy.deepcopy(moved)
    wrong[rest] = entries[rest]  # the parts do not join
    multiquantizer.save(with_entries(model, wrong), tmp_path / "wrong.pt")
    with pytest.raises(InputError, match=r"other weights than this model's \(layer up_blocks\.1\.resnets\.0\.conv1\)"):
        multiquantizer.load(tmp_path / "wrong.pt", model)
