"""Small things that several tests share."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

from models.families import FAMILIES

ROOT = Path(__file__).parent.parent

# The geometry of facebook/DiT-XL-2-512.
REAL_DIT = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 64,
    "patch_size": 2,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Every test run keeps its cached files to itself."""
    monkeypatch.setenv("QUA2SEDIMO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def family():
    return FAMILIES["dit"]


def tiny_dit(layers=2):
    """A DiT with DiT-XL/2's layer names, tied timestep embedders, and random weights, never zero."""
    torch.manual_seed(0)
    denoiser = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()
    first = denoiser.transformer_blocks[0].norm1.emb
    for block in denoiser.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
    for parameter in denoiser.parameters():
        parameter.data = parameter.data.half().float()  # values that half precision holds exactly
    return denoiser


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
    """Run a stage as its script does; returns (exit code, printed text)."""

    def run(stage, family_name, *flags):
        from stages.common import log, run_stage

        monkeypatch.setattr(sys, "argv", [f"{family_name}_{stage.__name__}.py", *map(str, flags)])
        code = 0
        try:
            run_stage(stage.main, family_name)
        except SystemExit as ending:
            code = ending.code
        finally:
            for handler in list(log.handlers):
                handler.close()
                log.removeHandler(handler)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run
