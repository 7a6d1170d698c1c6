"""Kill the stages beside labelling at random moments, from their start on: the same command then gives the same results.

SIGTERM ends them in order: what they have is saved, and the exit code says so. `KILLS=50 KILLS_SEED=1 pytest -s -m slow
tests/stages/test_killed_stages.py` kills more often.
"""

import os
import random
import shutil
import signal
import subprocess
import time

import psutil
import pytest
import torch
from conftest import ROOT, run_here, script
from killing import run_disturbed, wait_for_changes
from zoo import ZOO

from autobuild import predictor_file
from evaluation import quant_cache
from quant.files import load_checkpoint, load_pickle

KILLS = int(os.environ.get("KILLS", 3))
SEED = int(os.environ.get("KILLS_SEED", 0))
LABELS = ROOT / "labels" / "pixart_alpha_embedded"
ROWS = 45


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    quant_cache.save(quant_cache.load(LABELS / "quant_cache.pkl")[:ROWS], folder / "quant_cache.pkl")
    return folder


@pytest.fixture(scope="module")
def pipeline(built_once):
    return built_once("zoo_pixart_killed", lambda folder: ZOO["pixart"].build_pipeline().save_pretrained(folder))


def training(folder, cache):
    flags = ("--family", "pixart_alpha", "--cache", cache, "--epochs", 1, "--output", folder / "p.pt")
    return "train_predictor.py", flags, lambda: folds_of(folder / "p.pt")


def folds_of(path):
    content = predictor_file._read(path)
    return {number: (plain(fold["state"]), fold["predictions"]) for number, fold in sorted(content["folds"].items())}


def plain(tensors):
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def building(folder, mq):
    flags = ("--model_id", "embedded", "--family", "dit", "--scores", "none", "--avg_bits", 3.5, "--multi_chkpt", mq)
    flags += ("--n_imgs", 1, "--calls", 1, "--steps", 2, "--output", folder / "c.pkl", "--sensitivity", folder / "s.pt")
    return "build_config.py", flags, lambda: load_pickle(folder / "c.pkl")


def quantizing(folder, pipeline):
    flags = (
        "--model_id",
        pipeline,
        "--output",
        folder / "out",
        "--n_imgs",
        1,
        "--steps",
        2,
        "--res",
        16,
        "--prompt",
        "a seven",
    )
    flags += ("--overwrite",)  # a kill may come when the output is whole
    flags += ("--call", "max_sequence_length=16", "use_resolution_binning=false", "clean_caption=false")
    return "quantize.py", flags, lambda: weights_of(folder / "out")


def weights_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}


def fitting(folder, _given):
    flags = ("--model_id", "embedded", "--output", folder / "mq.pt")
    return "dit_multiquantizer.py", flags, lambda: slots_of(folder / "mq.pt")


def slots_of(path):
    slots = load_checkpoint(path)["slots"]
    return {key: (entry["fingerprint"], entry["errors"], str(entry["parameters"])) for key, entry in slots.items()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [training, building, quantizing, fitting], ids=lambda stage: stage.__name__)
def test_killed_at_any_moment_a_stage_goes_on(stage, tmp_path, cache, mq, pipeline):
    given = {training: cache, building: mq, quantizing: pipeline, fitting: None}[stage]
    name, flags, _ = stage(tmp_path / "undisturbed", given)
    undisturbed, chance, kills = None, random.Random(SEED), 0
    for number in range(10 * KILLS):
        folder = tmp_path / (str(number) if number else "undisturbed")
        folder.mkdir()
        name, flags, result = stage(folder, given)
        kills += run_disturbed(script(name, *flags), folder, chance, KILLS - kills if number else 0)
        undisturbed = undisturbed or result()
        assert result() == undisturbed, f"{name} after {kills} kills"
        assert not list(folder.rglob(".*.tmp"))
        if kills >= KILLS:
            break
        if number:
            shutil.rmtree(folder)
    print(f"{name}: {kills} kills")


def is_at_work(process):
    """Whether a process is there and has not ended, waited for by its parent or not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_sigterm_ends_in_order(tmp_path, cache):
    """Training: folds that are done are kept, no process is left, and the same command goes on."""
    name, flags, result = training(tmp_path, cache)
    with subprocess.Popen(script(name, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for_changes(process, tmp_path, 1)
        children = psutil.Process(process.pid).children(recursive=True)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        errors = process.stderr.read()
    assert process.returncode == 143, errors
    assert time.monotonic() - start < 30 and "the same command goes on" in errors and "Traceback" not in errors
    assert len(result()) >= 1 and not list(filter(is_at_work, children))
    assert run_here(name, *flags)[0] == 0 and len(result()) == 5
    assert torch.is_tensor(next(iter(predictor_file._read(tmp_path / "p.pt")["folds"][0]["state"].values())))
