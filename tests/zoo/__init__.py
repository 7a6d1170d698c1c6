"""Other denoisers than the six families': small ones of diffusers' own classes, and the pipelines around them.

`ZOO[name]` is an `Entry`. All weights are random, of one seed: building twice gives the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from zoo import denoisers, pipelines

SMALL = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}
PICTURE = SMALL | {"prompt": "a red seven"}
VIDEO = PICTURE | {"num_frames": 5}


@dataclass(frozen=True)
class Entry:
    """One model: its denoiser alone, and its whole pipeline."""

    make_pipeline: Callable
    denoiser: str  # name of its configuration in `denoisers`
    call: dict  # arguments of the pipeline's call that draw something small in two steps
    denoiser_names: tuple[str, ...] = ("transformer",)  # the pipeline's attributes

    def build_denoiser(self):
        """The denoiser for inference in float32 on the CPU."""
        return denoisers.build(self.denoiser)

    def build_pipeline(self):
        """The pipeline, which shows no bar of its steps."""
        pipeline = self.make_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def inputs(self, denoiser):
        """Keyword arguments of one call of `denoiser`, on its device; floating-point ones in its precision."""
        return _like(next(denoiser.parameters()), denoisers.inputs(self.denoiser))

    def draw(self, pipeline, **changes):
        """What the pipeline draws, [N, ...] in [0, 1] as an array, from noise of seed 0; `changes` are of `call`."""
        output = pipeline(**self.call | changes, generator=torch.Generator().manual_seed(0))
        return output.images if hasattr(output, "images") else output.frames


def _like(parameter, value):
    """`value` with each tensor in it on the parameter's device, and in its precision if it is floating-point."""
    if torch.is_tensor(value):
        return value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {name: _like(parameter, item) for name, item in value.items()}
    if isinstance(value, list):
        return [_like(parameter, item) for item in value]
    return value


ZOO = {
    "flux": Entry(pipelines.flux, "flux", PICTURE | {"max_sequence_length": 16}),
    "sd3": Entry(pipelines.sd3, "sd3", PICTURE | {"max_sequence_length": 16}),
    "wan": Entry(pipelines.wan, "wan", VIDEO | {"max_sequence_length": 16}),
    "wan_2_2": Entry(
        pipelines.wan_2_2, "wan", VIDEO | {"max_sequence_length": 16}, denoiser_names=("transformer", "transformer_2")
    ),
    "qwen_image": Entry(pipelines.qwen_image, "qwen_image", PICTURE | {"negative_prompt": " ", "max_sequence_length": 256}),
    "z_image": Entry(pipelines.z_image, "z_image", PICTURE | {"max_sequence_length": 64}),
    "sana": Entry(
        pipelines.sana,
        "sana",
        PICTURE
        | {"height": 32, "width": 32, "max_sequence_length": 16}
        | {"use_resolution_binning": False, "complex_human_instruction": None},
    ),
    "pixart": Entry(
        pipelines.pixart,
        "pixart",
        PICTURE | {"max_sequence_length": 16} | {"use_resolution_binning": False, "clean_caption": False},
    ),
    "ltx_video": Entry(pipelines.ltx_video, "ltx_video", VIDEO | {"height": 32, "width": 32, "max_sequence_length": 16}),
    "aura_flow": Entry(pipelines.aura_flow, "aura_flow", PICTURE | {"max_sequence_length": 16}),
    "dit": Entry(pipelines.dit, "dit", {"class_labels": [3], "num_inference_steps": 2, "output_type": "np"}),
}
