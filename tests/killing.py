"""Commands killed at random moments, from their start on, and started again until they are done."""

import contextlib
import os
import signal
import subprocess
import time

CHANGES, SECONDS = 25, 0.3  # a kill comes after so many changes of the run's files, and so long, at most
STARTING_SHARE, STARTING_SECONDS = 0.3, 8  # or, in this share of cases, so long after the start, at most


def listing(folder):
    """Names and times of the files below `folder`, whatever comes and goes meanwhile."""
    found = set()
    for place, _, names in os.walk(folder):  # which passes over what is moved away meanwhile
        for path in (os.path.join(place, name) for name in names):
            with contextlib.suppress(OSError):
                found.add((path, os.stat(path).st_mtime_ns))
    return frozenset(found)


def wait_for_changes(process, folder, count):
    """Until the process has ended, or files below `folder` were written or deleted so many times."""
    seen = {listing(folder)}
    while process.poll() is None and len(seen) <= count:
        seen.add(listing(folder))
        time.sleep(0.005)


def wait_while_starting(process, seconds):
    """Until the process has ended, or so many seconds have passed."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def kill(process, _chance):
    """SIGKILL; True, for the run itself was hit."""
    process.kill()
    process.wait()
    return True


def run_disturbed(command, folder, chance, kills_left, kill_someone=kill, cwd=None):
    """Run until done, killed at random moments meanwhile; returns the number of kills.

    `kill_someone(process, chance)` kills the run, or one of its workers; it tells whether it was the run.
    """
    kills = 0
    while True:
        how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": cwd}
        with subprocess.Popen(command, **how) as process:
            if kills < kills_left and chance.random() < STARTING_SHARE:
                wait_while_starting(process, chance.uniform(0, STARTING_SECONDS))
                kills += process.poll() is None and kill_someone(process, chance)
            while process.poll() is None and kills < kills_left:
                wait_for_changes(process, folder, chance.randint(1, CHANGES))
                time.sleep(chance.uniform(0, SECONDS))
                if process.poll() is None:
                    kills += 1
                    if kill_someone(process, chance):
                        break
            errors = process.stderr.read()
        if process.returncode == 0:
            return kills
        assert process.returncode == -signal.SIGKILL, errors
