"""The six real denoisers' geometry, for checks and measurements at real size without the Hub.

Source: the config.json files of the models' repositories on the Hub. The weights are random.
"""

import diffusers
import torch

from quant.slots import find_slots

XL2 = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "patch_size": 2,
}
PIXART = XL2 | {
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "norm_type": "ada_norm_single",
    "use_additional_conditions": False,
}

# family -> (class in diffusers, its configuration, tokens of the text encoders)
GEOMETRIES = {
    "pixart_alpha": ("PixArtTransformer2DModel", PIXART | {"sample_size": 64}, (120,)),
    "pixart_sigma": ("PixArtTransformer2DModel", PIXART | {"sample_size": 128}, (300,)),
    "hunyuan": (
        "HunyuanDiT2DModel",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 88,
            "hidden_size": 1408,
            "in_channels": 4,
            "num_layers": 40,
            "patch_size": 2,
            "mlp_ratio": 4.3637,
            "activation_fn": "gelu-approximate",
            "cross_attention_dim": 1024,
            "cross_attention_dim_t5": 2048,
            "pooled_projection_dim": 1024,
            "sample_size": 128,
        },
        (77, 256),
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (77,),
    ),
    "sdv15": ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}, (77,)),
    "dit": ("DiTTransformer2DModel", XL2 | {"sample_size": 64}, ()),
}


def build(name, **changes):
    """The family's denoiser at real size, on torch's default device; `changes` are of its configuration."""
    class_name, config, _ = GEOMETRIES[name]
    return getattr(diffusers, class_name)(**config | changes)


def real_shapes(family):
    """{key: shape [C, ...]} of the family's weights at real size, by the same keys as its embedded model's."""
    with torch.device("meta"):
        denoiser = build(family.name)
    return {key: slot.shape for key, slot in find_slots(denoiser, family.slot_rules).items()}


def example_inputs(name, denoiser, batch=1, pixels=None):
    """Random arguments of one call of the family's denoiser at `pixels` latent pixels per side, its own by default."""
    config = denoiser.config
    pixels = pixels or config.sample_size
    latents = torch.randn(batch, config.in_channels, pixels, pixels)
    inputs = {"timestep": torch.full((batch,), 500.0)}
    inputs["sample" if "UNet" in type(denoiser).__name__ else "hidden_states"] = latents
    inputs |= CONDITIONS[type(denoiser).__name__](config, batch, GEOMETRIES[name][2], pixels)
    return {key: value.to(denoiser.dtype) if _is_float(value) else value for key, value in inputs.items()}


def _is_float(value):
    return torch.is_tensor(value) and value.is_floating_point()


def _dit(_config, batch, _tokens, _pixels):
    return {"class_labels": torch.arange(batch)}


def _pixart(config, batch, tokens, _pixels):
    return {
        "encoder_hidden_states": torch.randn(batch, *tokens, config.caption_channels),
        "encoder_attention_mask": torch.ones(batch, *tokens),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _hunyuan(config, batch, tokens, pixels):
    rotary = (pixels // config.patch_size) ** 2, config.attention_head_dim  # [tokens, D]
    return {
        "encoder_hidden_states": torch.randn(batch, tokens[0], config.cross_attention_dim),
        "text_embedding_mask": torch.ones(batch, tokens[0]),
        "encoder_hidden_states_t5": torch.randn(batch, tokens[1], config.cross_attention_dim_t5),
        "text_embedding_mask_t5": torch.ones(batch, tokens[1]),
        "image_meta_size": torch.full((batch, 6), 1024.0),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": (torch.rand(rotary), torch.rand(rotary)),
    }


def _unet(config, batch, tokens, _pixels):
    inputs = {"encoder_hidden_states": torch.randn(batch, *tokens, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled),
            "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]] * batch),
        }
    return inputs


CONDITIONS = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "HunyuanDiT2DModel": _hunyuan,
    "UNet2DConditionModel": _unet,
}
