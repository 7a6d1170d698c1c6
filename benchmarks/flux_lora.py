"""A LoRA for FLUX on a denoiser that another program has quantized, and on ours: `python -m benchmarks.flux_lora`.

A small FLUX with random weights is quantized to 4 bits by each program, written, loaded again, and given the same LoRA by
`FluxPipeline.load_lora_weights`. Printed is by how much it changes the output, relative to the change that it makes to the
float model's; or why it cannot be loaded. Writes benchmarks/results/flux_lora.json.

    pip install -e '.[peers]'
"""

import copy
import importlib.metadata
import tempfile
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from benchmarks.machine import write_result
from errors import first_line
from quant import QuantizedModel

CONFIG = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (8, 12, 12),
}
LAYERS = ["attn.to_q", "attn.to_k", "attn.to_v", "x_embedder"]


def ours(source, folder):
    denoiser = FluxTransformer2DModel.from_pretrained(source)
    model = QuantizedModel(denoiser)
    model.pack(model.uniform("mse-4"))
    denoiser.save_pretrained(folder)
    return FluxTransformer2DModel.from_pretrained(folder)


def sdnq(source, folder):
    from sdnq import SDNQConfig

    settings = SDNQConfig(weights_dtype="uint4")
    FluxTransformer2DModel.from_pretrained(source, quantization_config=settings).save_pretrained(folder)
    return FluxTransformer2DModel.from_pretrained(folder)


def write_lora(denoiser, folder):
    """Write a LoRA of rank 4 with random factors for some of the denoiser's layers."""
    denoiser = copy.deepcopy(denoiser)
    denoiser.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=LAYERS))
    state = get_peft_model_state_dict(denoiser)
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers={n: 0.1 * torch.randn_like(t) for n, t in state.items()})


@torch.no_grad()
def change_by_lora(denoiser, folder):
    """By how much the LoRA in `folder` changes the denoiser's output."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, 64, generator=generator),
        "pooled_projections": torch.randn(1, 64, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "guidance": None,
    }
    before = denoiser(**inputs, return_dict=False)[0]
    pipeline = FluxPipeline(None, None, None, None, None, None, denoiser)
    pipeline.load_lora_weights(folder)
    return denoiser(**inputs, return_dict=False)[0] - before


def main():
    torch.manual_seed(0)
    lines = {}
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        FluxTransformer2DModel(**CONFIG).save_pretrained(work / "float")
        write_lora(FluxTransformer2DModel.from_pretrained(work / "float"), work / "lora")
        expected = change_by_lora(FluxTransformer2DModel.from_pretrained(work / "float"), work / "lora")
        for title, make in {"this program": ours, f"SDNQ {importlib.metadata.version('sdnq')}": sdnq}.items():
            try:
                change = change_by_lora(make(work / "float", work / title.split()[0]), work / "lora")
            except Exception as reason:  # whatever the program raises is the result
                lines[title] = f"cannot be loaded: {type(reason).__name__}: {first_line(reason)}"
            else:
                error = float((change - expected).norm() / expected.norm())
                lines[title] = f"loaded; its change of the output is within {100 * error:.0f} % of the float model's"
            print(f"{title:<16} {lines[title]}")
    write_result("flux_lora", {"lines": lines})


if __name__ == "__main__":
    main()
