"""Small things that several tests share."""

import contextlib
import functools
import io
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from filelock import FileLock
from made_up import MadeUpWorkers
from PIL import Image
from small_clip import save_clip

from evaluation import fid
from evaluation.clip_score import ClipScore
from models import geometry
from models.clip import load_clip
from models.families import FAMILIES
from quant import multiquantizer
from quant.model import QuantizedModel
from stages.common import log
from stages.labelling import eval_random

ROOT = Path(__file__).parent.parent
PROCESS_BYTES = 2.5e9  # of memory that a test process takes, with what it starts

# One thread a process, those that tests start included: pytest-xdist starts a process for each core.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The real geometries at small width: pairwise different where the real widths differ.
TINY_XL2 = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
TINY_PIXART = TINY_XL2 | {"cross_attention_dim": 16, "caption_channels": 24}
TINY = {
    "pixart_alpha": TINY_PIXART,
    "pixart_sigma": TINY_PIXART,
    "hunyuan": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "hidden_size": 16,
        "num_layers": 6,  # the last two have a skip_linear
        "cross_attention_dim": 12,
        "cross_attention_dim_t5": 24,
        "pooled_projection_dim": 20,
        "sample_size": 8,
    },
    "sdxl": {
        "sample_size": 8,
        "block_out_channels": (8, 12, 16),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (2, 3, 4),
        "cross_attention_dim": 20,
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 8 + 6 * 4,
        "norm_num_groups": 4,
    },
    "sdv15": {
        "sample_size": 8,
        "block_out_channels": (8, 12, 16, 16),
        "attention_head_dim": 2,
        "cross_attention_dim": 20,
        "norm_num_groups": 4,
    },
    "dit": TINY_XL2 | {"num_embeds_ada_norm": 10},
}
# Flags of a short labelling run.
EVAL = ("--model_id", "embedded", "--n_imgs", 12, "--batch_size", 12, "--steps", 2)
SPLIT_FAMILIES = [name for name, family in FAMILIES.items() if family.slot_rules.splits]


def pytest_xdist_auto_num_workers(config):
    """As many test processes as there are cores and memory for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores, int(psutil.virtual_memory().available / PROCESS_BYTES)))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """A process runs all tests of a module, which share fixtures, unless they say otherwise; the longest come first."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
    longest = ("labelling", "stages", "hub_layouts")
    items.sort(key=lambda item: min((longest.index(part) for part in item.path.parts if part in longest), default=3))


