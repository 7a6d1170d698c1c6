"""What a labelling run says beforehand of its time and its disk."""

import re
from collections import namedtuple

import pytest
import torch
from conftest import EVAL

from errors import InputError
from models.families import FAMILIES
from stages.common import log
from stages.flags import Flags
from stages.labelling import eval_random, forecast, successive_halving
from stages.units import as_time

CPU = torch.device("cpu")
FLAGS = {"workers": None, "ray_address": None, "keep_samples": False, "q_config": [], "budget_images": []}
FLAGS |= {"compute_dtype": None}


def args_of(**changes):
    return Flags(FLAGS | {"num_archs": 500, "n_imgs": 1000} | changes)


@pytest.mark.parametrize(
    ("seconds", "said"), [(3, "3 s"), (130, "2 min"), (5000, "83 min"), (70 * 3600, "70 h"), (55 * 86400, "55 days")]
)
def test_times(seconds, said):
    assert as_time(seconds) == said


def test_images_of_successive_halving():
    """500 on 100 images, a third of them on 200 more, three tenths of those on 700 more."""
    args = args_of(budget_images=[100, 300])
    assert successive_halving.stages(args, 500) == [(500, 100), (166, 300), (49, 1000)]
    assert [successive_halving.images_from(stage, args, 500) for stage in range(3)] == [117_500, 67_500, 34_300]
    assert successive_halving.images_from(0, args_of(), 500) == 500_000


@pytest.fixture
def clock(monkeypatch):
    seconds = [0.0]
    monkeypatch.setattr(forecast.time, "monotonic", lambda: seconds[0])
    return seconds


def test_what_is_left_is_said_after_the_first_images_and_the_first_configuration(clock, caplog):
    log.setLevel("INFO")
    each = forecast.Forecast(args_of(), 500, at_once=4)
    each.begin(100_000)
    clock[0] = 60.0
    each.add(10)  # so have the other three workers, about
    each.add(30)
    clock[0] = 1200.0
    each.add(360)
    each.tell("configuration")
    each.tell("configuration")
    said = [record.getMessage().partition(" left")[0] for record in caplog.records]
    assert said == ["about 42 h", "about 83 h"]  # 1.5 s an image, then 3 s
    assert "a lower --num_archs, a lower --n_imgs, --budget_images 100 300, --workers" in caplog.text


def test_a_run_says_it(mq, tmp_path, run_script):
    flags = ("--model_id", "embedded", "--n_imgs", 12, "--batch_size", 1, "--steps", 2, "--num_archs", 2)
    code, _ = run_script(eval_random, "dit", *flags, "--multi_chkpt", mq, "--outdir", tmp_path)
    assert code == 0
    lines = (tmp_path / "run.log").read_text().splitlines()
    places = [place for place, line in enumerate(lines) if re.search("about .* left until 2 configurations", line)]
    of_full_precision = next(place for place, line in enumerate(lines) if "full precision: FID" in line)
    of_first = next(place for place, line in enumerate(lines) if "configuration 1:" in line)
    assert len(places) == 2 and places[0] < of_full_precision < places[1] < of_first
    assert "disk: about" in lines[0]


def test_disk_is_what_a_run_takes(labels, tmp_path):
    """Of full precision's images what lies there, while the parts are there too twice as much."""
    args = args_of(model_id="embedded", res=None, outdir=tmp_path, n_imgs=12)
    reckoned = forecast.disk_bytes(args, FAMILIES["dit"], CPU)
    there = sum(path.stat().st_size for path in (labels / "full_precision").iterdir())
    assert reckoned["full precision"] == pytest.approx(2 * there, rel=0.1)
    assert forecast.disk_bytes(args | {"outdir": labels}, FAMILIES["dit"], CPU)["full precision"] == 0


@pytest.mark.parametrize(
    ("family", "prompt_bytes"),
    [
        ("pixart_alpha", 120 * (4096 + 1) * 2),
        ("pixart_sigma", 300 * (4096 + 1) * 2),
        ("hunyuan", 2 * (77 * (1024 + 1) + 256 * (2048 + 1))),
        ("sdv15", 77 * 768 * 4),
        ("dit", 0),
    ],
)
def test_prompts_at_real_size(family, prompt_bytes, tmp_path):
    row = FAMILIES[family]
    args = args_of(model_id=row.model_id, res=row.resolution, outdir=tmp_path, keep_samples=True)
    reckoned = forecast.disk_bytes(args, row, torch.device("cuda"))
    assert reckoned["prompt embeddings"] == 1000 * prompt_bytes
    assert reckoned["samples"] == 501 * 1000 * 3 * row.resolution**2 / 2


def test_disk_that_is_not_there_is_told_before_anything_is_loaded(mq, tmp_path, run_script, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(eval_random, "start_workers", lambda *_: pytest.fail("loaded"))
    flags = (*EVAL, "--num_archs", 3, "--multi_chkpt", mq, "--outdir", tmp_path, "--keep_samples")
    code, printed = run_script(eval_random, "dit", *flags)
    assert code == 2 and "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    assert "the run needs about" in last and "1.0 kB are free" in last and last.endswith("or leave out --keep_samples")


def test_enough_disk_is_no_error(tmp_path):
    args = args_of(model_id="embedded", res=None, outdir=tmp_path, n_imgs=2)
    forecast.check_disk(args, FAMILIES["dit"], CPU)
    with pytest.raises(InputError, match=r"a lower --n_imgs$"):
        forecast.check_disk(args | {"n_imgs": 10**12}, FAMILIES["dit"], CPU)
