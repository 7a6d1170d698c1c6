"""More words in a multiquantizer, and configurations that are searched among them."""

import numpy as np
import pytest
import torch
from conftest import run_here

from autobuild import space as spaces
from quant.files import load_checkpoint, load_pickle
from stages import sensitivities


@pytest.mark.slow
def test_words_are_added_searched_and_held(tmp_path, monkeypatch):
    """Sensitivities are made up: what is tested is what becomes of the flags."""
    path, output = tmp_path / "mq.pt", tmp_path / "c.pkl"
    assert run_here("dit_multiquantizer.py", "--model_id", "embedded", "--output", path)[0] == 0
    before = load_checkpoint(path)
    code, printed = run_here(
        "dit_multiquantizer.py", "--model_id", "embedded", "--output", path, "--methods", "affine-3", "float"
    )
    after = load_checkpoint(path)
    assert code == 0, printed
    for key, entry in before["slots"].items():
        assert set(after["slots"][key]["parameters"]) == {*entry["parameters"], "affine-3"}
        assert torch.equal(after["slots"][key]["parameters"]["mse-4"]["scale"], entry["parameters"]["mse-4"]["scale"])

    def made_up(weight, words, prober):
        rng = np.random.default_rng(0)
        shifts = torch.from_numpy(rng.normal(size=(len(words), 50))) * torch.tensor([[2.0], [1.0], [0.0]])
        return {"changes": shifts.square().sum(dim=1), "shifts": shifts.half()}

    monkeypatch.setattr(sensitivities, "measure_one", made_up)
    flags = ("--family", "dit", "--model_id", "embedded", "--multi_chkpt", path, "--scores", "none", "--steps", 2)
    flags += (
        "--probe",
        "exact",
        "--n_imgs",
        1,
        "--calls",
        1,
        "--sensitivity",
        tmp_path / "said.pt",
        "--avg_bits",
        5,
        "--output",
        output,
    )
    words = ("--methods", "affine-3", "affine-5", "float")
    code, printed = run_here(
        "build_config.py", *flags, *words, "--fix", "proj_out_1=float", "--min_bits", "transformer_blocks.0=4"
    )
    assert code == 0 and "above what any choice within the limits has" in printed, printed
    chosen = load_pickle(output)
    assert chosen["model.proj_out_1.weight_quantizer"] == "float" and set(chosen.values()) <= {*words[1:]}
    first = [key for key in chosen if "transformer_blocks.0." in key and "timestep" not in key]
    assert first and all(chosen[key] != "affine-3" for key in first)
    code, printed = run_here("build_config.py", *flags, *words, "--max_bops", 1e-4)
    assert code == 2 and "--max_bops: the smallest configuration of dit has" in printed and printed.count("\n") == 1
    code, printed = run_here("build_config.py", *flags)
    assert code == 2 and "was measured with methods affine-3 affine-5 float, not mse-4" in printed
    assert spaces.NAMES == ("mse-4", "mse-3", "kmeans-4", "kmeans-3", "kmeans_all-4", "kmeans_all-3")
