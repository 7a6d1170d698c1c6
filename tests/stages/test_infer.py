"""Images of the embedded DiT: kept as they come, gone on with, and drawn by weights that are held once."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, script
from PIL import Image

from models import drawing, pipelines
from models.families import FAMILIES
from models.pipelines import Sampler
from quant.exchangeable import ExchangeableLayer
from quant.layers import PackedLayer
from stages import infer, pictures, sampling
from stages.run_folder import only_run_in

COUNT = 5
FLAGS = ("--model_id", "embedded", "--steps", 2, "--cls_id", 3, 8, "--n_imgs", COUNT, "--batch_size", 2)


def drawn(folder):
    """{path in the run's folder: array} of its images."""
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in sorted(folder.glob("*/*.png"))}


def names(*rows, count=COUNT):
    return {f"{row}/{index:03d}.png" for row in rows for index in range(count)}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, image in one.items():
        assert np.abs(image.astype(int) - other[name]).max() <= 1, name  # a rounding at most


@pytest.fixture
def run_infer(mq, tmp_path, run_script):
    """Run the stage with FLAGS and others, which may be other values of them; returns (exit code, printed text)."""
    return lambda *flags: run_script(infer, "dit", *FLAGS, "--multi_chkpt", mq, "--outdir", tmp_path, *flags)


@pytest.fixture(scope="module")
def whole(mq, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    command = script("dit_infer.py", *FLAGS, "--multi_chkpt", mq, "--outdir", folder, "--run", "whole")
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return folder / "whole"


class Batches:
    """Stands in for `generate_batches`: notes what is asked for, stops after some batches, breaks chosen images."""

    def __init__(self, monkeypatch):
        self.asked, self.stop_after, self.broken = [], None, {}
        monkeypatch.setattr(pictures, "generate_batches", self)

    def __call__(self, sampler, prompts, settings, name, first, last):
        self.asked += [(name, index) for index in range(first, last)]
        for batch in drawing.generate_batches(sampler, prompts, settings, name, first, last):
            if self.stop_after == 0:
                raise KeyboardInterrupt
            self.stop_after = self.stop_after and self.stop_after - 1
            broken = [index in self.broken.get(name, ()) for index in batch.indices]
            yield batch._replace(broken=np.array(broken))


@pytest.fixture
def batches(monkeypatch):
    return Batches(monkeypatch)


@pytest.mark.parametrize("done", [1, 4])
def test_a_run_that_was_cut_off_goes_on(whole, run_infer, batches, tmp_path, done):
    """In the full-precision images, or the quantized ones after: what is there stays, what is missing is drawn."""
    batches.stop_after = done
    code, printed = run_infer()
    (folder,) = tmp_path.iterdir()
    assert code == 130 and f"`--run {folder.name}` with the same flags goes on" in printed
    assert re.fullmatch(r"\d{4}(-\d\d){5}", folder.name) and not (folder / "contact_sheet.png").exists()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.png")}
    assert len(kept) == (2, COUNT + 2)[done > 3]
    batches.stop_after, batches.asked = None, []
    code, printed = run_infer("--run", folder.name, "--batch_size", 3, "--no-pack")
    assert code == 0, printed
    assert len(batches.asked) == 2 * COUNT - len(kept)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert_same(drawn(folder), drawn(whole))
    assert Image.open(folder / "contact_sheet.png").size[0] > COUNT * 64


@pytest.fixture
def made(whole, tmp_path):
    """The folder of a run that is done."""
    return Path(shutil.copytree(whole, tmp_path / "done"))


def test_what_is_there_is_not_drawn_again(made, run_infer, batches, monkeypatch):
    before = drawn(made)
    assert before.keys() == names("full_precision", "samples")
    assert run_infer("--run", "done", "--n_imgs", 7)[0] == 0
    assert batches.asked == [(name, index) for name in ("full precision", "quantized") for index in (5, 6)]
    more = drawn(made)
    assert more.keys() == names("full_precision", "samples", count=7)
    assert all(np.array_equal(more[name], image) for name, image in before.items())

    (made / "samples" / "001.png").write_bytes((made / "samples" / "001.png").read_bytes()[:-100])  # cut off
    (made / "samples" / "003.png").unlink()
    batches.asked = []
    assert run_infer("--run", "done", "--no_compare")[0] == 0
    assert batches.asked == [("quantized", 1), ("quantized", 3)]
    assert_same(drawn(made), more)

    monkeypatch.setattr(infer, "load_for", None)  # nothing is loaded where nothing is to be drawn
    code, printed = run_infer("--run", "done", "--device", "cpu")
    assert code == 0 and f"all {COUNT} images are there" in printed


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--steps", 3), "--steps 2, not 3"),
        (("--seed", 1), "--seed 42, not 1"),
        (("--cls_id", 3), "--cls_id [3, 8], not [3]"),
        (("--quant_act",), "--quant_act False, not integer"),
        (("--q_config", "uniform:mse-3"), "--q_config uniform:mse-4, not uniform:mse-3"),
        (("--guidance", 1.5), "--guidance 4.0, not 1.5"),
    ],
)
def test_images_of_other_flags_do_not_mix(made, run_infer, flags, said):
    before = drawn(made)
    code, printed = run_infer("--run", "done", "--n_imgs", 6, *flags)
    assert code == 2 and f"its images were made with {said}" in printed and "another --run" in printed
    assert drawn(made).keys() == before.keys()


