"""Flags are data: they are filled in once, and nothing changes them later."""

import copy
import pickle

import pytest

from models.families import FAMILIES
from stages import infer, score_sources
from stages.flags import Flags
from stages.labelling import eval_random
from stages.run import OneLineParser


def test_flags_are_read_only():
    flags = Flags({"steps": 4, "items": "a"})
    with pytest.raises(AttributeError):
        flags.steps = 5
    with pytest.raises(AttributeError):
        flags.other = 5
    with pytest.raises(TypeError):
        flags["steps"] = 5
    with pytest.raises(TypeError):
        vars(flags)["steps"] = 5
    assert flags == {"steps": 4, "items": "a"} and flags["items"] == "a" and getattr(flags, "none", 3) == 3


def test_others_are_new_ones():
    flags = Flags({"steps": 4, "res": 64})
    assert flags | {"steps": 5} == {"steps": 5, "res": 64} and flags.steps == 4
    assert isinstance(flags | Flags({"seed": 1}), Flags)


def test_they_come_to_other_processes():
    flags = Flags({"steps": 4})
    assert pickle.loads(pickle.dumps(flags)) == copy.deepcopy(flags) == flags


def test_a_parser_fills_in_once_what_is_left_out():
    parser = OneLineParser(prog="x.py")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args(["--seed", "2"], lambda flags: {"steps": flags.seed + 5})
    assert flags == {"steps": 7, "seed": 2} == parser.flags


@pytest.mark.parametrize("parse", ["infer", "eval_random", "scores"])
def test_stages_hand_on_what_cannot_be_changed(parse, monkeypatch):
    """Of an embedded model: all that is left out is filled in, from its row."""
    words = ["--model_id", "embedded"]
    monkeypatch.setattr("sys.argv", ["x.py", *words])
    if parse == "scores":
        _, parser = score_sources.parser_of("build_config", "", ["--family", "dit"])
        words += ["--family", "dit", "--scores", "none"]
        flags = parser.parse_args(words, lambda flags: score_sources.complete(flags, FAMILIES["dit"]))
    else:
        flags = (infer.parse_args if parse == "infer" else eval_random.parse_args)(FAMILIES["dit"])
    own = FAMILIES["dit"].embedded
    assert (flags.batch_size, flags.steps, flags.num_classes) == (own.batch_size, own.steps, own.num_classes)
    assert flags.guidance == (own.guidance if parse == "infer" else own.label_guidance) and flags.multi_chkpt.name
    with pytest.raises(AttributeError):
        flags.batch_size = 1
