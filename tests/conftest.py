"""Small things that several tests share."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import geometry
from models.families import FAMILIES
from quant import multiquantizer

ROOT = Path(__file__).parent.parent

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
SPLIT_FAMILIES = [name for name, family in FAMILIES.items() if family.splits]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Every test run keeps its cached files to itself."""
    monkeypatch.setenv("QUA2SEDIMO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def family():
    return FAMILIES["dit"]


def tiny(name, **changes):
    """The family's denoiser at its own topology and small width, tied as the real one, its random weights never zero."""
    torch.manual_seed(0)
    denoiser = geometry.build(name, **TINY[name] | changes).eval()
    if name == "dit":
        blocks = denoiser.transformer_blocks
        for block in blocks:
            block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
    for parameter in denoiser.parameters():
        parameter.data = parameter.data.to(FAMILIES[name].dtype).float()  # values that its precision holds exactly
    return denoiser


def tiny_dit(layers=2):
    return tiny("dit", num_layers=layers)


def tiny_inputs(name, denoiser):
    """Arguments of a call of the tiny denoiser for two pictures."""
    torch.manual_seed(1)
    return geometry.example_inputs(name, denoiser, batch=2)


@pytest.fixture(scope="session")
def tiny_mq(tmp_path_factory):
    """Path of a tiny denoiser's multiquantizer by the family's name, built once for all tests."""
    folder = tmp_path_factory.mktemp("tiny")

    @functools.cache
    def build(name):
        path = folder / f"{name}_mq.pt"
        multiquantizer.build(tiny(name), FAMILIES[name], path)
        return path

    return build


@pytest.fixture(scope="session")
def load_tiny(tiny_mq):
    """A new tiny denoiser by the family's name, and its slots and entries, which tests share and do not change."""

    @functools.cache
    def load(name):
        return multiquantizer.load(tiny_mq(name), tiny(name), FAMILIES[name])

    return lambda name: (tiny(name), *load(name))


def script(name, *flags):
    return [sys.executable, str(ROOT / "scripts" / name), *map(str, flags)]


@pytest.fixture(scope="session")
def mq(tmp_path_factory):
    """The embedded DiT's multiquantizer, built by its script."""
    path = tmp_path_factory.mktemp("mq") / "dit_embedded_mq.pt"
    command = [sys.executable, "scripts/dit_multiquantizer.py", "--model_id", "embedded", "--output", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "201 layers fitted" in done.stdout and "layer 201/201" in done.stderr
    return path


@pytest.fixture(scope="session")
def labels(mq, tmp_path_factory):
    """Three labelled configurations of the embedded DiT, made in one go."""
    folder = tmp_path_factory.mktemp("labels")
    command = script("dit_eval_random.py", *EVAL, "--multi_chkpt", mq, "--outdir", folder, "--num_archs", 3)
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return folder


@pytest.fixture
def denoiser():
    return tiny_dit()


@pytest.fixture
def dit_inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([10, 500]),
        "class_labels": torch.tensor([3, 7]),
    }


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a stage as its script does, of no family if that is None; returns (exit code, printed text)."""

    def run(stage, family_name, *flags):
        from stages.common import log, run_main, run_stage

        monkeypatch.setattr(sys, "argv", [f"{family_name}_{stage.__name__}.py", *map(str, flags)])
        code = 0
        try:
            run_main(stage.main) if family_name is None else run_stage(stage.main, family_name)
        except SystemExit as ending:
            code = ending.code
        finally:
            for handler in list(log.handlers):
                handler.close()
                log.removeHandler(handler)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run
