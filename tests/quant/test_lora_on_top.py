"""LoRAs on packed denoisers, by diffusers' `load_lora_weights`: as on the dequantized model, and off without a trace."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from zoo import ZOO

from errors import InputError
from models.families import FAMILIES
from models.pipelines import load_sampler
from quant import QuantizedModel
from quant.layers import packed_layers
from quant.slots import is_weight_layer

PIPELINES = ["flux", "sd3", "wan", "qwen_image", "z_image", "sana", "ltx_video", "aura_flow"]
UNETS = ["sdxl", "sdv15"]
SDXL = pytest.param("sdxl", marks=pytest.mark.slow)


class Drawing:
    """A pipeline, its denoiser, and how it draws."""

    def __init__(self, name):
        if name in UNETS:
            self.pipeline = load_sampler(FAMILIES[name], "embedded", torch.device("cpu")).pipeline
            self.attribute = "unet"
        else:
            self.pipeline, self.attribute = ZOO[name].build_pipeline(), "transformer"
        self.name = name
        self.pipeline.set_progress_bar_config(disable=True)

    @property
    def denoiser(self):
        return getattr(self.pipeline, self.attribute)

    def draw(self):
        if self.name not in UNETS:
            return ZOO[self.name].draw(self.pipeline)
        generator = torch.Generator().manual_seed(0)
        return self.pipeline("a red seven", num_inference_steps=2, output_type="np", generator=generator).images


def write_lora(drawing, folder):
    """Write a LoRA of rank 2 for every weight layer in the denoiser's blocks, convolutions too, as diffusers does."""
    denoiser = copy.deepcopy(drawing.denoiser)
    inner = [path for path, each in denoiser.named_modules() if is_weight_layer(each) and _takes_lora(path, each)]
    torch.manual_seed(5)
    denoiser.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=inner))
    state = get_peft_model_state_dict(denoiser)
    state = {key: 0.2 * torch.randn_like(value, dtype=torch.float32) for key, value in state.items()}
    kind = "unet_lora_layers" if drawing.attribute == "unet" else "transformer_lora_layers"
    type(drawing.pipeline).save_lora_weights(folder, **{kind: state})
    return len(inner)


def _takes_lora(path, layer):
    """PEFT takes no convolution in groups."""
    inner = any(f"{word}." in path for word in ("blocks", "layers", "resnets", "downsamplers"))
    return inner and getattr(layer, "groups", 1) == 1


@pytest.fixture(params=[*PIPELINES, SDXL, "sdv15"])
def drawing(request):
    return Drawing(request.param)


def test_it_acts_as_on_the_dequantized_model_and_comes_off(drawing, tmp_path):
    count = write_lora(drawing, tmp_path)
    assert count > 5
    QuantizedModel(drawing.denoiser).pack("kmeans-4", show=False)
    plain, paths = drawing.draw(), [path for path, _ in packed_layers(drawing.denoiser)]
    drawing.pipeline.load_lora_weights(tmp_path)
    found = drawing.draw()
    adapted = sum(hasattr(module, "lora_A") for module in drawing.denoiser.modules())
    assert adapted == count and np.abs(found - plain).max() > 0.01
    with pytest.raises(InputError, match="unload LoRAs"):
        drawing.denoiser.save_pretrained(tmp_path / "never")
    drawing.pipeline.unload_lora_weights()
    assert [path for path, _ in packed_layers(drawing.denoiser)] == paths
    assert np.array_equal(drawing.draw(), plain)

    drawing.denoiser.dequantize()
    assert np.array_equal(drawing.draw(), plain)
    drawing.pipeline.load_lora_weights(tmp_path)
    np.testing.assert_allclose(found, drawing.draw(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["flux", "sana", SDXL])
@pytest.mark.parametrize("safe", [False, True])
def test_it_is_not_fused_in_silence(name, safe, tmp_path):
    drawing = Drawing(name)
    write_lora(drawing, tmp_path)
    QuantizedModel(drawing.denoiser).pack("mse-4", show=False)
    plain = drawing.draw()
    drawing.pipeline.load_lora_weights(tmp_path)
    adapted = drawing.draw()
    with pytest.raises(RuntimeError, match="leave the LoRA unfused"):
        drawing.pipeline.fuse_lora(safe_fusing=safe)
    assert np.array_equal(drawing.draw(), adapted)
    drawing.pipeline.unload_lora_weights()
    assert np.array_equal(drawing.draw(), plain)


def test_a_dequantized_model_takes_it_for_good(tmp_path):
    """What the refusal to fuse advises."""
    drawing = Drawing("flux")
    QuantizedModel(drawing.denoiser).pack("mse-4", show=False)
    drawing.denoiser.dequantize()
    denoiser = drawing.denoiser
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    for name, parameter in denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    on_top = drawing.draw()
    denoiser.fuse_lora()
    np.testing.assert_allclose(drawing.draw(), on_top, rtol=0, atol=1e-5)
