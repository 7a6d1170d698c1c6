"""Predictor, search, insights and search without labels, as users run them."""

import csv
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import EVAL, ROOT, run_here, script
from PIL import Image

from autobuild import graph, space
from autobuild.sketching import Sketch
from evaluation import quant_cache
from quant import config
from quant.file_keys import by_file_key
from stages import sampling, score_sources, sensitivities
from stages.labelling import eval_random

LABELS = ROOT / "labels" / "pixart_alpha_embedded"
ROWS = 60


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The first rows of the labels that come with the program, and their proxies."""
    folder = tmp_path_factory.mktemp("cache")
    quant_cache.save(quant_cache.load(LABELS / "quant_cache.pkl")[:ROWS], folder / "quant_cache.pkl")
    shutil.copy(LABELS / "quant_proxies.jsonl", folder)
    return folder


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory, folds_here):
    """A predictor, briefly trained, and what its training printed."""
    path = tmp_path_factory.mktemp("predictor") / "p.pt"
    flags = ("--family", "pixart_alpha", "--cache", cache, "--epochs", 4, "--output", path)
    code, printed = run_here("train_predictor.py", *flags)
    assert code == 0, printed
    return path, printed


def test_training(trained):
    _, printed = trained
    lines = {line[:34].strip(): line[34:].split() for line in printed.splitlines()}
    assert "pixart_alpha, 60 rows, target -1*log(FID-GT-1k), hybrid" in printed
    for name in ("predictor", "average bits", "sum of errors", "ridge on one-hot methods"):
        mean, *folds = map(float, lines[name])
        assert len(folds) == 5 and mean == pytest.approx(np.mean(folds), abs=0.01)
    assert float(lines["predictor"][0]) > 0.5


@pytest.mark.slow
def test_training_in_processes_of_its_own(cache, tmp_path):
    """As users run it: folds side by side, and no library's warning on the screen."""
    flags = ("--family", "pixart_alpha", "--cache", cache, "--epochs", 1, "--output", tmp_path / "p.pt")
    done = subprocess.run(script("train_predictor.py", *flags), capture_output=True, text=True, check=True)
    assert "rank correlation on unseen rows" in done.stdout and (tmp_path / "p.pt").exists()
    assert "Warning" not in done.stdout + done.stderr


@pytest.mark.parametrize("word", ["--scores", "--labels"])
def test_the_old_word_for_scores_is_still_taken(word):
    _, parser = score_sources.parser_of("build_config", "", ["--family", "dit"])
    assert parser.parse_args(["--family", "dit", word, "none"]).scores == "none"


def test_a_configuration_within_a_size(trained, tmp_path):
    output = tmp_path / "c.pkl"
    flags = ("--family", "pixart_alpha", "--scores", trained[0], "--avg_bits", 3.7, "--output", output)
    code, printed = run_here("build_config.py", *flags)
    assert code == 0 and f"{output}: average 3." in printed
    slots = graph.slots_of_family("pixart_alpha")[1]
    chosen = config.load(output, slots)
    rows = quant_cache.load(LABELS / "quant_cache.pkl")
    known = space.of_rows("pixart_alpha", rows)
    assert 3.65 < known.avg_bits(known.codes_of(by_file_key(chosen, slots))) <= 3.7


def test_the_papers_choice(trained, tmp_path):
    output = tmp_path / "c.pkl"
    flags = ("--family", "pixart_alpha", "--scores", trained[0], "--choice", "top1", "--output", output)
    code, printed = run_here("build_config.py", *flags)
    assert code == 0 and "learned -1*log(FID-GT-1k) from 60 rows" in printed
    assert output.exists()


def test_insights(trained, tmp_path):
    code, printed = run_here(
        "plot_insights.py",
        "--family",
        "pixart_alpha",
        "--scores",
        trained[0],
        "--q_config",
        "uniform:mse-4",
        "--outdir",
        tmp_path,
    )
    assert code == 0, printed
    for name in ("scores_by_block", "scores_by_subgraph", "scores_by_operation", "methods_by_operation"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 600
    ranking = list(csv.DictReader((tmp_path / "ranking.csv").open()))
    assert len(ranking) == 287 and all(row["chosen"] == "mse-4" for row in ranking)
    spreads = [float(row["spread"]) for row in ranking]
    assert spreads == sorted(spreads, reverse=True)
    blocks = [row["block"] for row in csv.DictReader((tmp_path / "scores_by_block.csv").open())]
    assert len(blocks) == 29
    kinds = {row["kind of subgraph"] for row in csv.DictReader((tmp_path / "scores_by_subgraph.csv").open())}
    assert {"self-attention", "cross-attention", "feed-forward"} < kinds


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ("--family", "dit"),
            "which is not of dit; --family names the denoiser",
        ),
        (("--family", "pixart_alpha", "--target", "FID + avg"), "'FID' is not understood; the labels have"),
        (("--family", "pixart_alpha", "--target", "log(0 - avg_bits)"), "0 of 60 rows have a number for --target"),
    ],
)
def test_training_refuses(cache, tmp_path, flags, expected):
    code, printed = run_here("train_predictor.py", *flags, "--cache", cache, "--output", tmp_path / "p.pt")
    assert code == 2 and expected in printed and printed.count("\n") == 1


