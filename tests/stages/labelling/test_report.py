"""The report on labelled configurations, on folders made by hand."""

import csv
import json
import math

import pytest
from omegaconf import OmegaConf
from PIL import Image

from evaluation import quant_cache
from stages.labelling import json_lines, report
from stages.labelling.label_runs import LABEL_FLAGS
from stages.run import run_main

BITS, FIDS = [3.0, 3.5, 4.0, 4.5, 3.2], [9.0, 7.0, 7.5, 5.0, math.nan]


def make(folder, seed=42, key="model.a.weight_quantizer", **settings):
    """A labelling run's folder: five rows, the last without FID."""
    folder.mkdir()
    rows = [
        {
            "quantized_size": int(bits * 1000),
            "avg_bits": bits,
            "quantized_error": 10 - bits,
            "FID-GT-1k": fid,
            "bops": 0.5,
            "config": {key: ["mse-4", 16, 4, 0.25]},
        }
        for bits, fid in zip(BITS, FIDS, strict=True)
    ]
    quant_cache.save(rows, folder / "quant_cache.pkl")
    json_lines.save(
        [{"row": n, "configuration": n, "images": 5, "ssim": 1 - fid / 10} for n, fid in enumerate(FIDS[:4], 1)],
        folder / "quant_proxies.jsonl",
    )
    flags = dict.fromkeys(LABEL_FLAGS, "same") | {"seed": seed, "n_imgs": 5} | settings
    OmegaConf.save(OmegaConf.create(flags), folder / "sampling_config.yaml")
    row = rows[0] | {"avg_bits": 16.0, "FID-GT-1k": 4.0}
    del row["config"]
    (folder / "full_precision.json").write_text(json.dumps(row))
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["quant_cache_report.py", *map(str, arguments)])
        code = 0
        try:
            run_main(report.main)
        except SystemExit as ending:
            code = ending.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_a_report(tmp_path, run):
    folder = make(tmp_path / "a")
    code, printed = run(folder, "--top", 3)
    assert code == 0, printed
    lines = printed.splitlines()
    assert [line.split()[0][-1] for line in lines[2:5]] == ["4", "2", "3"]  # best first
    assert "rank correlation with FID (4 rows)" in printed
    values = {name: float(value) for name, value in (line.split() for line in lines if len(line.split()) == 2)}
    assert values["ssim"] == -1.0 and values["avg_bits"] == -0.8 and values["quantized_error"] == 0.8
    with (folder / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == ["4", "2", "3", "1", "5"] and rows[0]["FID-GT-1k"] == "5.0"
    assert Image.open(folder / "report.png").size[0] > 800


def test_the_pareto_front():
    rows = [{"avg_bits": bits, "FID-GT-1k": fid} for bits, fid in zip(BITS[:4], FIDS[:4], strict=True)]
    assert [row["avg_bits"] for row in report.pareto(rows)] == [3.0, 3.5, 4.5]


def test_merged_labels(tmp_path, run):
    folders = [make(tmp_path / "a"), make(tmp_path / "b", seed=43, a_l=0.5)]
    code, printed = run(*folders, "--outdir", tmp_path / "both")
    assert code == 0, printed
    rows = quant_cache.load(tmp_path / "both" / "quant_cache.pkl")
    assert [row["avg_bits"] for row in rows] == BITS * 2
    lines = json_lines.load(tmp_path / "both" / "quant_proxies.jsonl")
    assert [line["row"] for line in lines] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert "rank correlation with FID (8 rows)" in printed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 42}, "has the seed 42, and so the noise, of"),
        ({"steps": 9}, "labelled with steps 9"),
        ({"key": "model.b.weight_quantizer"}, "labels another denoiser"),
    ],
)
def test_labels_that_do_not_compare_are_not_merged(tmp_path, run, settings, message):
    first, second = make(tmp_path / "a"), make(tmp_path / "b", **{"seed": 43} | settings)
    code, printed = run(first, second, "--outdir", tmp_path / "both")
    assert code == 2 and message in printed and "Traceback" not in printed
    assert not (tmp_path / "both").exists()


def test_a_folder_without_labels(tmp_path, run):
    code, printed = run(tmp_path)
    assert code == 2 and "quant_cache.pkl: no labelled configurations" in printed
    folder = make(tmp_path / "a")
    (folder / "full_precision.json").unlink()
    code, printed = run(folder)
    assert code == 2 and "full_precision.json: cannot be read" in printed
