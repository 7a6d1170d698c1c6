"""Kill a labelling run at random moments, start it again until it is done, and find the undisturbed labels.

Each kill is a SIGKILL of the run, or, with Ray, of the run or one of its workers. There is one in each way, and a few in
the long tests, or more: `KILLS=50 pytest -s tests/stages/labelling/test_kills.py`. For endings
at each write see test_interruptions.py, for the other stages tests/stages/test_killed_stages.py.
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time

import psutil
import pytest
from conftest import EVAL, run_here, script
from killing import run_disturbed

pytestmark = pytest.mark.xdist_group("ray")  # one Ray of these tests at a time
KILLS = int(os.environ.get("KILLS", 5))
SEED = int(os.environ.get("KILLS_SEED", 0))
SMALL_TASKS = ("--batch_size", 2, "--num_archs", 3)  # two tasks per configuration
RESULTS = ("quant_cache.pkl", "quant_proxies.jsonl", "full_precision.json", "results.txt")
SLEEP = shutil.which("sleep")
SCRIPT = "pixart_alpha_eval_random.py"


def flags_of(embedded_mq, folder):
    return *EVAL, *SMALL_TASKS, "--multi_chkpt", embedded_mq("pixart_alpha"), "--outdir", folder


@pytest.fixture(scope="module")
def undisturbed(embedded_mq, tmp_path_factory):
    """The labels of a run without workers, which with them are the same: all have one thread."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, printed = run_here(SCRIPT, *flags_of(embedded_mq, folder))
    assert code == 0, printed
    return folder


@pytest.fixture(scope="module")
def stranger():
    """Somebody else's worker on this machine, by its name; it must outlive these tests."""
    with subprocess.Popen(["ray::Worker", "10000"], executable=SLEEP) as process:
        yield process
        outlived = process.poll() is None
        process.kill()
    assert outlived, "a process that is not of these tests was killed"


def workers_alive(run):
    """Ray's workers that measure for the process `run`: Ray's servers are its children, and workers theirs."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(run.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith("ray::Worker"):  # at work: ray::Worker.measure
                    found.append(process)
    return found


def kill_someone(run, chance):
    """SIGKILL for the run, or one of its workers; True if the run itself was hit."""
    workers = workers_alive(run)
    if workers and chance.random() < 0.5:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
            chance.choice(workers).kill()
        return False
    run.kill()
    run.wait()
    return True


def test_workers_of_others_are_not_picked(stranger):
    """A worker is told from another's of the same name by the run that it descends from, over two generations."""
    child = f"import subprocess; subprocess.run(['ray::Worker', '10000'], executable={SLEEP!r})"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent]) as run:
        while not (workers := workers_alive(run)):
            time.sleep(0.01)
        assert len(workers) == 1 and stranger.pid != workers[0].pid
        for process in psutil.Process(run.pid).children(recursive=True):
            process.kill()
    assert stranger.poll() is None and workers_alive(run) == [] and workers_alive(stranger) == []


@pytest.mark.slow
@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize("most", [1, KILLS], ids=["once", "often"])
def test_killed_at_any_moment_nothing_is_lost(tmp_path, embedded_mq, undisturbed, stranger, most, workers):
    chance, kills, runs = random.Random(SEED), 0, 0
    while kills < most:
        folder = tmp_path / str(runs)
        folder.mkdir()
        command = script(SCRIPT, *flags_of(embedded_mq, folder), *(("--workers", workers) if workers else ()))
        kills += run_disturbed(command, folder, chance, most - kills, kill_someone)
        runs += 1
        for name in RESULTS:
            assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), f"{name} after {kills} kills"
        assert not (folder / "parts").exists() and not list(folder.rglob(".*"))
        print(f"{kills} kills, {runs} runs finished")
