"""The embedded pipelines before training: the real denoisers' topology at small width, their text encoders, their sampler.

Geometry other than the widths is the published models' own (their config.json on the Hub): blocks,
layers per block, transformer layers, norms, projections, conditioning. Pictures are 64 px, latents 8x8.
"""

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from torch import nn

NULL_CLASS = 1000  # DiTPipeline's own class for "no label"
LATENT_PX = 8


@dataclass(frozen=True)
class Recipe:
    """What an embedded pipeline is made of."""

    pipeline: str  # class in diffusers
    denoiser_name: str  # part of the pipeline
    denoiser: Callable  # builds it, untrained
    scheduler: object
    text_encoders: tuple[str, ...] = ()  # names in TEXT_ENCODERS of the parts text_encoder, text_encoder_2
    arguments: tuple[tuple[str, object], ...] = ()  # others of the pipeline's constructor
    call: tuple[tuple[str, object], ...] = ()  # others of the pipeline's call
    max_timestep: int = 1000  # noise levels it learns


def build_vae():
    widths = (8, 16, 32, 32)
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
    )


def build_dit():
    """DiT-XL/2 at width 36, its conditioning shared by all blocks (Peebles and Xie, 2023)."""
    denoiser = diffusers.DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        sample_size=LATENT_PX,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    blocks = denoiser.transformer_blocks
    for block in blocks:
        block.norm1.emb = blocks[0].norm1.emb  # one timestep and label embedder, as in DiT
        zero(block.norm1.linear)  # adaLN-Zero
    embedder = blocks[0].norm1.emb
    embedder.class_embedder.dropout_prob = 0  # else every block drops labels on its own
    for layer in (embedder.timestep_embedder.linear_1, embedder.timestep_embedder.linear_2):
        nn.init.normal_(layer.weight, std=0.02)
    table = embedder.class_embedder.embedding_table.weight.data
    table.normal_(std=0.02)
    table[10:NULL_CLASS] = 0  # classes that the digits do not use
    zero_noise_half(denoiser.proj_out_2)
    return denoiser


def build_pixart():
    """PixArt's XL/2 at width 48: one AdaLN for all blocks (Chen et al., 2024)."""
    denoiser = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        cross_attention_dim=48,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        sample_size=LATENT_PX,
        patch_size=2,
        caption_channels=48,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    nn.init.normal_(denoiser.adaln_single.linear.weight, std=0.02)
    for block in denoiser.transformer_blocks:
        zero(block.attn2.to_out[0])
    zero_noise_half(denoiser.proj_out)
    return denoiser


def build_hunyuan():
    """Hunyuan-DiT's 40 blocks with long skips at width 48 (Li et al., 2024)."""
    denoiser = diffusers.HunyuanDiT2DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        hidden_size=48,
        in_channels=4,
        num_layers=40,
        sample_size=LATENT_PX,
        patch_size=2,
        mlp_ratio=4.3637,
        activation_fn="gelu-approximate",
        cross_attention_dim=48,
        cross_attention_dim_t5=48,
        pooled_projection_dim=48,
    )
    zero_noise_half(denoiser.proj_out)
    return denoiser


def build_sdxl():
    """Stable Diffusion XL's U-Net: transformers of 1, 2 and 10 layers, 70 in all (Podell et al., 2023)."""
    return diffusers.UNet2DConditionModel(
        sample_size=LATENT_PX,
        block_out_channels=(24, 40, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(3, 5, 4),
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        norm_num_groups=8,
    )


def build_sdxl_refiner():
    """The refiner's U-Net: four levels, transformers of 4 layers, the second text encoder only."""
    return diffusers.UNet2DConditionModel(
        sample_size=LATENT_PX,
        block_out_channels=(16, 20, 24, 24),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=4,
        attention_head_dim=(4, 5, 6, 6),
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 5 * 8,
        norm_num_groups=4,
    )


def build_sdv15():
    """Stable Diffusion 1.5's U-Net (Rombach et al., 2022)."""
    return diffusers.UNet2DConditionModel(
        sample_size=LATENT_PX,
        block_out_channels=(24, 40, 48, 48),
        attention_head_dim=(3, 5, 6, 6),
        cross_attention_dim=32,
        norm_num_groups=8,
    )


def zero(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def zero_noise_half(layer):
    """Start the noise prediction at zero. The variance half stays: all-zero channels have no scale."""
    is_noise = torch.arange(layer.out_features) % 8 < 4
    layer.weight.data[is_noise] = 0
    layer.bias.data[is_noise] = 0


LINEAR_BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}

RECIPES = {
    "dit": Recipe(
        pipeline="DiTPipeline",
        denoiser_name="transformer",
        denoiser=build_dit,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, **LINEAR_BETAS),
    ),
    "pixart_alpha": Recipe(
        pipeline="PixArtAlphaPipeline",
        denoiser_name="transformer",
        denoiser=build_pixart,
        scheduler=diffusers.DPMSolverMultistepScheduler(**LINEAR_BETAS),
        text_encoders=("t5",),
        call=(("use_resolution_binning", False), ("clean_caption", False)),
    ),
    "pixart_sigma": Recipe(
        pipeline="PixArtSigmaPipeline",
        denoiser_name="transformer",
        denoiser=build_pixart,
        scheduler=diffusers.DPMSolverMultistepScheduler(**LINEAR_BETAS),
        text_encoders=("t5",),
        call=(("use_resolution_binning", False), ("clean_caption", False)),
    ),
    "hunyuan": Recipe(
        pipeline="HunyuanDiTPipeline",
        denoiser_name="transformer",
        denoiser=build_hunyuan,
        scheduler=diffusers.DDPMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.03,
            prediction_type="v_prediction",
            steps_offset=1,
            clip_sample=False,
        ),
        text_encoders=("bert", "t5"),
        call=(("use_resolution_binning", False),),
        arguments=(("safety_checker", None), ("feature_extractor", None), ("requires_safety_checker", False)),
    ),
    "sdxl": Recipe(
        pipeline="StableDiffusionXLPipeline",
        denoiser_name="unet",
        denoiser=build_sdxl,
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **SD_BETAS),
        text_encoders=("clip", "clip_projection"),
    ),
    "sdxl_refiner": Recipe(
        pipeline="StableDiffusionXLImg2ImgPipeline",
        denoiser_name="unet",
        denoiser=build_sdxl_refiner,
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **SD_BETAS),
        text_encoders=(None, "clip_projection"),
        arguments=(("requires_aesthetics_score", True), ("force_zeros_for_empty_prompt", False)),
        call=(("image", torch.zeros(1, 4, LATENT_PX, LATENT_PX)), ("strength", 1.0)),
        max_timestep=300,
    ),
    "sdv15": Recipe(
        pipeline="StableDiffusionPipeline",
        denoiser_name="unet",
        denoiser=build_sdv15,
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, **SD_BETAS),
        text_encoders=("clip",),
        arguments=(("safety_checker", None), ("feature_extractor", None), ("requires_safety_checker", False)),
    ),
}


def assemble(name, denoiser, vae, text_encoders):
    """The diffusers pipeline of a recipe; `text_encoders` maps names to (tokenizer, encoder)."""
    recipe = RECIPES[name]
    parts = {recipe.denoiser_name: denoiser, "vae": vae, "scheduler": recipe.scheduler, **dict(recipe.arguments)}
    for place, text_encoder in enumerate(recipe.text_encoders):
        suffix = "" if place == 0 else f"_{place + 1}"
        tokenizer, encoder = text_encoders.get(text_encoder, (None, None))
        parts |= {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder}
    pipeline = getattr(diffusers, recipe.pipeline)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