@pytest.fixture(scope="session")
def built_once(tmp_path_factory, worker_id):
    """built_once(name, build): the folder `name`, which `build(folder)` has filled once for all test processes."""
    own = tmp_path_factory.getbasetemp()
    together = own if worker_id == "master" else own.parent

    def folder_of(name, build):
        folder, done = together / name, together / f"{name}.done"
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                folder.mkdir()
                build(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Every test process keeps its cached files to itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUA2SEDIMO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def family():
    return FAMILIES["dit"]


def tiny(name, **changes):
    """The family's denoiser at its own topology and small width, tied as the real one, its random weights never zero."""
    torch.manual_seed(0)
    denoiser = geometry.build(name, **TINY[name] | changes).eval().requires_grad_(False)
    if name == "dit":
        blocks = denoiser.transformer_blocks
        for block in blocks:
            block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
    for parameter in denoiser.parameters():
        parameter.data = parameter.data.to(FAMILIES[name].dtype).float()  # values that its precision holds exactly
    return denoiser


def tiny_dit(layers=2):
    return tiny("dit", num_layers=layers)


def tiny_model(name, denoiser=None):
    """The QuantizedModel of a tiny denoiser, a new one if none is given, by the family's name."""
    return QuantizedModel(denoiser or tiny(name), **FAMILIES[name].quantization)


def tiny_inputs(name, denoiser):
    """Arguments of a call of the tiny denoiser for two pictures."""
    torch.manual_seed(1)
    return geometry.example_inputs(name, denoiser, batch=2)


@pytest.fixture(scope="session")
def tiny_mq(built_once):
    """Path of a tiny denoiser's multiquantizer by the family's name."""

    def path_of(name):
        def build(folder):
            multiquantizer.build(tiny_model(name), folder / "mq.pt")

        return built_once(f"tiny_{name}", build) / "mq.pt"

    return path_of


@pytest.fixture(scope="session")
def load_tiny(tiny_mq):
    """A new tiny denoiser by the family's name, and its slots and entries, which tests share and do not change."""

    @functools.cache
    def load(name):
        model = multiquantizer.load(tiny_mq(name), tiny_model(name))
        return model.slots, model.entries

    return lambda name: (tiny(name), *load(name))


def script(name, *flags):
    """A script's command line, for a process of its own."""
    return [sys.executable, str(ROOT / "scripts" / name), *map(str, flags)]


@pytest.fixture
def small_files():
    """Files grow to 64 KB and no further, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_here(name, *flags):
    """Run a script in this process, which saves the seconds of its imports; returns (exit code, printed text)."""
    printed, code = io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [name, *map(str, flags)]),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        try:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        except SystemExit as ending:
            code = ending.code
        finally:
            for handler in list(log.handlers):
                handler.close()
                log.removeHandler(handler)
    return code, printed.getvalue()


@pytest.fixture(scope="session")
def embedded_mq(built_once):
    """Path of an embedded model's multiquantizer by the family's name, made by its script: DiT's in its own process."""

    def path_of(name):
        def build(folder):
            command = (f"{name}_multiquantizer.py", "--model_id", "embedded")
            if name == "dit":
                done = subprocess.run(script(*command), cwd=folder, capture_output=True, text=True)
                code, printed = done.returncode, done.stdout + done.stderr
            else:
                with contextlib.chdir(folder):
                    code, printed = run_here(*command)
            free = FAMILIES[name].num_keys - (2 * 27 if FAMILIES[name].slot_rules.ties else 0)
            assert code == 0, printed
            assert f"{path}: {free} layers fitted" in printed and f"layer {free}/{free}" in printed

        path = f"multiquantizers/{name}_embedded_mq.pt"
        return built_once(f"embedded_{name}", build) / path

    return path_of


@pytest.fixture(scope="session")
def mq(embedded_mq):
    """The embedded DiT's multiquantizer."""
    return embedded_mq("dit")


@pytest.fixture(scope="session")
def labels(mq, built_once):
    """Three labelled configurations of the embedded DiT, made in one go by a process of its own; not to be changed."""

    def build(folder):
        command = script("dit_eval_random.py", *EVAL, "--multi_chkpt", mq, "--outdir", folder, "--num_archs", 3)
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)

    return built_once("labels", build)


@pytest.fixture(scope="session")
def clip_folder(built_once):
    """A tiny CLIP model and its processor; not to be changed."""
    return built_once("small_clip", save_clip)


@pytest.fixture(scope="session")
def clip_judge(clip_folder):
    return ClipScore(*load_clip(clip_folder), torch.device("cpu"))


@pytest.fixture(scope="module")
def folds_here():
    """Predictors are trained one fold after another in this process, which spares the start of others."""
    with pytest.MonkeyPatch.context() as patch:
        pool = "autobuild.training.ProcessPoolExecutor"
        patch.setattr(pool, lambda _count, *settings: ThreadPoolExecutor(1, *settings))
        yield


@pytest.fixture
def denoiser():
    return tiny_dit()


@pytest.fixture
def model(denoiser):
    return tiny_model("dit", denoiser)


@pytest.fixture
def dit_inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([10, 500]),
        "class_labels": torch.tensor([3, 7]),
    }


@pytest.fixture
def run_script():
    """Run a stage by its family's script, or by that of all families if none is named: (exit code, printed text)."""

    def run(stage, family_name, *flags):
        name = stage.__name__.split(".")[-1]
        return run_here(f"{family_name}_{name}.py" if family_name else f"{name}.py", *flags)

    return run


@pytest.fixture
def made_up_labels(monkeypatch, run_script, tmp_path, mq):
    """made_up_labels(*flags): DiT's labelling with made-up measurements: (exit code, printed text, tasks measured)."""
    reference = tmp_path / "reference"
    reference.mkdir()
    for index in range(3):
        Image.new("RGB", (64, 64), (80 * index, 0, 0)).save(reference / f"{index}.png")
    monkeypatch.setattr(fid, "distance", lambda features, _reference: float(features.mean()) ** 2)
    flags = ("--model_id", "embedded", "--multi_chkpt", mq, "--reference", reference)

    def run(*more, last=None):
        workers = MadeUpWorkers(last)
        monkeypatch.setattr(eval_random, "start_workers", lambda *_: workers)
        return *run_script(eval_random, "dit", *flags, *more), workers.measured

    return run
