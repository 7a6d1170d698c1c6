"""One model's multiquantizer is never written over another's: by its default name, and by what is in the file."""

import itertools
import os
import shutil

import pytest
import torch
from conftest import tiny, tiny_model

from errors import InputError
from models.families import FAMILIES
from quant import multiquantizer as files
from stages import multiquantizer
from stages.common import multiquantizer_path

SDXL = FAMILIES["sdxl"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The working folder, with models of many names in it."""
    models = [
        "runA/checkpoint-1000",
        "runB/checkpoint-1000",
        "runa/checkpoint-1000",
        "x",
        "a b",
        "a-b",
        "conv_in",
        "a/model",
    ]
    for name in (*models, "embedded", "n" * 250, "模型", "a:b"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("x.safetensors", "x.ckpt", "runA/x.ckpt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_different_models_have_different_names(home):
    models = [
        *("runA/checkpoint-1000", "runB/checkpoint-1000", "runa/checkpoint-1000", "x", ".", "..", "C:\\x", "a b", "a-b"),
        *("x.safetensors", "x.ckpt", "runA/x.ckpt", "conv_in", "a/model", "b/model", "a--model", "embedded", "./embedded"),
        *("n" * 250, "模型", "a:b", SDXL.model_id, "sdxl"),
    ]
    paths = [multiquantizer_path(SDXL, model) for model in models]
    for (one, this), (other, that) in itertools.combinations(zip(models, paths, strict=True), 2):
        assert str(this).lower() != str(that).lower(), (one, other)
    names = [path.name for path in paths] + [files.part_path(path, "down_blocks").name for path in paths]
    assert all(len(name) < 200 and not set(name) & set('\\/:*?"<>| ') and name.isascii() for name in names)


def test_a_model_has_one_name_however_it_is_given(home):
    ways = ("x", "x/", "./x", "runA/../x", str(home / "x"))
    (home / "link").symlink_to("x")
    (name,) = {multiquantizer_path(SDXL, way).name for way in (*ways, "link")}
    assert name.startswith("sdxl_x-") and multiquantizer_path(SDXL, home / "x").name == name
    assert multiquantizer_path(SDXL, "b/model").name == "sdxl_b--model_mq.pt"
    assert multiquantizer_path(SDXL, "embedded").name == "sdxl_embedded_mq.pt"
    assert multiquantizer_path(SDXL, SDXL.model_id).name == "sdxl_mq.pt"


def test_a_link_that_is_set_anew_names_another_model(home):
    (home / "latest").symlink_to("runA")
    before = multiquantizer_path(SDXL, "latest")
    (home / "latest").unlink()
    (home / "latest").symlink_to("runB")
    assert multiquantizer_path(SDXL, "latest") != before


@pytest.fixture
def fit(tmp_path, monkeypatch, run_script):
    """Run the stage on a tiny DiT of a seed, writing to `path`: fit(seed, path, *flags) -> (code, printed)."""

    def run(seed, path, *flags, family="dit"):
        def load_denoiser(*_):
            denoiser = tiny(family)
            if seed:
                weight = next(p for name, p in denoiser.named_parameters() if name.endswith("ff.net.2.weight"))
                weight.data += seed
            return denoiser

        monkeypatch.setattr(multiquantizer, "load_denoiser", load_denoiser)
        return run_script(multiquantizer, family, "--model_id", "embedded", "--output", path, *flags)

    return run


def test_a_file_of_other_weights_is_kept(tmp_path, fit):
    path = tmp_path / "x_mq.pt"
    assert fit(0, path)[0] == 0
    before = path.read_bytes()
    code, printed = fit(1, path)
    assert code == 2 and path.read_bytes() == before and not (tmp_path / "x_mq.pt.partial").exists()
    assert printed.strip().endswith(
        "x_mq.pt: made from other weights than this model's (layer transformer_blocks.0.ff.net.2); "
        "--overwrite replaces it, --output names another place"
    )
    code, printed = fit(0, path)
    assert code == 0 and "holds the quantizers of these weights already" in printed
    code, printed = fit(1, path, "--overwrite")
    assert code == 0 and "layers fitted" in printed and path.read_bytes() != before
    assert fit(1, path)[0] == 0 and fit(0, path)[0] == 2


@pytest.mark.parametrize("content", [b"", b"not of this kind", "other.pt", "sdxl"])
def test_what_is_no_multiquantizer_of_the_family_is_kept_and_told_before_the_model_is_read(
    tmp_path, monkeypatch, run_script, tiny_mq, content
):
    path = tmp_path / "mine.pt"
    if content == "other.pt":
        torch.save({"conv.weight": torch.ones(2)}, path)
    elif content == "sdxl":
        shutil.copy(tiny_mq("sdxl"), path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    monkeypatch.setattr(multiquantizer, "load_denoiser", lambda *_: pytest.fail("the model is read"))
    code, printed = run_script(multiquantizer, "dit", "--model_id", "embedded", "--output", path)
    assert code == 2 and path.read_bytes() == before
    assert "mine.pt: " in printed and printed.strip().endswith("--overwrite replaces it, --output names another place")


def test_a_build_of_other_weights_that_was_cut_off_is_kept(tmp_path, fit, monkeypatch):
    path, partial = tmp_path / "x_mq.pt", tmp_path / "x_mq.pt.partial"
    fit_all = files._fit

    def cut_off(model, keys, *rest):
        fit_all(model, keys[:15], *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_fit", cut_off)
    assert fit(0, path)[0] == 130
    monkeypatch.setattr(files, "_fit", fit_all)
    before = partial.read_bytes()
    code, printed = fit(1, path)
    assert code == 2 and partial.read_bytes() == before and not path.exists()
    assert "x_mq.pt.partial: made from other weights" in printed and "--overwrite" in printed
    code, printed = fit(0, path)
    assert code == 0 and f"going on from {partial}: 15 layers are done" in printed


def test_another_build_that_ends_first_is_kept(tmp_path, monkeypatch):
    """A file that was not there when the build began, and is of other weights when it ends."""
    path = tmp_path / "x_mq.pt"
    other = tiny("dit")
    other.proj_out_1.weight.data += 1
    fit_all = files._fit

    def fitting(*args):
        monkeypatch.setattr(files, "_fit", fit_all)
        files.build(tiny_model("dit", other), path)
        before.append(path.read_bytes())
        fit_all(*args)

    before = []
    monkeypatch.setattr(files, "_fit", fitting)
    with pytest.raises(InputError, match=r"x_mq\.pt: made from other weights"):
        files.build(tiny_model("dit"), path)
    assert [path.read_bytes()] == before
    assert os.path.exists(f"{path}.partial")  # what was fitted is kept


def test_parts_and_what_they_are_joined_to_are_kept(tmp_path, fit):
    path = tmp_path / "sdxl_mq.pt"
    for prefix in SDXL.prefixes:
        assert fit(0, path, "--prefix", prefix, family="sdxl")[0] == 0
    assert path.exists()
    before = {each: each.read_bytes() for each in tmp_path.iterdir()}
    code, printed = fit(1, path, "--prefix", "down_blocks", family="sdxl")
    assert code == 2 and "sdxl_down_blocks_mq.pt: made from other weights" in printed
    code, printed = fit(1, path, "--stitch", family="sdxl")
    assert code == 2 and "sdxl_mq.pt: made from other weights" in printed
    assert {each: each.read_bytes() for each in tmp_path.iterdir()} == before
    code, printed = fit(0, path, "--prefix", "down_blocks", family="sdxl")
    assert code == 0 and "sdxl_down_blocks_mq.pt: holds the quantizers" in printed and "7 parts" in printed


def test_a_place_that_cannot_be_written_is_told_before_the_model_is_read(tmp_path, monkeypatch, run_script):
    monkeypatch.setattr(multiquantizer, "load_denoiser", lambda *_: pytest.fail("the model is read"))
    for name in ("n" * 300, "/proc/none/x_mq.pt"):
        code, printed = run_script(multiquantizer, "dit", "--model_id", "embedded", "--output", tmp_path / name)
        assert code == 2 and "cannot be written" in printed
