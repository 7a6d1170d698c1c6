"""The peak of the host's memory while the real scripts run a PixArt-alpha of real size, beside what is reckoned of it.

All of it is of real size but the text encoder, the embedded one; weights are random. The model is computed with on the CPU,
an image at a time. What the same script takes with the embedded model, the program itself, is off what is measured.
"""

import json
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import torch

from benchmarks import real_parts
from benchmarks.machine import peak_memory
from benchmarks.memory import cpu_bytes, pipeline_of
from benchmarks.weights import random_denoiser
from models import geometry
from models.families import FAMILIES
from models.pipelines import EMBEDDED_FOLDER

FAMILY = FAMILIES["pixart_alpha"]
EMBEDDED = EMBEDDED_FOLDER / FAMILY.name
STAGES = {"multiquantizer": (), "infer": (), "infer --pack": ("--pack", "--no_compare")}  # and their flags


def embedded_setting(part, name):
    return json.loads((EMBEDDED / part / "config.json").read_text())[name]


def make_folder(folder):
    """The pipeline's folder."""
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("transformer", "vae"))
    random_denoiser(FAMILY.name, caption_channels=embedded_setting("transformer", "caption_channels")).save_pretrained(
        folder / "transformer"
    )
    scaling = embedded_setting("vae", "scaling_factor")
    diffusers.AutoencoderKL(**real_parts.VAE, scaling_factor=scaling).half().save_pretrained(folder / "vae")


def reckon():
    """Bytes of each of the stages."""
    parts = []
    for dtype in (FAMILY.dtype, torch.float32):
        with torch.device("meta"):
            denoiser = geometry.build(FAMILY.name, caption_channels=embedded_setting("transformer", "caption_channels"))
        parts.append(pipeline_of(FAMILY, dtype, denoiser, [], 1, FAMILY.resolution))
    return {stage: cpu_bytes(*parts, stage) for stage in STAGES}


def peaks(folder, model):
    """Bytes at the peak of each of the stages."""
    file = folder / f"{Path(model).name}.pt"
    flags = {"multiquantizer": ("--output", file)}
    infer = ("--multi_chkpt", file, "--q_config", "uniform:mse-4", "--outdir", folder / "images")
    infer += ("--n_imgs", 1, "--batch_size", 1, "--steps", 2)
    for stage, own in STAGES.items():
        name = f"scripts/{FAMILY.name}_{stage.split()[0]}.py"
        yield stage, peak_of(name, "--device", "cpu", "--model_id", model, *flags.get(stage, infer), *own)


def peak_of(*command):
    """Bytes at the peak of a script in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory_check", *map(str, command)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def measure():
    """{stage, bytes reckoned, bytes measured} of each stage."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([sys.executable, "-m", "benchmarks.memory_check", folder / "real"], check=True)
        program, used = (dict(peaks(folder, model)) for model in ("embedded", folder / "real"))
        for stage, reckoned in reckon().items():
            yield {"stage": stage, "reckoned": reckoned, "measured": used[stage] - program[stage]}


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
        print(peak_memory(torch.device("cpu")))
    else:
        make_folder(Path(sys.argv[0]))
