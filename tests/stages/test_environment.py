"""Machines without a home folder, or with one that cannot be written to."""

import os
import sys

import pytest
from conftest import ROOT
from unprivileged import run_unprivileged

# Runs a script as a user whom the system knows nothing of.
UNKNOWN_USER = """
import pwd, runpy, sys
def unknown(*_): raise KeyError("no such user")
pwd.getpwuid = unknown
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PLACES = ("HOME", "QUA2SEDIMO_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "HF_HOME", "USER", "LOGNAME")


@pytest.fixture
def run(tmp_path):
    """Run a script in an empty folder, by an unknown user: run(name, *flags, **environment variables)."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "here").mkdir()

    def run(name, *flags, **variables):
        environment = {name: value for name, value in os.environ.items() if name not in PLACES}
        environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary"), "HF_HUB_OFFLINE": "1"} | variables
        command = [sys.executable, "-c", UNKNOWN_USER, str(ROOT / "scripts" / name), *map(str, flags)]
        return run_unprivileged(command, cwd=tmp_path / "here", env=environment)

    return run


def test_images_without_a_home(tmp_path, run, mq):
    flags = ("--model_id", "embedded", "--multi_chkpt", mq, "--q_config", "uniform:mse-4", "--steps", 2, "--n_imgs", 1)
    done = run("dit_infer.py", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"there is no home folder: {tmp_path / 'temporary'}") == 1
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["dit_sample"]  # and no folder of the name ~


@pytest.mark.slow
def test_a_report_in_a_home_that_cannot_be_written_to(tmp_path, run, labels):
    done = run("quant_cache_report.py", labels, "--outdir", "report", HOME="/dev/null/nowhere")
    assert done.returncode == 0 and done.stderr == ""
    assert sorted(path.name for path in (tmp_path / "here" / "report").iterdir()) == ["report.csv", "report.png"]
