"""Warnings of libraries go into a run's log, each once, and not to the screen."""

import logging
import sys
import warnings

import numpy as np
import pytest
from conftest import EVAL

from models import drawing
from stages.labelling import eval_random, labeller
from stages.library_notes import library_notes


def warn_as_libraries_do():
    logging.getLogger("diffusers.pipelines").warning("your input was truncated: %s", ["a long\n tail"])
    logging.getLogger("transformers.tokenization").warning("longer than the maximum")
    logging.getLogger("accelerate.hooks").warning("an offload hook")
    np.array([np.nan]).astype(np.uint8)
    warnings.warn("to programmers", DeprecationWarning, stacklevel=2)


@pytest.fixture
def on_the_screen(monkeypatch):
    """Loggers print as they do outside of tests."""
    for name in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [logging.StreamHandler(sys.stderr)])
        monkeypatch.setattr(logging.getLogger(name), "propagate", False)


def test_all_kinds_are_kept_in_one_line_each(capsys, on_the_screen):
    kept = []
    with library_notes(kept.append):
        warn_as_libraries_do()
    assert len(kept) == 4 and capsys.readouterr().err == ""
    assert kept[0] == "diffusers.pipelines: your input was truncated: ['a long\\n tail']"
    assert "RuntimeWarning: invalid value encountered in cast" in kept[3] and "\n" not in "".join(kept)


def test_what_was_before_is_put_back(on_the_screen):
    filters, show = list(warnings.filters), warnings.showwarning
    handlers = {name: logging.getLogger(name).handlers for name in ("diffusers", "transformers", "torch", "root")}
    with pytest.raises(ZeroDivisionError), library_notes([].append):
        raise ZeroDivisionError
    assert warnings.filters == filters and warnings.showwarning is show
    assert handlers == {name: logging.getLogger(name).handlers for name in handlers}


def test_a_labelling_run_logs_each_once(mq, tmp_path, run_script, monkeypatch, on_the_screen, capfd):
    """They come with every batch of every configuration."""

    def generate_batches(*args, **kwargs):
        for batch in drawing.generate_batches(*args, **kwargs):
            warn_as_libraries_do()
            yield batch

    monkeypatch.setattr(labeller, "generate_batches", generate_batches)
    flags = (*EVAL, "--multi_chkpt", mq, "--outdir", tmp_path, "--num_archs", 1)
    code, printed = run_script(eval_random, "dit", *flags)
    captured = capfd.readouterr()
    assert code == 0, printed
    assert not any(note in printed + captured.out + captured.err for note in ("truncated", "invalid value"))
    assert f"warnings of libraries: 4, in {tmp_path / 'run.log'}" in printed
    written = (tmp_path / "run.log").read_text()
    for note in ("your input was truncated", "longer than the maximum", "an offload hook", "invalid value encountered"):
        assert written.count(note) == 1