def test_too_few_rows(tmp_path):
    quant_cache.save(quant_cache.load(LABELS / "quant_cache.pkl")[:12], tmp_path / "quant_cache.pkl")
    code, printed = run_here(
        "train_predictor.py", "--family", "pixart_alpha", "--cache", tmp_path, "--output", tmp_path / "p.pt"
    )
    assert code == 2 and "a predictor needs at least 40" in printed


def test_a_predictor_of_another_family(trained, tmp_path):
    flags = ("--scores", trained[0], "--avg_bits", 4, "--output", tmp_path / "c.pkl")
    code, printed = run_here("build_config.py", "--family", "dit", *flags)
    assert code == 2 and "is a predictor of pixart_alpha, not of dit" in printed
    code, printed = run_here("build_config.py", "--family", "pixart_alpha", *flags[:2], "--avg_bits", 2, *flags[4:])
    assert code == 2 and "--avg_bits 2: the smallest configuration of pixart_alpha has" in printed
    code, printed = run_here("build_config.py", "--family", "pixart_alpha", *flags[:2])
    assert code == 2 and "--avg_bits goes with --choice knapsack" in printed


NONE = ("--family", "dit", "--model_id", "embedded", "--scores", "none", "--steps", 2, "--n_imgs", 1, "--calls", 1)


@pytest.mark.parametrize("every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_without_labels_exactly(mq, tmp_path, monkeypatch, every):
    """One weight of so many is measured, and those after it are said to be like it, which saves most of the time."""
    measure_one, measured = sensitivities.measure_one, []

    def sparing(*args):
        measured.append(measure_one(*args) if len(measured) % every == 0 else measured[-1])
        return measured[-1]

    monkeypatch.setattr(sensitivities, "measure_one", sparing)
    said, output = tmp_path / "said", tmp_path / "c.pkl"
    flags = (*NONE, "--multi_chkpt", mq, "--probe", "exact", "--sensitivity", said, "--avg_bits", 4, "--output", output)
    code, printed = run_here("build_config.py", *flags)
    assert code == 0 and ("average 3.99" in printed or "average 4.000" in printed), printed
    assert re.search(r"at most .* left for 200 weights; less with a lower --n_imgs or --calls", printed)
    assert len(measured) == 201
    if every == 1:
        goes_on(monkeypatch, flags, said, output, measured, 201)
    monkeypatch.setattr(sampling, "load_sampler", lambda *_args, **_kwargs: pytest.fail("loaded, though all is known"))
    first = output.read_bytes()
    assert run_here("build_config.py", *flags)[0] == 0 and output.read_bytes() == first
    code, printed = run_here("build_config.py", *flags, "--calls", 2)
    assert code == 2 and "was measured with calls 1, not 2; give another --sensitivity" in printed


def goes_on(monkeypatch, flags, said, output, measured, records):
    """Cut off in the middle, the run ends in the same bytes, and measures no more than is missing."""
    whole, first = said.read_bytes(), output.read_bytes()
    measured.clear()
    said.write_bytes(whole[: len(whole) // 2])
    output.unlink()
    code, printed = run_here("build_config.py", *flags)
    assert code == 0, printed
    assert said.read_bytes() == whole and output.read_bytes() == first
    assert 0.4 * records < len(measured) < 0.8 * records


def test_without_labels(mq, tmp_path, monkeypatch):
    """By a sketch: one direction of each image at each step at first, which is a record, then two more."""
    find, measured = Sketch.find, []

    def counted(*args):
        for each in find(*args):
            measured.append(each)
            yield each

    monkeypatch.setattr(Sketch, "find", counted)
    said, output = tmp_path / "said", tmp_path / "c.pkl"
    flags = (*NONE, "--n_imgs", 2, "--batch_size", 1, "--directions", 3, "--multi_chkpt", mq, "--sensitivity", said)
    flags += ("--avg_bits", 4, "--output", output)
    code, printed = run_here("build_config.py", *flags)
    assert code == 0 and ("average 3.99" in printed or "average 4.000" in printed), printed
    assert len(measured) == 4  # two directions and one more, of two images
    goes_on(monkeypatch, flags, said, output, measured, 4)
    monkeypatch.setattr(sampling, "load_sampler", lambda *_args, **_kwargs: pytest.fail("loaded, though all is known"))
    first = output.read_bytes()
    assert run_here("build_config.py", *flags)[0] == 0 and output.read_bytes() == first
    code, printed = run_here("build_config.py", *flags, "--directions", 4)
    assert code == 2 and "was measured with directions 3, not 4; give another --sensitivity" in printed


def test_chosen_configurations_are_labelled(mq, tmp_path, run_script):
    chosen = ["uniform:mse-4", "uniform:kmeans_all-3"]
    flags = (*EVAL, "--multi_chkpt", mq, "--outdir", tmp_path / "out", "--q_config", *chosen)
    code, printed = run_script(eval_random, "dit", *flags)
    assert code == 0, printed
    rows = quant_cache.load(tmp_path / "out" / "quant_cache.pkl")
    assert [{value[0] for value in row["config"].values()} for row in rows] == [{"mse-4"}, {"kmeans_all-3"}]
    code, printed = run_script(eval_random, "dit", *flags[:-1], "uniform:mse-3")
    assert code == 2 and "were made with chosen_key uniform:mse-4, uniform:kmeans_all-3" in printed
