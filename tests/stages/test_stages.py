"""The three stages on the embedded model, run as users run them."""

import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import EVAL, ROOT
from omegaconf import OmegaConf
from PIL import Image

from evaluation import quant_cache
from models import drawing
from models.pipelines import load_denoiser
from quant import config
from quant.file_keys import by_file_key
from quant.files import save_pickle
from quant.multiquantizer import with_digests
from quant.slots import find_slots
from stages import infer, multiquantizer
from stages.labelling import eval_random, labeller
from stages.run_folder import only_run_in


def test_the_cache(labels, family):
    rows = pickle.loads((labels / "quant_cache.pkl").read_bytes())
    slots = find_slots(load_denoiser(family, "embedded", torch.device("cpu")), family.slot_rules)
    assert len(rows) == 3
    for index, row in enumerate(rows):
        assert tuple(row) == quant_cache.KEYS
        methods = {key: value[0] for key, value in row["config"].items()}
        assert methods == by_file_key(config.draw_random(slots, 42, index), slots)
        assert row["quantized_size"] == sum(value[2] for value in row["config"].values())
        fp_bytes = sum(value[1] for value in row["config"].values())
        assert row["avg_bits"] == pytest.approx(16 * row["quantized_size"] / fp_bytes)
        assert row["quantized_error"] == pytest.approx(sum(value[3] for value in row["config"].values()))
        assert row["FID-GT-1k"] > 0 and row["bops"] > 0
        assert all(type(v) in (int, float) for k, v in row.items() if k != "config")
        assert all([type(x) for x in value] == [str, int, int, float] for value in row["config"].values())


def test_what_stands_beside_the_cache(labels):
    settings = OmegaConf.load(labels / "sampling_config.yaml")
    assert settings.n_imgs == 12 and settings.seed == 42 and settings.guidance == 2.0
    whole = json.loads((labels / "full_precision.json").read_text())
    rows = quant_cache.load(labels / "quant_cache.pkl")
    assert whole["avg_bits"] == 16 and all(row["bops"] < whole["bops"] for row in rows)
    assert "configuration 3: avg_bits" in (labels / "run.log").read_text()
    assert (labels / "results.txt").read_text().count("\n") == 5
    assert not (labels / "samples").exists()
    table = (labels / "run.log").read_text().partition("where the time went")[2]
    for phase in ("denoise", "decode", "features", "FID", "quantize", "write"):
        assert re.search(rf"^{phase} .* s .*%$", table, re.MULTILINE), phase


def test_more_configurations_go_on_from_the_old_ones(labels, mq, tmp_path, run_script):
    flags = (*EVAL, "--multi_chkpt", mq, "--outdir", tmp_path)
    assert run_script(eval_random, "dit", *flags, "--num_archs", 1)[0] == 0
    first = quant_cache.load(tmp_path / "quant_cache.pkl")
    assert run_script(eval_random, "dit", *flags, "--num_archs", 2)[0] == 0
    both = quant_cache.load(tmp_path / "quant_cache.pkl")
    assert both[:1] == first and both == quant_cache.load(labels / "quant_cache.pkl")[:2]


def test_a_second_run_in_the_same_folder_is_refused(mq, tmp_path, run_script):
    flags = (*EVAL, "--multi_chkpt", mq, "--outdir", tmp_path, "--num_archs", 1)
    with only_run_in(tmp_path):
        code, printed = run_script(eval_random, "dit", *flags)
    assert code == 2 and f"process {os.getpid()} on " in printed and not (tmp_path / "quant_cache.pkl").exists()
    assert run_script(eval_random, "dit", *flags)[0] == 0  # the other is gone


