"""Workers by Ray: the same labels whatever their number, errors in one line. Dying workers: test_kills.py."""

import sys

import pytest
import torch

from quant.multiquantizer import with_digests
from stages.labelling import eval_random
from stages.labelling.labeller import Task

pytestmark = pytest.mark.xdist_group("ray")  # one Ray of these tests at a time
FLAGS = ("--model_id", "embedded", "--n_imgs", 12, "--batch_size", 1, "--steps", 2, "--num_archs", 2)


@pytest.mark.parametrize(
    ("family", "workers"),
    [
        ("dit", 2),
        pytest.param("dit", 4, marks=pytest.mark.slow),  # more than there are configurations
        pytest.param("sdv15", 2, marks=pytest.mark.slow),
    ],
)
def test_labels_do_not_depend_on_the_number_of_workers(embedded_mq, tmp_path, run_script, family, workers):
    """They share two configurations of three tasks each; without any a process has one thread here, as a worker has."""
    results, more_prompts = [], ()
    if family != "dit":
        (tmp_path / "prompts.txt").write_text("a red seven\n" + "many words " * 100)
        more_prompts = ("--prompts", tmp_path / "prompts.txt")
    for name, more in {"alone": (), "shared": ("--workers", workers)}.items():
        folder = tmp_path / name
        flags = (*FLAGS, "--multi_chkpt", embedded_mq(family), "--outdir", folder, *more_prompts)
        code, printed = run_script(eval_random, family, *flags, *more)
        assert code == 0, printed
        results.append([(folder / name).read_bytes() for name in ("quant_cache.pkl", "quant_proxies.jsonl")])
    assert results[0] == results[1]
    log = (folder / "run.log").read_text()
    assert f"{workers} workers, each on one thread of a CPU" in log and "where the time went" in log
    assert "left until 2 configurations are labelled, on 12 images each" in log
    assert log.count("part of your input was truncated because CLIP can only handle") == len(more_prompts) // 2


@pytest.mark.slow
def test_bad_input_found_by_a_worker_is_one_line(tmp_path, run_script, mq):
    content = torch.load(mq, weights_only=True)
    next(iter(content["slots"].values()))["fingerprint"] = "0"
    torch.save(with_digests(content), tmp_path / "other_mq.pt")
    flags = (*FLAGS, "--multi_chkpt", tmp_path / "other_mq.pt", "--outdir", tmp_path, "--workers", 1)
    code, printed = run_script(eval_random, "dit", *flags)
    last = printed.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and "other_mq.pt: made from other weights than this model's" in last
    assert last.endswith("make its own with `python scripts/dit_multiquantizer.py`")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--workers", 1, "--device", "cuda:1"), "--device cuda:1: "),
        (("--ray_address", "127.0.0.1:1"), "--ray_address 127.0.0.1:1: no cluster there"),
    ],
)
def test_flags_that_do_not_fit(tmp_path, run_script, mq, monkeypatch, flags, message):
    monkeypatch.setattr(eval_random, "pick_device", lambda name: torch.device("cpu"))
    code, printed = run_script(eval_random, "dit", *FLAGS, "--multi_chkpt", mq, "--outdir", tmp_path, *flags)
    assert code == 2 and message in printed and "Traceback" not in printed


def test_without_ray(tmp_path, run_script, mq, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "stages.labelling.ray_workers", raising=False)
    code, printed = run_script(eval_random, "dit", *FLAGS, "--multi_chkpt", mq, "--outdir", tmp_path, "--workers", 2)
    assert code == 2 and "need Ray: pip install -e '.[distributed]'" in printed


def test_tasks_are_given_out_configuration_by_configuration():
    from stages.labelling.ray_workers import TasksLeft

    tasks = [Task(index, first, first + 4) for index in (0, 1) for first in (0, 4, 8)]
    left = TasksLeft(tasks)
    assert left.take(-1) == tasks[0]
    assert left.take(-1) == tasks[3]  # another worker begins the next configuration
    assert left.take(0) == tasks[1] and left.take(1) == tasks[4]
    assert left.take(-1) == tasks[2]  # a third helps out
    left.put_back([tasks[0], tasks[1]])  # the first died
    assert [left.take(0) for _ in range(2)] == tasks[:2] and left.take(0) == tasks[5] and not left
