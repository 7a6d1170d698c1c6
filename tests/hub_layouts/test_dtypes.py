"""In half precision every weight and buffer has the type that its library gives it: T5's `wo` stays in float32."""

import diffusers
import numpy as np
import pytest
import torch

from hub_layouts.published import INDICES
from models import pipelines
from models.drawing import noise_generators
from models.families import FAMILIES

CPU = torch.device("cpu")
MODELS = [name for name in INDICES if name != "sdxl_refiner"]


def dtypes(pipeline):
    """{component and name: dtype} of a pipeline's parameters and buffers."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {
        f"{component}.{name}": tensor.dtype
        for component, module in modules.items()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def library_s_own(class_name, folder, dtype):
    with pipelines.quiet_loading():
        return dtypes(getattr(diffusers, class_name).from_pretrained(folder, torch_dtype=dtype))


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Compute in the family's own precision on the CPU too."""
    monkeypatch.setattr(pipelines, "compute_dtype", lambda family, device, wanted=None: family.dtype)


@pytest.mark.parametrize("name", MODELS)
def test_a_family_s_types_are_its_library_s(shallow_folder, as_on_cuda, name):
    family, folder = FAMILIES[name], shallow_folder(name)
    sampler = pipelines.load_sampler(family, str(folder), CPU)
    own = dtypes(sampler.pipeline)
    assert own == library_s_own(family.pipeline, folder, family.dtype)
    assert own[f"{family.denoiser}.{next(iter(sampler.denoiser.state_dict()))}"] == family.dtype == torch.float16


def test_the_refiner_s_types_are_its_library_s(shallow_folder, as_on_cuda):
    family, folder = FAMILIES["sdxl"], shallow_folder("sdxl_refiner")
    sampler = pipelines.load_sampler(family, str(shallow_folder("sdxl")), CPU, pipelines.Extras(refiner_id=str(folder)))
    expected = library_s_own(family.refiner.pipeline, folder, family.dtype)
    assert dtypes(sampler.refiner) == expected and torch.float16 in expected.values()


def test_the_checkpoint_s_types_are_its_library_s(checkpoint, published_folder, as_on_cuda, monkeypatch, in_cache):
    monkeypatch.chdir(checkpoint.parents[3])
    in_cache("clip", published_folder("clip"))
    sampler = pipelines.load_sampler(FAMILIES["sdv15"], FAMILIES["sdv15"].model_id, CPU)
    with pipelines.quiet_loading():
        own = diffusers.StableDiffusionPipeline.from_single_file(
            str(checkpoint), config=str(checkpoint.with_suffix("")), local_files_only=True, torch_dtype=torch.float32,
            tokenizer=sampler.pipeline.tokenizer, safety_checker=None, feature_extractor=None,
        )  # fmt: skip
    assert dtypes(sampler.pipeline) == dtypes(own) and dtypes(own)["unet.conv_in.weight"] == torch.float32


@pytest.mark.parametrize("name, encoder", [("pixart_alpha", "text_encoder"), ("hunyuan", "text_encoder_2")])
def test_t5_s_second_projections_stay_in_float32(shallow_folder, as_on_cuda, name, encoder):
    """transformers#20287: in half precision their output overflows."""
    sampler = pipelines.load_sampler(FAMILIES[name], str(shallow_folder(name)), CPU)
    found = {key: dtype for key, dtype in dtypes(sampler.pipeline).items() if key.startswith(f"{encoder}.encoder")}
    assert {dtype for key, dtype in found.items() if ".wo." in key} == {torch.float32}
    assert {dtype for key, dtype in found.items() if ".wi_0." in key or ".q." in key} == {torch.float16}


@pytest.mark.parametrize("name", MODELS)
def test_types_fit_together_in_half_precision(shallow_folder, as_on_cuda, name):
    """From the prompt to the pixels: nothing meets a tensor of another type, and the picture is finite."""
    family = FAMILIES[name]
    extras = pipelines.Extras(refiner_id=str(shallow_folder("sdxl_refiner")) if family.refiner else None)
    sampler = pipelines.load_sampler(family, str(shallow_folder(name)), CPU, extras)
    prompt = [3] if family.num_classes else ["a red seven"]
    with torch.no_grad():
        images = sampler.images(prompt, noise_generators(3, [0]), 2, 4.0, 64)
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all() and images.std() > 0.01
