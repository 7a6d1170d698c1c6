"""--calibrate: rounding that is heard for, on prompts and noise that no other image is drawn of; off, nothing changes."""

import json

import numpy as np
import pytest
from conftest import run_here
from PIL import Image
from safetensors.torch import load_file
from zoo import ZOO

from models.embedded.captions import subject_prompts
from quant import calibration
from stages import calibrating, infer
from stages.flags import Flags

FLAGS = ("--model_id", "embedded", "--n_imgs", 2, "--steps", 2, "--q_config", "uniform:mse-3", "--batch_size", 8)


def images(folder):
    return np.stack([np.asarray(Image.open(path), dtype=float) for path in sorted(folder.glob("*.png"))])


@pytest.mark.slow
def test_infer_listens_if_asked_to(mq, tmp_path, run_script):
    flags = (*FLAGS, "--multi_chkpt", mq, "--outdir", tmp_path)
    code, printed = run_script(infer, "dit", *flags, "--run", "plain")
    assert code == 0, printed
    code, printed = run_script(infer, "dit", *flags, "--run", "calibrated", "--calibrate", "--calibration_images", 2)
    assert code == 0, printed
    plain, calibrated = (tmp_path / run for run in ("plain", "calibrated"))
    assert np.array_equal(images(plain / "full_precision"), images(calibrated / "full_precision"))
    assert not np.array_equal(images(plain / "samples"), images(calibrated / "samples"))
    assert not (tmp_path / "calibrated" / "calibration").exists()
    settings = [(tmp_path / run / "sampling_config.yaml").read_text() for run in ("plain", "calibrated")]
    assert "calibrat" not in settings[0] and "calibrate: true" in settings[1]  # off, the file is that of always
    code, printed = run_script(infer, "dit", *flags, "--run", "plain", "--calibrate")
    assert code == 2 and "its images were made with --calibrate None, not True" in printed


ZOO_FLAGS = ("--res", 16, "--call", "max_sequence_length=16", "--n_imgs", 0, "--steps", 2, "--config", "uniform:mse-3")


@pytest.fixture(scope="module")
def base(built_once):
    return built_once("zoo_flux", lambda folder: ZOO["flux"].build_pipeline().save_pretrained(folder))


def weights(folder):
    return load_file(next((folder / "transformer").glob("*.safetensors")))


@pytest.mark.slow
def test_quantize_goes_on_from_what_was_heard(base, tmp_path, monkeypatch):
    put, written, stop = calibration.MomentsFolder.put, [], None

    def counted(self, key, moments):
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(key)
        put(self, key, moments)

    monkeypatch.setattr(calibration.MomentsFolder, "put", counted)
    flags = ("--model_id", base, *ZOO_FLAGS)
    calibrate = (*flags, "--calibrate", "--calibration_images", 2)
    for name, chosen in {"plain": flags, "whole": calibrate}.items():
        code, printed = run_here("quantize.py", *chosen, "--output", tmp_path / name)
        assert code == 0, printed
    plain, whole = weights(tmp_path / "plain"), weights(tmp_path / "whole")
    assert plain.keys() == whole.keys() and any((plain[name] != whole[name]).any() for name in plain)
    assert all((plain[name] == whole[name]).all() for name in plain if not name.endswith(("codes", "digests")))
    assert "calibrated on 2 images" in (tmp_path / "whole" / "README.md").read_text()
    assert "calibrat" not in (tmp_path / "plain" / "README.md").read_text()

    total, stop = len(written), 10
    written.clear()
    code, printed = run_here("quantize.py", *calibrate, "--output", tmp_path / "cut")
    assert code == 130 and "the same command goes on" in printed
    assert len(list((tmp_path / "cut.partial" / "calibration").rglob("*.pt"))) == 10
    stop = None
    code, printed = run_here("quantize.py", *calibrate, "--output", tmp_path / "cut")
    assert code == 0, printed
    assert len(written) == total
    again = weights(tmp_path / "cut")
    assert all((again[name] == whole[name]).all() for name in whole)


def test_flags_of_calibration_without_it_are_refused(base, tmp_path):
    code, printed = run_here("quantize.py", "--model_id", base, "--output", tmp_path / "out", "--calibration_images", 2)
    assert code == 2 and "--calibration_images: is for --calibrate" in printed


def test_prompts_are_those_of_no_other_image(tmp_path):
    args = Flags({"calibration_images": 40, "calibration_prompts": None})
    assert len(set(calibrating.calibration_prompts(args))) == 40
    assert not set(calibrating.captions(args)) & {caption for _, caption in subject_prompts(250)}
    (tmp_path / "own.json").write_text(json.dumps(["one", "two"]))
    args |= {"calibration_images": 3, "calibration_prompts": tmp_path / "own.json"}
    assert calibrating.calibration_prompts(args) == ["one", "two", "one"]
