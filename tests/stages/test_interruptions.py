"""Runs that end at any of their writes, in this process; those killed at random moments are in test_kills.py.

The file number k that a run puts in its place is its last, for every k, once just before it is put there and once just
after. The same command then goes on, and leaves the files of a run that nothing disturbed. What takes long to compute
and is not what is tested is made up.
"""

import contextlib
import os
from itertools import count
from unittest import mock

import numpy as np
import pytest
from conftest import tiny_dit
from PIL import Image

from models.layers import find_slots
from quant import entries as entries_module
from quant import multiquantizer
from stages import eval_random

IMAGES = 6  # two tasks, of four images and of two
METRICS = ("latent_mse", "image_mse", "psnr", "ssim")


@contextlib.contextmanager
def dying(number, after):
    """The process dies at file number `number`, from 1, just before it is put in its place or just `after`."""
    written, replace = count(1), os.replace

    def replace_or_die(source, target):
        now = next(written)
        if now < number or (now == number and after):
            replace(source, target)
        if now >= number:  # what dies writes nothing more
            raise KeyboardInterrupt

    with mock.patch.object(os, "replace", replace_or_die):
        yield


def check_all_cuts(run, folder):
    """`run(folder)`, False where it died, leaves the same files wherever it does; returns how many it writes."""
    assert run(folder / "whole")
    for after in (False, True):
        for number in count(1):
            cut = folder / f"{number} {after}"
            with dying(number, after):
                if run(cut):
                    break
            assert run(cut)
            assert files_of(cut) == files_of(folder / "whole"), cut
    return number - 1


def files_of(folder):
    """{name: bytes} of all files but what tells of the run itself."""
    own = ("run.log", "run.lock", "sampling_config.yaml")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in own}


class MadeUpWorkers:
    """Stand for those of stages/workers.py: what they measure follows from the configuration's and the image's number."""

    def __init__(self, job, *_):
        self.asked = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def describe(self, indices):
        rows = {"quantized_size": 4, "avg_bits": 4.0, "quantized_error": 0.5, "bops": 1.0}
        return [rows | {"config": {"model.a.weight_quantizer": [f"mse-{index}", 16, 4, 0.5]}} for index in indices]

    def run(self, tasks, baseline=None):
        for task in tasks:
            yield task, self.measured(task, baseline), {}

    @staticmethod
    def measured(task, baseline):
        images = range(task.first, task.last)
        draws = [np.random.default_rng([99 if task.index is None else task.index, image]) for image in images]
        arrays = {"features": np.stack([draw.normal(size=64) for draw in draws])}
        if baseline is None:
            arrays["images"] = np.stack([draw.integers(0, 256, (4, 4, 3), np.uint8) for draw in draws])
            arrays["latents"] = np.stack([draw.normal(size=(4, 2, 2)).astype(np.float32) for draw in draws])
            return arrays
        return arrays | {name: np.array([draw.random() for draw in draws]) for name in METRICS}


@pytest.fixture
def label(monkeypatch, run_script, tmp_path, mq):
    """label(*flags): a labelling run of made-up measurements in a folder, as `check_all_cuts` wants it."""
    monkeypatch.setattr(eval_random, "start_workers", MadeUpWorkers)
    (tmp_path / "reference").mkdir()
    for index in range(3):
        Image.new("RGB", (64, 64), (80 * index, 0, 0)).save(tmp_path / "reference" / f"{index}.png")
    flags = ("--model_id", "embedded", "--multi_chkpt", mq, "--reference", tmp_path / "reference")
    flags += ("--n_imgs", IMAGES, "--batch_size", 1)

    def run(*more):
        def in_folder(folder):
            code, printed = run_script(eval_random, "dit", *flags, *more, "--outdir", folder)
            assert code in (0, 130), printed
            return code == 0

        return in_folder

    return run


def test_a_labelling_run(label, tmp_path):
    run = label("--num_archs", 2)
    # The settings; full precision's parts, images, latents, features and row; of each configuration parts, proxies, row.
    assert check_all_cuts(run, tmp_path / "runs") >= 1 + (2 + 3 + 1) + 2 * (2 + 2)
    assert set(files_of(tmp_path / "runs" / "whole")) >= {"quant_cache.pkl", "quant_proxies.jsonl", "results.txt"}


def test_successive_halving(label, tmp_path):
    run = label("--num_archs", 3, "--budget_images", 2)
    # Three configurations' first task and line; of the one that goes on the other task, proxies and row.
    assert check_all_cuts(run, tmp_path / "runs") >= 1 + (2 + 3 + 1) + 3 * (1 + 1) + 3
    assert len((tmp_path / "runs" / "whole" / "quant_labels_partial.jsonl").read_text().splitlines()) == 3


def test_fitting(family, tmp_path, monkeypatch):
    """A checkpoint after every layer; what is in it is not fitted again."""
    monkeypatch.setattr(multiquantizer, "CHECKPOINT_SECONDS", -1)
    denoiser, fitted = tiny_dit(layers=1), {}

    def fit(folder):
        def counted(weight):
            fitted[folder] = fitted.get(folder, 0) + 1
            return entries_module.fit_entry(weight)

        monkeypatch.setattr(multiquantizer, "fit_entry", counted)
        try:
            multiquantizer.build(denoiser, family, folder / "mq.pt")
        except KeyboardInterrupt:
            return False
        return True

    layers = len(find_slots(denoiser, family))
    assert check_all_cuts(fit, tmp_path) == layers + 1
    assert set(fitted.values()) == {layers, layers + 1}  # the one after whose fit it died, once more
