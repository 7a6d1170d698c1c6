"""Kill a labelling run at random moments, start it again until it is done, and find the undisturbed labels.

Each kill is a SIGKILL of the run, or, with Ray, of the run or one of its workers. There are a few in each way;
`KILLS=50 pytest -s tests/stages/test_kills.py` makes more.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import EVAL, script

KILLS = int(os.environ.get("KILLS", 2))
SEED = int(os.environ.get("KILLS_SEED", 0))
SMALL_TASKS = ("--batch_size", 2, "--num_archs", 3)  # two tasks per configuration
RESULTS = ("quant_cache.pkl", "quant_proxies.jsonl", "full_precision.json", "results.txt")
SLEEP = shutil.which("sleep")
SECONDS = 8  # that a run takes once its log is begun, about


@pytest.fixture(scope="module")
def pixart_mq(tmp_path_factory):
    path = tmp_path_factory.mktemp("mq") / "pixart_mq.pt"
    command = script("pixart_alpha_multiquantizer.py", "--model_id", "embedded", "--output", path)
    subprocess.run(command, capture_output=True, check=True)
    return path


def command_of(mq, folder, workers):
    more = ("--workers", workers) if workers else ()
    return script("pixart_alpha_eval_random.py", *EVAL, *SMALL_TASKS, "--multi_chkpt", mq, "--outdir", folder, *more)


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


def run_disturbed(command, folder, chance, kills_left):
    """Run until done, killed at random moments meanwhile; returns the number of kills."""
    kills = 0
    while True:
        log = folder / "run.log"
        size = log.stat().st_size if log.exists() else 0
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None and not (log.exists() and log.stat().st_size > size) and kills < kills_left:
                time.sleep(0.01)
            while process.poll() is None and kills < kills_left:
                time.sleep(chance.uniform(0, SECONDS))
                if process.poll() is None:
                    kills += 1
                    if kill_someone(process, chance):
                        break
            errors = process.stderr.read()
        if process.returncode == 0:
            return kills
        assert process.returncode == -signal.SIGKILL, errors


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


@pytest.mark.parametrize("workers", [None, 2])
def test_killed_at_any_moment_nothing_is_lost(tmp_path, pixart_mq, stranger, workers):
    undisturbed = tmp_path / "undisturbed"
    subprocess.run(command_of(pixart_mq, undisturbed, workers), capture_output=True, check=True)
    chance, kills, runs = random.Random(SEED), 0, 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        kills += run_disturbed(command_of(pixart_mq, folder, workers), folder, chance, KILLS - kills)
        runs += 1
        for name in RESULTS:
            assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), f"{name} after {kills} kills"
        assert not (folder / "parts").exists() and not list(folder.rglob(".*"))
        print(f"{kills} kills, {runs} runs finished")
