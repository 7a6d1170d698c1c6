"""The peak of the host's memory while the real scripts run a model of real size, beside what is reckoned of it.

All of it is of real size but the text encoders, the embedded ones; weights are random. The model is computed with on the
CPU, an image at a time, SDXL without its refiner. What the same script takes with the embedded model, the program itself,
is off what is measured.
"""

import json
import runpy
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
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

STAGES = {  # and their flags
    "multiquantizer": (),
    "infer --no-pack": ("--no-pack", "--compute_dtype", "float32"),
    "infer --pack": ("--pack", "--compute_dtype", "float32", "--no_compare"),
}
# name -> settings of the denoiser that its text encoders ask for, and stages whose denoiser a machine of 24 GB can hold
MEASURED = {
    "pixart_alpha": (("caption_channels",), tuple(STAGES)),
    "sdxl": (
        ("cross_attention_dim", "projection_class_embeddings_input_dim", "addition_time_embed_dim"),
        ("multiquantizer", "infer --pack"),
    ),
}


def embedded_settings(name, part, settings):
    told = json.loads((EMBEDDED_FOLDER / name / part / "config.json").read_text())
    return {setting: told[setting] for setting in settings}


def conditioning(name):
    return embedded_settings(name, FAMILIES[name].denoiser, MEASURED[name][0])


def make_folder(name, folder):
    """The pipeline's folder."""
    family = FAMILIES[name]
    shutil.copytree(EMBEDDED_FOLDER / name, folder, ignore=shutil.ignore_patterns(family.denoiser, "vae"))
    random_denoiser(name, **conditioning(name)).save_pretrained(folder / family.denoiser)
    scaling = embedded_settings(name, "vae", ("scaling_factor",))
    diffusers.AutoencoderKL(**real_parts.VAE, **scaling).half().save_pretrained(folder / "vae")


def reckon(name):
    """Bytes of each of the stages."""
    family, parts = replace(FAMILIES[name], refiner=None), []
    for dtype in (family.dtype, torch.float32):
        with torch.device("meta"):
            denoiser = geometry.build(name, **conditioning(name))
        parts.append(pipeline_of(family, dtype, denoiser, [], 1, family.resolution))
    return {stage: cpu_bytes(*parts, stage) for stage in MEASURED[name][1]}


def peaks(family, folder, model):
    """Bytes at the peak of each of the stages."""
    file = folder / f"{Path(model).name}.pt"
    flags = {"multiquantizer": ("--output", file)}
    infer = ("--multi_chkpt", file, "--q_config", "uniform:mse-4", "--outdir", folder / "images")
    infer += ("--n_imgs", 1, "--batch_size", 1, "--steps", 2, "--res", family.resolution if model != "embedded" else 64)
    infer += ("--no_refiner",) if family.refiner else ()
    for stage in MEASURED[family.name][1]:
        own, name = STAGES[stage], f"scripts/{family.name}_{stage.split()[0]}.py"
        yield stage, peak_of(name, "--device", "cpu", "--model_id", model, *flags.get(stage, infer), *own)


def peak_of(*command):
    """Bytes at the peak of a script in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory_check", *map(str, command)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def measure(name):
    """{family, stage, bytes reckoned, bytes measured} of each stage."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([sys.executable, "-m", "benchmarks.memory_check", name, folder / "real"], check=True)
        program, used = (dict(peaks(FAMILIES[name], folder, model)) for model in ("embedded", folder / "real"))
        for stage, reckoned in reckon(name).items():
            yield {"family": name, "stage": stage, "reckoned": reckoned, "measured": used[stage] - program[stage]}


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
        print(peak_memory(torch.device("cpu")))
    else:
        make_folder(sys.argv[0], Path(sys.argv[1]))
