"""What benchmarks/quality.py counts and keeps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import embedded_quality, quality, quality_peers
from benchmarks.quality_arms import ARMS, Arm, configuration_arm
from benchmarks.stored_size import Stored, average_bits, of_words
from errors import InputError
from models.families import FAMILIES
from models.geometry import real_shapes
from models.pipelines import load_denoiser
from quant.files import save_pickle
from quant.slots import ANY_MODULE, WeightKey, find_slots

ROWS, WIDTH = 4, 48
# Bits of a weight of 4 rows of 48: codes; and by hand tables of 16-bit numbers, over 48 or, if all share them, 192 weights.
BITS = {
    "float": 16,
    "mse-4": 4 + 2 * 16 / 48,
    "mse-3": 3 + 2 * 16 / 48,
    "kmeans-4": 4 + 16 * 16 / 48,
    "kmeans-3": 3 + 8 * 16 / 48,
    "kmeans_all-4": 4 + 16 * 16 / 192,
    "kmeans_all-3": 3 + 8 * 16 / 192,
}
PEER_BITS = {
    "sdnq-uint4": 4 + 2 * 16 / 48,
    "sdnq-uint3-svd4": 3 + 2 * 16 / 48 + 4 * (4 + 48) * 16 / 192,
    "sdnq-uint3-codebook": 3 + 8 * 16 / 48,
    "quanto-int4": 4 + 2 * 16 / 48,
    "nf4": 4 + 32 / 64,
    "gguf-q4_0": 16,  # 48 inputs are not whole blocks of 32
    "gguf-q4_0-padded": 2 * 18 * 8 / 48,
}


@pytest.fixture
def sampler():
    torch.manual_seed(0)
    family = SimpleNamespace(
        dtype=torch.float16, quantization={"dtype": torch.float16}, precision_bits=16, slot_rules=ANY_MODULE
    )
    denoiser = nn.Sequential(nn.Linear(WIDTH, ROWS))
    denoiser[0].weight.data *= torch.tensor([1, 0.1, 1, 0.1])[:, None]  # so that a scale from a wrong place shows
    return SimpleNamespace(family=family, denoiser=denoiser.half().float())


def built(arm, sampler):
    """(average bits, relative error of the weight) of an arm."""
    weight = sampler.denoiser[0].weight.detach().clone()
    shapes = {key: slot.shape for key, slot in find_slots(sampler.denoiser).items()}
    denoiser, stored = arm.build(sampler.denoiser, sampler)
    return average_bits(stored, shapes), ((denoiser[0].weight - weight).norm() / weight.norm()).item()


@pytest.mark.parametrize("name", BITS)
def test_bits_of_ours(name, sampler):
    bits, error = built(ARMS[name], sampler)
    assert bits == pytest.approx(BITS[name])
    assert error == 0 if name == "float" else 0.02 < error < 0.2


def test_bits_of_a_configuration(sampler, tmp_path):
    """A file's arm is known by what is in it."""
    file = tmp_path / "chosen.pkl"
    save_pickle({"model.0.weight_quantizer": "mse-3"}, file)
    arm = configuration_arm(file, "chosen")
    assert built(arm, sampler)[0] == pytest.approx(BITS["mse-3"])
    save_pickle({"model.0.weight_quantizer": "mse-4"}, file)
    assert configuration_arm(file, "chosen").version != arm.version


@pytest.mark.parametrize("name", PEER_BITS)
def test_bits_of_peers(name, sampler):
    """Theirs are counted from their tensors, and their weights are near the float ones."""
    pytest.importorskip(ARMS[name].package.replace("-", "."))
    bits, error = built(ARMS[name], sampler)
    assert bits == pytest.approx(PEER_BITS[name])
    assert error < 0.2


def test_reckoned_bytes_are_those_of_tensors():
    codes = torch.zeros(10, dtype=torch.uint8)
    held = quality_peers.Held(torch.zeros(4, 5), (codes,), Stored(4))
    quality_peers.check_bytes("layer", held)
    with pytest.raises(RuntimeError, match="layer: its tensors take 10 bytes, and 15 were reckoned"):
        quality_peers.check_bytes("layer", held._replace(stored=Stored(6)))


def test_bits_at_another_size():
    """Two weights of 6 and 2 numbers: tables weigh as at real size, weights as here."""
    keys = WeightKey("a"), WeightKey("b")
    own, real = dict(zip(keys, [(2, 3), (1, 2)], strict=True)), dict(zip(keys, [(4, 32), (8, 16)], strict=True))
    stored = of_words({keys[0]: "mse-4", keys[1]: None}, 16)
    assert average_bits(stored, own) == pytest.approx((6 * (4 + 32 / 3) + 2 * 16) / 8)
    assert average_bits(stored, own, real) == pytest.approx((6 * (4 + 32 / 32) + 2 * 16) / 8)


def test_each_weight_is_stored_once():
    """A split weight is stored by its parts, or as a whole layer."""
    shapes = {WeightKey("a", 0): (2, 3), WeightKey("a", 1): (2, 5)}
    assert average_bits({"a": Stored(4, 16)}, shapes) == 4 + 16 / 8
    with pytest.raises(InputError, match="each once"):
        average_bits({WeightKey("a", 0): Stored(4)}, shapes)
    with pytest.raises(InputError, match="b: is not of this denoiser"):
        average_bits({"a": Stored(4), "b": Stored(4)}, shapes)


