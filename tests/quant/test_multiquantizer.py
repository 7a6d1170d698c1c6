import pytest
import torch
from conftest import tiny_dit

from errors import InputError
from models.layers import find_slots, free_keys, key_of
from quant import entries as entries_module
from quant import methods, multiquantizer


@pytest.fixture
def built(tmp_path, denoiser, family):
    path = tmp_path / "dit_mq.pt"
    return path, multiquantizer.build(denoiser, family, path)


def test_build_save_load(built, denoiser, family):
    path, entries = built
    loaded = multiquantizer.load(path, denoiser, family)
    slots = find_slots(denoiser, family)
    assert list(loaded) == free_keys(slots) and len(loaded) == len(slots) - 2  # one timestep embedder, not two
    for key, entry in loaded.items():
        assert entry["fingerprint"] == entries[key]["fingerprint"]
        for name, parameters in entry["parameters"].items():
            weight = multiquantizer.slot_weight(denoiser, slots[key], family)
            quantized = methods.apply(name, weight, parameters)
            assert entry["errors"][name] == methods.error(weight, quantized)


def test_file_holds_no_weights(built, denoiser, family):
    content = torch.load(built[0], weights_only=True)
    for entry in content["slots"].values():
        for parameters in entry["parameters"].values():
            assert all(tensor.numel() <= 16 * entry["shape"][0] for tensor in parameters.values())


def test_other_weights_are_refused_by_name(built, denoiser, family):
    with torch.no_grad():
        denoiser.transformer_blocks[1].ff.net[2].weight[3, 4] += 0.5
    with pytest.raises(InputError, match=r"transformer_blocks\.1\.ff\.net\.2"):
        multiquantizer.load(built[0], denoiser, family)


def test_untied_weights_are_refused_by_name(built, denoiser, family):
    with torch.no_grad():
        denoiser.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.weight[0, 0] += 0.5
    with pytest.raises(InputError, match=r"blocks\.1\.norm1\.emb\.timestep_embedder\.linear_2"):
        multiquantizer.load(built[0], denoiser, family)


def test_missing_layers_are_named(built, tmp_path, denoiser, family):
    content = torch.load(built[0], weights_only=True)
    del content["slots"][key_of("proj_out_2")]
    torch.save(content, tmp_path / "less.pt")
    with pytest.raises(InputError, match="proj_out_2"):
        multiquantizer.load(tmp_path / "less.pt", denoiser, family)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "sdxl"}, "of sdxl, not of dit"),
        ({"version": 99}, "version 99"),
        ({"format": "x"}, "not a multiquantizer"),
    ],
)
def test_foreign_files_are_refused(built, tmp_path, denoiser, family, change, message):
    torch.save(torch.load(built[0], weights_only=True) | change, tmp_path / "foreign.pt")
    with pytest.raises(InputError, match=message):
        multiquantizer.load(tmp_path / "foreign.pt", denoiser, family)


def damage_parameter(method, name, value):
    def damage(content):
        content["slots"][key_of("proj_out_1")]["parameters"][method][name] = value

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.update(slots=[1, 2]),
        lambda content: content["slots"].update({key_of("proj_out_1"): "text"}),
        lambda content: content["slots"][key_of("proj_out_1")].pop("fingerprint"),
        lambda content: content["slots"][key_of("proj_out_1")]["parameters"].pop("kmeans-3"),
        lambda content: content["slots"][key_of("proj_out_1")]["errors"].update({"mse-3": "text"}),
        damage_parameter("mse-4", "scale", torch.ones(3)),
        damage_parameter("mse-4", "scale", torch.full([32], torch.nan)),
        damage_parameter("mse-4", "zero_point", torch.ones(32)),
        damage_parameter("kmeans-4", "centroids", torch.ones(32, 40)),
        damage_parameter("kmeans-3", "centroids", torch.arange(32 * 8.0).flip(0).view(32, 8)),
        damage_parameter("kmeans_all-4", "centroids", torch.ones(2, 8)),
    ],
)
def test_damaged_files_are_refused(built, tmp_path, denoiser, family, damage):
    content = torch.load(built[0], weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "damaged.pt")
    with pytest.raises(InputError, match=r"damaged\.pt: damaged multiquantizer"):
        multiquantizer.load(tmp_path / "damaged.pt", denoiser, family)


def test_damaged_checkpoint_starts_anew(tmp_path, denoiser, family):
    (tmp_path / "mq.pt.partial").write_bytes(b"nothing of use")
    assert len(multiquantizer.build(denoiser, family, tmp_path / "mq.pt")) == 19


def test_missing_file_says_how_to_make_it(tmp_path, denoiser, family):
    with pytest.raises(InputError, match=r"dit_multiquantizer\.py"):
        multiquantizer.load(tmp_path / "none.pt", denoiser, family)


def test_interrupted_build_goes_on(tmp_path, denoiser, family, monkeypatch):
    """A build stopped after five layers fits only the others when started again, to the same result."""
    path = tmp_path / "mq.pt"
    fitted = []

    def fit_five(weight):
        if len(fitted) == 5:
            raise KeyboardInterrupt
        fitted.append(weight)
        return entries_module.fit_entry(weight)

    monkeypatch.setattr(multiquantizer, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(multiquantizer, "fit_entry", fit_five)
    with pytest.raises(KeyboardInterrupt):
        multiquantizer.build(denoiser, family, path)
    assert not path.exists() and len(torch.load(f"{path}.partial", weights_only=True)["slots"]) == 5

    again = []
    monkeypatch.setattr(multiquantizer, "fit_entry", lambda w: again.append(w) or entries_module.fit_entry(w))
    entries = multiquantizer.build(denoiser, family, path)
    assert len(again) == len(entries) - 5
    assert not path.with_suffix(".pt.partial").exists()
    undisturbed = multiquantizer.build(denoiser, family, tmp_path / "other.pt")
    assert torch.load(path, weights_only=True)["slots"].keys() == undisturbed.keys()
    for key in entries:
        assert entries[key]["errors"] == undisturbed[key]["errors"]


def test_nan_weight_is_named(tmp_path, denoiser, family):
    with torch.no_grad():
        denoiser.proj_out_1.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"proj_out_1.*NaN"):
        multiquantizer.build(denoiser, family, tmp_path / "mq.pt")


def test_precision_of_the_run_does_not_matter(denoiser, family):
    """Half-precision weights, as on a GPU, have the fingerprints of the same values in float32."""
    slots = find_slots(denoiser, family)
    half = tiny_dit().half()
    for slot in slots.values():
        one, two = (multiquantizer.slot_weight(d, slot, family) for d in (denoiser, half))
        assert entries_module.fingerprint(one) == entries_module.fingerprint(two)