def test_images_of_no_numbers_are_labelled_so_and_the_run_goes_on(mq, tmp_path, run_script, monkeypatch):
    """The second configuration's images are broken: its FID is NaN, the third is measured, and the run resumes."""
    made = []

    def generate_batches(*args, **kwargs):
        made.append(args[3])
        for batch in drawing.generate_batches(*args, **kwargs):
            yield batch._replace(broken=batch.broken | (args[3] == "config_001"))

    monkeypatch.setattr(labeller, "generate_batches", generate_batches)
    flags = (*EVAL, "--multi_chkpt", mq, "--outdir", tmp_path)
    code, printed = run_script(eval_random, "dit", *flags, "--num_archs", 3)
    assert code == 0 and "config_001: 12 of 12 images have values that are not numbers" in printed
    fids = [row["FID-GT-1k"] for row in quant_cache.load(tmp_path / "quant_cache.pkl")]
    assert [np.isnan(fid) for fid in fids] == [False, True, False]
    assert run_script(eval_random, "dit", *flags, "--num_archs", 4)[0] == 0
    assert made == ["full_precision", "config_000", "config_001", "config_002", "config_003"]
    assert (tmp_path / "results.txt").read_text().splitlines()[-1].startswith("2 ")  # last of the table


def test_a_broken_full_precision_ends_the_run(mq, tmp_path, run_script, monkeypatch):
    def generate_batches(*args, **kwargs):
        for batch in drawing.generate_batches(*args, **kwargs):
            yield batch._replace(broken=~batch.broken)

    monkeypatch.setattr(labeller, "generate_batches", generate_batches)
    code, printed = run_script(eval_random, "dit", *EVAL, "--multi_chkpt", mq, "--outdir", tmp_path, "--num_archs", 1)
    assert code == 2 and "full precision draws images that have values that are not numbers" in printed


def test_labels_of_another_multiquantizer_do_not_mix(labels, mq, tmp_path, run_script):
    shutil.copytree(labels, tmp_path / "labels")
    content = torch.load(mq, weights_only=True)
    next(iter(content["slots"].values()))["errors"]["mse-4"] *= 2
    torch.save(with_digests(content), tmp_path / "other.pt")
    flags = (*EVAL, "--multi_chkpt", tmp_path / "other.pt", "--outdir", tmp_path / "labels", "--num_archs", 4)
    code, printed = run_script(eval_random, "dit", *flags)
    assert code == 2 and "multiquantizer_key" in printed


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sampling_config.yaml", None, "no sampling_config.yaml that says how"),
        ("sampling_config.yaml", b"", "sampling_config.yaml: damaged"),
        ("sampling_config.yaml", b"- a\n- b", "sampling_config.yaml: damaged"),
        ("sampling_config.yaml", b"\x00\xff{", "sampling_config.yaml: damaged"),
        ("quant_cache.pkl", pickle.dumps([{"config": []}]), "quant_cache.pkl: not a list of labelled"),
    ],
)
def test_damage_beside_the_labels_is_one_line(labels, mq, tmp_path, run_script, name, content, message):
    folder = tmp_path / "labels"
    shutil.copytree(labels, folder)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    code, printed = run_script(eval_random, "dit", *EVAL, "--multi_chkpt", mq, "--outdir", folder, "--num_archs", 3)
    assert code == 2 and message in printed and "Traceback" not in printed


def test_damaged_full_precision_row_is_measured_again(labels, mq, tmp_path, run_script):
    folder = tmp_path / "labels"
    shutil.copytree(labels, folder)
    before = (folder / "full_precision.json").read_text()
    (folder / "full_precision.json").write_text("{")
    assert run_script(eval_random, "dit", *EVAL, "--multi_chkpt", mq, "--outdir", folder, "--num_archs", 3)[0] == 0
    assert (folder / "full_precision.json").read_text() == before


def test_infer(labels, mq, tmp_path, run_script):
    spec = f"{labels / 'quant_cache.pkl'}:best"
    flags = ("--model_id", "embedded", "--multi_chkpt", mq, "--q_config", spec, "--steps", 2, "--n_imgs", 3)
    code, printed = run_script(infer, "dit", *flags, "--cls_id", 4, 7, "--outdir", tmp_path / "a")
    assert code == 0, printed
    (folder,) = (tmp_path / "a").iterdir()
    assert re.fullmatch(r"\d{4}(-\d\d){5}", folder.name)
    names = {path.name for path in folder.iterdir()}
    assert names == {"contact_sheet.png", "full_precision", "run.lock", "run.log", "sampling_config.yaml", "samples"}
    pictures = [np.asarray(Image.open(path)) for path in sorted((folder / "samples").iterdir())]
    assert len(pictures) == 3 and pictures[0].shape == (64, 64, 3)
    assert Image.open(folder / "contact_sheet.png").size[0] >= 3 * 128

    assert run_script(infer, "dit", *flags, "--cls_id", 4, 7, "--outdir", tmp_path / "b", "--pack", "--no_compare")[0] == 0
    (packed,) = (tmp_path / "b").iterdir()
    for path, image in zip(sorted((packed / "samples").iterdir()), pictures, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), image)
    assert "weights packed" in (packed / "run.log").read_text()


