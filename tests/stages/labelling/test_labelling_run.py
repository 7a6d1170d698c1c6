"""Labelling runs: tasks, proxies, faults, successive halving, workers."""

import contextlib
import json
import math
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import EVAL
from PIL import Image
from skimage.metrics import structural_similarity

from errors import InputError
from evaluation import quant_cache
from models.embedded.judge import digit_reference_folder
from models.pipelines import Sampler
from stages.flags import Flags
from stages.labelling import eval_random, json_lines, labeller, successive_halving
from stages.labelling.labeller import Task
from stages.labelling.task_results import TaskResults

TASKS = ("--model_id", "embedded", "--n_imgs", 12, "--batch_size", 1, "--steps", 2)  # three tasks per configuration


def test_proxies_are_those_of_the_pictures(mq, tmp_path, run_script):
    """Worked out again from the PNG files by other code."""
    flags = (*TASKS, "--multi_chkpt", mq, "--outdir", tmp_path, "--num_archs", 2, "--keep_samples")
    assert run_script(eval_random, "dit", *flags)[0] == 0
    names = ("full_precision", "config_000", "config_001")
    pictures = [[np.asarray(Image.open(file)) for file in sorted((tmp_path / "samples" / name).iterdir())] for name in names]
    originals, *configurations = (np.stack(each) / 255 for each in pictures)
    lines = json_lines.load(tmp_path / "quant_proxies.jsonl")
    assert [(line["row"], line["configuration"], line["images"]) for line in lines] == [(1, 1, 12), (2, 2, 12)]
    for line, images in zip(lines, configurations, strict=True):
        mse = ((images - originals) ** 2).mean(axis=(1, 2, 3))
        assert line["image_mse"] == pytest.approx(mse.mean(), rel=1e-4)
        assert line["psnr"] == pytest.approx((-10 * np.log10(mse)).mean(), rel=1e-4)
        grays = zip(images @ [0.299, 0.587, 0.114], originals @ [0.299, 0.587, 0.114], strict=True)
        options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        ssim = np.mean([structural_similarity(*pair, **options) for pair in grays])
        assert line["ssim"] == pytest.approx(ssim, abs=1e-4)
        assert line["latent_mse"] > 0 and line["feature_mse"] > 0
    kept = np.load(tmp_path / "full_precision" / "images.npy")
    assert np.array_equal(kept, np.stack(pictures[0]))


def test_only_what_is_missing_is_measured(tmp_path, made_up_labels):
    """A run cut off between tasks goes on from the results; a damaged or foreign one is measured again."""
    flags = (*TASKS, "--num_archs", 1)
    code, printed, measured = made_up_labels(*flags, "--outdir", tmp_path / "whole")
    assert code == 0 and measured == [Task(index, first, first + 4) for index in (None, 0) for first in (0, 4, 8)], printed
    flags = (*flags, "--outdir", tmp_path / "cut")
    code, printed, _ = made_up_labels(*flags, last=Task(0, 8, 12))
    assert code == 130 and "the same command goes on" in printed and "where the time went" in printed
    results = TaskResults(tmp_path / "cut" / "parts")
    results.path(Task(0, 0, 4)).write_bytes(results.path(Task(0, 0, 4)).read_bytes()[:-50])
    code, _, measured = made_up_labels(*flags)
    assert code == 0 and measured == [Task(0, 0, 4), Task(0, 8, 12)]
    for name in ("quant_cache.pkl", "quant_proxies.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not results.folder.exists()


def test_images_are_judged_beside_the_making_of_the_next(labels, mq, tmp_path, run_script, monkeypatch):
    """As on a GPU; the labels are the same."""
    monkeypatch.setattr(labeller.Labeller, "judges", lambda self: ThreadPoolExecutor(max_workers=1))
    flags = (*EVAL, "--multi_chkpt", mq, "--outdir", tmp_path, "--num_archs", 3)
    assert run_script(eval_random, "dit", *flags)[0] == 0
    assert (tmp_path / "quant_cache.pkl").read_bytes() == (labels / "quant_cache.pkl").read_bytes()


def test_lost_full_precision_images_are_drawn_again(tmp_path, made_up_labels):
    flags = (*EVAL, "--outdir", tmp_path / "labels", "--num_archs", 1)
    assert made_up_labels(*flags)[0] == 0
    folder = tmp_path / "labels" / "full_precision"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.name for path in before} == {"latents.npy", "images.npy", "features.npy"}
    (folder / "latents.npy").write_bytes(b"")
    code, _, measured = made_up_labels(*flags)
    assert code == 0 and measured == [Task(None, 0, 12)]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@contextlib.contextmanager
def largest_file(count_bytes):
    """Files of this process may not grow any further."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_ends_in_a_line_and_the_run_goes_on_with_space(labels, mq, tmp_path, run_script):
    """Files may not grow over 100 kB: full precision's pictures do not fit."""
    flags = (*EVAL, "--multi_chkpt", mq, "--outdir", tmp_path, "--num_archs", 3)
    digit_reference_folder()  # kept for all runs, and not what is tested
    with largest_file(100_000):
        code, printed = run_script(eval_random, "dit", *flags)
    assert code == 2 and "Traceback" not in printed
    message = printed.strip().splitlines()[-1]
    assert message.startswith("error:") and "parts/full_precision" in message and "cannot be written" in message
    assert run_script(eval_random, "dit", *flags)[0] == 0
    assert (tmp_path / "quant_cache.pkl").read_bytes() == (labels / "quant_cache.pkl").read_bytes()


