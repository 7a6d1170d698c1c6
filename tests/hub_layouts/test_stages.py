"""All three stages by the default --model_id, from an offline Hub cache of the repositories as they are published."""

import subprocess

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image

from evaluation import fid, quant_cache
from hub_layouts.conftest import CHECKPOINT
from hub_layouts.hub import environment, hub_cache
from hub_layouts.published import REPOSITORIES, read_files
from models.embedded import judge
from models.families import FAMILIES
from stages import infer, multiquantizer
from stages.labelling import eval_random

NEEDED = {name: (name,) for name in FAMILIES} | {"sdxl": ("sdxl", "sdxl_refiner"), "sdv15": ("clip",)}
CPU = ("--device", "cpu")
SAMPLING = (*CPU, "--res", 64, "--steps", 2)
NUM_IMAGES = 4


@pytest.fixture
def judged_by_digits(monkeypatch):
    """The Inception network cannot be had offline: the digit classifier's features stand in for its."""
    monkeypatch.setattr(fid, "InceptionFeatures", judge.DigitFeatures)


@pytest.fixture
def workplace(request, tmp_path, monkeypatch, in_cache, published_folder, checkpoint):
    """A family whose default model is in the cache, or where the checkpoint belongs; the working folder is the test's.

    The cache is as a download leaves it: the files that are read, and a listing of all that there are.
    """
    family = FAMILIES[request.param]
    for name in NEEDED[family.name]:
        in_cache(name, published_folder(name), files=read_files(name), listing=True)
    if family.name == "sdv15":
        (tmp_path / CHECKPOINT).parent.parent.mkdir(parents=True)
        (tmp_path / CHECKPOINT).parent.symlink_to(checkpoint.parent)
    (tmp_path / "prompts.txt").write_text("".join(f"a red {word} on blue\n" for word in ("one", "two", "three", "four")))
    monkeypatch.chdir(tmp_path)
    return family, tmp_path


def images_of(outdir):
    """uint8 images of the only run in `outdir`."""
    (run,) = (path.parent for path in outdir.glob("*/samples"))
    return np.stack([np.asarray(Image.open(path)) for path in sorted((run / "samples").iterdir())])


SLOW = {name: pytest.param(name, marks=pytest.mark.slow) for name in ("pixart_sigma", "hunyuan", "sdxl")}


@pytest.mark.parametrize("workplace", [SLOW.get(name, name) for name in FAMILIES], indirect=True)
def test_the_three_stages(workplace, run_script, judged_by_digits, reference):
    family, folder = workplace
    code, printed = run_script(multiquantizer, family.name, *CPU)
    free = family.num_keys - (2 * 27 if family.slot_rules.ties else 0)
    assert code == 0 and f"{family.name}_mq.pt: {free} layers fitted" in printed, printed
    assert len(torch.load(folder / "multiquantizers" / f"{family.name}_mq.pt", weights_only=True)["slots"]) == free

    prompts = () if family.num_classes else ("--prompts", "prompts.txt")
    labelling = ("--outdir", "labels", "--num_archs", 1, "--n_imgs", NUM_IMAGES, "--reference", reference, *prompts)
    code, printed = run_script(eval_random, family.name, *SAMPLING, *labelling)
    assert code == 0, printed
    (row,) = quant_cache.load(folder / "labels" / "quant_cache.pkl")
    assert len(row["config"]) == family.num_keys and np.isfinite(row["FID-GT-1k"]) and row["FID-GT-1k"] > 0
    assert 3 < row["avg_bits"] < family.precision_bits and row["bops"] > 0

    more = ("--quant_act",) if family.name == "pixart_alpha" else ("--no_compare",)
    inferring = ("--outdir", "images", "--q_config", "labels/quant_cache.pkl:best", "--pack", "--n_imgs", 2, *more)
    code, printed = run_script(infer, family.name, *SAMPLING, *inferring)
    assert code == 0, printed
    images = images_of(folder / "images")
    assert images.shape == (2, 64, 64, 3) and all(image.std() > 2 for image in images)
    assert not np.array_equal(images[0], images[1])


def test_a_process_of_its_own_by_the_hub_s_variables(published_folder, tmp_path):
    """HF_HOME and HF_HUB_OFFLINE are what a user sets; the screen tells of the fitting and of nothing else."""
    hub_cache(tmp_path / "home", REPOSITORIES["dit"], published_folder("dit"))
    command = script("dit_multiquantizer.py", *CPU)
    done = subprocess.run(command, cwd=tmp_path, env=environment(tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode == 0 and "dit_mq.pt: 201 layers fitted" in done.stdout, done.stderr
    told = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert all("weights/s" in line for line in told), told