@pytest.mark.parametrize("name", ["pixart_alpha", "hunyuan", "sdxl"])
def test_real_shapes_are_of_the_embedded_models_weights(name):
    family = FAMILIES[name]
    slots = find_slots(load_denoiser(family, "embedded", torch.device("meta")), family.slot_rules)
    real = real_shapes(family)
    assert real.keys() == slots.keys()
    assert sum(shape.numel() for shape in real.values()) == family.fp_weights


def test_a_real_weight_by_hand():
    """UAQ of a linear layer of PixArt's 1,152 inputs: a scale and a zero point for each row of them."""
    key = WeightKey("transformer_blocks.0.attn1.to_q")
    real = {key: real_shapes(FAMILIES["pixart_alpha"])[key]}
    assert average_bits(of_words({key: "mse-4"}, 16), {key: (48, 48)}, real) == pytest.approx(4 + 32 / 1152)


class Counting(quality.Measuring):
    """Measures without a model, counts, and is interrupted at an arm."""

    stop, measured = None, ()

    def _load(self):
        pass

    def _build(self, arm):
        return arm.title, {"avg_bits": 4.0, "real_avg_bits": 4.0, "build_seconds": 0.0}

    def _distances(self, denoiser, seed):
        if denoiser == self.stop:
            raise KeyboardInterrupt
        self.measured += ((denoiser, seed),)
        return {"fid": 1.0 + seed, "image_mse": 0.0, "feature_mse": 0.0, "draw_seconds": 0.0}


@pytest.fixture
def args(tmp_path):
    return SimpleNamespace(n_imgs=2, guidance=2.0, outdir=tmp_path)


def test_interrupted_measurements_go_on(args):
    arms = {name: Arm(name, None) for name in "abc"}
    first = Counting(FAMILIES["dit"], args)
    first.stop = "b"
    results, _ = quality.measure_all(arms, first, [0, 2])
    assert list(results) == ["a"] and results["a"]["fid"] == 2 and results["a"]["fid std"] == pytest.approx(2**0.5)
    again = Counting(FAMILIES["dit"], args)
    results, _ = quality.measure_all(arms, again, [0, 2, 4])
    assert list(results) == ["a", "b", "c"]
    assert again.measured == (("a", 4), ("b", 0), ("b", 2), ("b", 4), ("c", 0), ("c", 2), ("c", 4))
    assert results["a"]["fid by seed"] == [1, 3, 5]


def test_what_results_depend_on(args):
    """Another number of images, family or version is measured again."""
    arm = Arm("a", None)
    Counting(FAMILIES["dit"], args).measure("a", arm, [0])
    args.n_imgs = 3
    others = [(FAMILIES["dit"], arm), (FAMILIES["sdxl"], arm), (FAMILIES["sdxl"], Arm("a", None, version="2"))]
    for family, other in others:
        measuring = Counting(family, args)
        measuring.measure("a", other, [0])
        assert measuring.measured


def test_a_peer_that_is_not_installed_is_left_out(args, capsys):
    arms = {"x": Arm("x", None, "no-such-package"), "a": Arm("a", None)}
    results, left_out = quality.measure_all(arms, Counting(FAMILIES["dit"], args), [0])
    assert list(results) == ["a"] and left_out == {"x": "no-such-package is not installed"}
    assert "x: left out, no-such-package is not installed" in capsys.readouterr().out


def test_a_peer_that_fails_is_left_out(args):
    def fail(_denoiser, _sampler):
        raise ValueError("no such layer\nand more")

    class Building(Counting):
        def _build(self, arm):
            return arm.build(None, None)

    _, left_out = quality.measure_all({"x": Arm("x", fail, "torch")}, Building(FAMILIES["dit"], args), [0])
    assert left_out == {"x": "does not run: no such layer"}
    with pytest.raises(ValueError, match="no such layer"):  # of ours it is an error
        quality.measure_all({"x": Arm("x", fail)}, Building(FAMILIES["dit"], args), [0])


@pytest.mark.slow
def test_images_are_measured(args, monkeypatch):
    """Full precision is at no distance from itself, and 3 bits are; scales weigh less at real size."""
    monkeypatch.setattr(embedded_quality, "digit_reference_folder", lambda: None)
    monkeypatch.setattr(embedded_quality.fid, "reference_statistics", lambda *_: (np.zeros(64), np.eye(64)))
    arms = {name: ARMS[name] for name in ("float", "mse-3")}
    results, _ = quality.measure_all(arms, quality.Measuring(FAMILIES["pixart_alpha"], args), [0])
    for name in ("image_mse", "feature_mse"):
        assert results["float"][name] == 0 < results["mse-3"][name]
    assert results["float"]["avg_bits"] == results["float"]["real_avg_bits"] == 16
    assert 3 < results["mse-3"]["real_avg_bits"] < 3.1 < results["mse-3"]["avg_bits"] < 3.6
