"""Runs that end at any of their writes, in this process; those killed at random moments are in test_kills.py.

The file number k that a run puts in its place is its last, for every k, once just before it is put there and once just
after. The same command then goes on, and leaves the files of a run that nothing disturbed. What takes long to compute
and is not what is tested is made up.
"""

import contextlib
import os
from itertools import count
from unittest import mock

import pytest
from conftest import tiny_dit, tiny_model

from quant import entries as entries_module
from quant import model as model_module
from quant import multiquantizer


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


@pytest.fixture
def label(made_up_labels):
    """label(*flags): a labelling run of made-up measurements in a folder, as `check_all_cuts` wants it."""

    def run(*more):
        def in_folder(folder):
            code, printed, _ = made_up_labels(*more, "--batch_size", 1, "--outdir", folder)
            assert code in (0, 130), printed
            return code == 0

        return in_folder

    return run


def test_a_labelling_run(label, tmp_path):
    run = label("--num_archs", 2, "--n_imgs", 6)
    # Tasks of four images and of two. The settings; full precision's parts, images, latents, features and row; of each
    # configuration parts, proxies and row.
    assert check_all_cuts(run, tmp_path / "runs") >= 1 + (2 + 3 + 1) + 2 * (2 + 2)
    assert set(files_of(tmp_path / "runs" / "whole")) >= {"quant_cache.pkl", "quant_proxies.jsonl", "results.txt"}


@pytest.mark.slow
def test_successive_halving(label, tmp_path):
    run = label("--num_archs", 3, "--n_imgs", 6, "--budget_images", 2)
    # Three configurations' first task and line; of the one that goes on the other task, proxies and row.
    assert check_all_cuts(run, tmp_path / "runs") >= 1 + (2 + 3 + 1) + 3 * (1 + 1) + 3
    assert len((tmp_path / "runs" / "whole" / "quant_labels_partial.jsonl").read_text().splitlines()) == 3


def test_fitting(tmp_path, monkeypatch):
    """A checkpoint after every layer; what is in it is not fitted again."""
    monkeypatch.setattr(multiquantizer, "CHECKPOINT_SECONDS", -1)
    denoiser, fitted = tiny_dit(layers=1), {}

    def fit(folder):
        def counted(weight, words):
            fitted[folder] = fitted.get(folder, 0) + 1
            return entries_module.fit_entry(weight, words)

        monkeypatch.setattr(model_module, "fit_entry", counted)
        try:
            multiquantizer.build(tiny_model("dit", denoiser), folder / "mq.pt")
        except KeyboardInterrupt:
            return False
        return True

    layers = len(tiny_model("dit", denoiser).slots)
    assert check_all_cuts(fit, tmp_path) == layers + 1
    assert set(fitted.values()) == {layers, layers + 1}  # the one after whose fit it died, once more