def test_parts_of_another_length_are_not_used(tmp_path):
    results, task = TaskResults(tmp_path), Task(7, 4, 8)
    results.save(task, {"features": np.zeros((4, 3)), "ssim": np.ones(4)})
    assert set(results.load(task)) == {"features", "ssim"} and results.load(Task(7, 0, 4)) is None
    results.save(task, {"features": np.zeros((3, 3)), "ssim": np.ones(3)})
    assert results.load(task) is None


def test_halving_measures_the_better_ones_further(tmp_path, made_up_labels):
    """Of six configurations on 4 images two go on to all 12; their rows are those of a run of all."""
    every = (*TASKS, "--num_archs", 6)
    flags = (*every, "--outdir", tmp_path, "--budget_images", 4)
    code, printed, measured = made_up_labels(*flags)
    assert code == 0 and "2 of 6 configurations go on from 4 images to 12" in printed
    lines = json_lines.load(tmp_path / "quant_labels_partial.jsonl")
    assert [(line["configuration"], line["images"]) for line in lines] == [(number, 4) for number in range(1, 7)]
    better = sorted(sorted(range(6), key=lambda index: lines[index]["FID"])[:2])
    assert [task for task in measured if task.index is not None] == [
        *(Task(index, 0, 4) for index in range(6)),
        *(Task(index, first, first + 4) for index in better for first in (4, 8)),
    ]
    rows = quant_cache.load(tmp_path / "quant_cache.pkl")
    assert [line["configuration"] - 1 for line in json_lines.load(tmp_path / "quant_proxies.jsonl")] == better
    assert made_up_labels(*every, "--outdir", tmp_path / "whole")[0] == 0
    everything = quant_cache.load(tmp_path / "whole" / "quant_cache.pkl")
    assert rows == [everything[index] for index in better]
    # Started again nothing is measured; another schedule is refused.
    code, _, measured = made_up_labels(*flags)
    assert code == 0 and measured == []
    code, printed, _ = made_up_labels(*flags, "--num_archs", 7)
    assert code == 2 and "halving_key [4] of 6, not [4] of 7" in printed


@pytest.mark.parametrize("schedule", [[12], [4, 4], [6, 4], [4, 20]])
def test_halving_schedules_that_do_not_grow(schedule):
    with pytest.raises(InputError, match="must grow"):
        successive_halving.check(Flags({"budget_images": schedule, "n_imgs": 12}))


def test_what_is_no_number_ranks_last():
    assert sorted([math.nan, 2.0, None, 1.0], key=successive_halving.rank)[:2] == [1.0, 2.0]


def test_json_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert json_lines.load(path) == []
    json_lines.save([{"a": 1.5, "b": math.nan}, {"a": 2}], path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [{**line, "digest": None} for line in lines] == [{"a": 1.5, "b": None, "digest": None}, {"a": 2, "digest": None}]
    path.write_bytes(path.read_bytes() + b'{"a": 3')
    assert json_lines.load(path) == [{"a": 1.5, "b": None}, {"a": 2}]
    path.write_bytes(path.read_bytes().replace(b"1.5", b"1.7") + b'\n{"a": 4}\n{"a": "x"}')
    assert json_lines.load(path) == [{"a": 2}, {"a": 4}]  # lines of earlier versions have no digest


def test_parts_of_an_earlier_version_count_as_far_as_they_tell(tmp_path):
    results, tasks = TaskResults(tmp_path), [Task(7, 0, 2), Task(7, 2, 4)]
    results.save(tasks[0], {"features": np.zeros((2, 3))})
    results.save(tasks[1], {"features": np.ones((2, 3)), "constant": np.array([True, False])})
    for order in (tasks, tasks[::-1]):
        assert {name: len(array) for name, array in results.load_all(order).items()} == {"features": 4}


def test_blackened_images_are_counted_and_the_reference_is_told(mq, tmp_path, run_script, monkeypatch):
    draw = Sampler.draw

    def blacken(*args):
        images, latents = draw(*args)
        return np.zeros_like(images), latents

    monkeypatch.setattr(Sampler, "draw", blacken)
    flags = ("--multi_chkpt", mq, "--outdir", tmp_path, "--num_archs", 1, "--batch_size", 1)
    assert run_script(eval_random, "dit", *EVAL, *flags)[0] == 0
    log = (tmp_path / "run.log").read_text()
    for name in ("full_precision", "config_000"):
        assert log.count(f"{name}: 12 of 12 images are of one constant colour") == 1
    assert "reference: 1797 images of" in log
    assert "\nreference_images: 1797\n" in (tmp_path / "sampling_config.yaml").read_text()


def test_labels_made_with_other_statistics_of_the_reference_are_not_gone_on_with(labels, mq, tmp_path, run_script):
    """As after a version that read some kinds of files in another way."""
    folder = shutil.copytree(labels, tmp_path / "labels")
    row = json.loads((folder / "full_precision.json").read_text())
    row["FID-GT-1k"] *= 1.1
    del row["digest"]
    (folder / "full_precision.json").write_text(json.dumps(row))
    code, printed = run_script(eval_random, "dit", *EVAL, "--multi_chkpt", mq, "--outdir", folder, "--num_archs", 3)
    assert code == 2 and "other statistics of the reference images" in printed and "another --outdir" in printed