def test_keep_samples(mq, tmp_path, run_script):
    flags = (*EVAL, "--multi_chkpt", mq, "--outdir", tmp_path, "--num_archs", 1, "--keep_samples")
    assert run_script(eval_random, "dit", *flags)[0] == 0
    assert len(list((tmp_path / "samples" / "config_000").glob("*.png"))) == 12


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        (infer, ("--q_config", "nowhere.pkl"), "nowhere.pkl: no such file"),
        (infer, ("--q_config", "uniform:mse-9"), "unknown method 'mse-9'"),
        (infer, ("--q_config", "{labels}/quant_cache.pkl"), "add :best"),
        (infer, ("--cls_id", "10"), "--cls_id 10: embedded has classes 0 to 9"),
        (infer, ("--n_imgs", "0"), "--n_imgs: 0 is not at least 1"),
        (infer, ("--res", "512"), "--res 512: embedded makes images of 64 px"),
        (infer, ("--multi_chkpt", "nowhere.pt"), "nowhere.pt: no such multiquantizer; make it with"),
        (infer, ("--multi_chkpt", "{root}/README.md"), "README.md: not a readable checkpoint"),
        (infer, ("--device", "cuda:77"), "--device cuda:77"),
        (infer, ("--model_id", "facebook/nothing-here"), "`--model_id embedded` works offline"),
        (infer, ("--steps", "1001"), "--steps 1001: embedded has 1000 noise levels"),
        (infer, ("--seed", "-1"), "--seed: -1 is not between 0 and 2^62"),
        (infer, ("--outdir", "{root}/README.md"), "README.md"),
        (infer, ("--q_config", ""), "no such file"),
        (eval_random, ("--guidance", "nan"), "--guidance: nan is not a finite number"),
        (eval_random, ("--outdir", "{root}/README.md"), "README.md"),
        (multiquantizer, ("--output", "{root}/bops"), "bops: is a folder"),
        (eval_random, ("--n_imgs", "1"), "--n_imgs: 1 is not at least 2"),
        (eval_random, ("--reference", "{root}/bops"), "bops: holds no images"),
        (eval_random, ("--reference", "nowhere"), "nowhere: no such folder"),
        (eval_random, ("--a_l", "0.8", "--a_u", "0.2"), "--a_l 0.8 is above --a_u 0.2"),
        (eval_random, ("--a_l", "-1"), "not between 0 and 1"),
        (eval_random, ("--outdir", "{labels}", "--seed", "43"), "made with seed 42, not 43"),
    ],
)
def test_bad_input_is_one_line(stage, flags, message, labels, mq, tmp_path, run_script, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = [flag.format(labels=labels, root=ROOT) for flag in flags]
    defaults = {"--model_id": "embedded", "--outdir": tmp_path}
    if stage is not multiquantizer:
        defaults["--multi_chkpt"] = mq
    if stage is multiquantizer:
        del defaults["--outdir"]
    if stage is eval_random:
        defaults |= dict(zip(EVAL[2::2], EVAL[3::2], strict=True)) | {"--num_archs": 1}
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    merged = defaults | given
    code, printed = run_script(stage, "dit", *[item for pair in merged.items() for item in pair])
    assert code == 2
    assert message in printed and "Traceback" not in printed
    assert printed.strip().splitlines()[-1].startswith("error:")


def test_another_familys_configuration(labels, mq, tmp_path, run_script):
    foreign = tmp_path / "sdxl_37.pkl"
    save_pickle({"model.conv_in.weight_quantizer": "mse-4"}, foreign)
    flags = ("--model_id", "embedded", "--multi_chkpt", mq, "--outdir", tmp_path / "x", "--q_config", foreign)
    code, printed = run_script(infer, "dit", *flags)
    assert code == 2 and "not of this denoiser, first model.conv_in" in printed