def test_images_without_settings_are_not_gone_on_with(made, run_infer):
    (made / "sampling_config.yaml").unlink()
    code, printed = run_infer("--run", "done")
    assert code == 2 and "has images but no sampling_config.yaml" in printed


def test_a_second_run_in_the_same_folder_is_refused(run_infer, tmp_path):
    with only_run_in(tmp_path / "mine"):
        code, printed = run_infer("--run", "mine")
    assert code == 2 and f"process {os.getpid()} on " in printed and not drawn(tmp_path / "mine")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a"])
def test_a_run_is_named_by_one_folder(run_infer, tmp_path, name):
    code, printed = run_infer("--run", name)
    assert code == 2 and "is not the name of a folder in --outdir" in printed and not list(tmp_path.iterdir())


@pytest.mark.parametrize("run", [(), ("--run", "mine")])
def test_a_run_that_never_began_leaves_no_folder(run_infer, tmp_path, run):
    assert run_infer("--q_config", "uniform:nothing", *run)[0] == 2
    assert not list(tmp_path.iterdir())


def test_images_of_no_numbers_do_not_lose_the_others(run_infer, batches, tmp_path):
    batches.broken = {"full precision": [1], "quantized": [0, 4]}
    code, printed = run_infer("--run", "mine")
    assert code == 2
    last = printed.strip().splitlines()[-1]
    assert "full_precision/001.png, samples/000.png, samples/004.png: values that are not numbers" in last
    lost = {"full_precision/001.png", "samples/000.png", "samples/004.png"}
    assert drawn(tmp_path / "mine").keys() == names("full_precision", "samples") - lost
    assert (tmp_path / "mine" / "contact_sheet.png").exists()
    batches.broken, batches.asked = {}, []
    assert run_infer("--run", "mine")[0] == 0
    assert batches.asked == [("full precision", 1), ("quantized", 0), ("quantized", 4)]
    assert drawn(tmp_path / "mine").keys() == names("full_precision", "samples")


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("compare", [True, False])
def test_weights_are_quantized_before_they_are_placed_and_held_once(run_infer, monkeypatch, pack, compare):
    """Full precision first, by the plain denoiser; without it the device never holds float weights that are going to go."""
    placed = []
    place = Sampler.place

    def noting(sampler, device):
        modules = list(sampler.denoiser.modules())
        exchangeable = [layer for layer in modules if isinstance(layer, ExchangeableLayer)]
        packed = [layer for layer in modules if isinstance(layer, PackedLayer)]
        assert all(layer.original is None for layer in exchangeable)
        placed.append((len(exchangeable) > 0, len(packed) > 0))
        place(sampler, device)

    monkeypatch.setattr(Sampler, "place", noting)
    flags = ("--n_imgs", 1, *([] if pack else ["--no-pack"]), *([] if compare else ["--no_compare"]))
    assert run_infer(*flags)[0] == 0
    assert placed == ([(False, False)] if compare else []) + [(not pack, pack)]


def test_configurations_are_of_the_weights_whatever_is_computed_in(run_infer, tmp_path):
    """bfloat16 holds fewer digits than the weights: quantizing what it has made of them would give other codes."""
    flags = ("--n_imgs", 2, "--compute_dtype", "bfloat16")
    assert run_infer("--run", "a", *flags)[0] == run_infer("--run", "b", *flags, "--no_compare")[0] == 0
    assert run_infer("--run", "c", "--n_imgs", 2, "--no_compare")[0] == 0
    one, other, in_float32 = (drawn(tmp_path / run) for run in "abc")
    assert_same({name: one[name] for name in other}, other)
    with pytest.raises(AssertionError):
        assert_same(in_float32, other)


@pytest.mark.parametrize(
    ("flags", "bfloat16_units", "found"),
    [
        ((), True, (None, True, False)),
        (("--model_id", "FOLDER"), True, ("bfloat16", True, False)),
        (("--model_id", "FOLDER"), False, (None, True, False)),
        (("--model_id", "FOLDER", "--compute_dtype", "float32"), True, ("float32", True, False)),
        (("--quant_act",), True, (None, True, "integer")),
        (("--quant_act", "simulated"), True, (None, True, "simulated")),
        (("--quant_act", "--no-pack"), True, (None, False, "simulated")),
    ],
)
def test_what_is_computed_in(monkeypatch, tmp_path, flags, bfloat16_units, found):
    folder = str(shutil.copytree(Path(pipelines.__file__).parent / "embedded" / "dit", tmp_path / "model"))  # anyone's
    monkeypatch.setattr(infer, "has_bfloat16_units", lambda: bfloat16_units)
    argv = ["infer", "--device", "cpu", "--model_id", "embedded", *(folder if each == "FOLDER" else each for each in flags)]
    monkeypatch.setattr("sys.argv", argv)
    args = infer.parse_args(FAMILIES["dit"])
    assert (args.compute_dtype, args.pack, args.quant_act) == found


def test_integers_need_packed_weights(run_infer):
    code, printed = run_infer("--quant_act", "integer", "--no-pack")
    assert code == 2 and "--quant_act integer: is for packed weights" in printed


@pytest.mark.parametrize("seconds", [0, 5])
def test_steps_are_shown_where_a_batch_takes_long(run_infer, monkeypatch, seconds):
    monkeypatch.setattr(sampling, "STEP_BAR_SECONDS", seconds)
    code, printed = run_infer("--n_imgs", 1, "--no_compare")
    assert code == 0 and ("steps:" in printed) == (seconds == 0)
