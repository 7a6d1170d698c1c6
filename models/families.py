"""One row per family: everything that tells one denoiser from another."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Embedded:
    """What differs for the small trained pipeline in `models/embedded/<family>`, run by `--model_id embedded`."""

    steps: int
    guidance: float  # shows the best pictures
    label_guidance: float  # full precision has the lowest FID
    num_classes: int
    class_ids: tuple[int, ...]  # default of --cls_id
    q_config: str  # default of --q_config


@dataclass(frozen=True)
class Family:
    name: str
    title: str
    pipeline: str  # class in diffusers
    model_id: str  # on the Hub
    denoiser: str  # attribute of the pipeline
    dtype: torch.dtype  # precision P of the weights
    scheduler: str | None  # class in diffusers that replaces the pipeline's own
    resolution: int  # published pixels per side, of inference and of the BOPs
    steps: int
    guidance: float
    label_guidance: float
    reference_images: str  # name in constants.py of the folder FID compares with
    num_classes: int
    class_ids: tuple[int, ...]  # default of --cls_id
    q_config: str  # default of --q_config
    ties: tuple[tuple[str, str], ...]  # (pattern of a module path, path of the weight it shares)
    fp_weights: int  # published number of quantizable weights
    num_keys: int  # published number of configuration keys
    embedded: Embedded

    @property
    def precision_bits(self):
        return torch.finfo(self.dtype).bits


FAMILIES = {
    row.name: row
    for row in [
        Family(
            name="dit",
            title="DiT-XL/2",
            pipeline="DiTPipeline",
            model_id="facebook/DiT-XL-2-512",
            denoiser="transformer",
            dtype=torch.float16,
            scheduler="DPMSolverMultistepScheduler",
            resolution=512,
            steps=250,
            guidance=4.0,
            label_guidance=4.0,
            reference_images="IMAGENET_VAL_IMAGES",
            num_classes=1000,
            class_ids=(833,),
            q_config="quant_configs/dit_40.pkl",
            ties=(
                (
                    r"transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.(\w+)",
                    r"transformer_blocks.0.norm1.emb.timestep_embedder.\1",
                ),
            ),
            fp_weights=716_986_368,
            num_keys=255,
            embedded=Embedded(
                steps=20,
                guidance=2.5,
                label_guidance=1.5,
                num_classes=10,
                class_ids=tuple(range(10)),
                q_config="uniform:mse-4",
            ),
        ),
    ]
}
