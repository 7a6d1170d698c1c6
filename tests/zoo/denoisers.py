"""Denoisers of today's text-to-image and text-to-video models, small, and what one call of each takes.

The configurations have the real ones' options and proportions; where those name several models of a class, of the
one with the most kinds of layers. Inputs are those of two pictures, or one video of three frames, in float32.
"""

import diffusers
import torch

from zoo.text import (
    CLIP_2_WIDTH,
    CLIP_WIDTH,
    GEMMA_WIDTH,
    QWEN_WIDTH,
    T5_WIDTH,
    UMT5_WIDTH,
    seeded,
)

TOKENS = 6  # of a text
TRUNK = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
XL2 = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "in_channels": 4, "out_channels": 8}

# name -> (class in diffusers, its configuration)
CONFIGS = {
    "flux": (  # FLUX.1-dev
        "FluxTransformer2DModel",
        TRUNK
        | {"in_channels": 16, "num_single_layers": 2, "joint_attention_dim": T5_WIDTH}
        | {"pooled_projection_dim": CLIP_WIDTH, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)},
    ),
    "sd3": (  # Stable Diffusion 3.5 medium
        "SD3Transformer2DModel",
        TRUNK
        | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3, "joint_attention_dim": T5_WIDTH}
        | {"caption_projection_dim": 32, "pooled_projection_dim": CLIP_WIDTH + CLIP_2_WIDTH}
        | {"pos_embed_max_size": 12, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    ),
    "wan": (  # 2.1 and, but for the second denoiser, 2.2
        "WanTransformer3DModel",
        TRUNK | {"in_channels": 16, "out_channels": 16, "text_dim": UMT5_WIDTH, "freq_dim": 24, "ffn_dim": 56},
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        TRUNK | {"in_channels": 16, "out_channels": 4, "joint_attention_dim": QWEN_WIDTH, "axes_dims_rope": (4, 6, 6)},
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        | {"cap_feat_dim": QWEN_WIDTH, "axes_dims": [4, 6, 6], "axes_lens": [128, 32, 32]},
    ),
    "sana": (
        "SanaTransformer2DModel",
        TRUNK
        | {"in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 4, "cross_attention_head_dim": 8}
        | {"cross_attention_dim": 32, "caption_channels": GEMMA_WIDTH, "sample_size": 8},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        XL2 | {"cross_attention_dim": 16, "caption_channels": T5_WIDTH, "sample_size": 8},
    ),
    "ltx_video": (
        "LTXVideoTransformer3DModel",
        TRUNK | {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": T5_WIDTH},
    ),
    "aura_flow": (
        "AuraFlowTransformer2DModel",
        {"sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 2, "attention_head_dim": 16}
        | {"num_attention_heads": 2, "joint_attention_dim": UMT5_WIDTH, "caption_projection_dim": 32}
        | {"pos_embed_max_size": 64},
    ),
    "dit": ("DiTTransformer2DModel", XL2 | {"sample_size": 8, "num_embeds_ada_norm": 1000}),
}


def build(name):
    """The denoiser by name, its weights random."""
    class_name, config = CONFIGS[name]
    return seeded(getattr(diffusers, class_name)(**config))


def inputs(name):
    """Keyword arguments {name: value} of one call of the denoiser by name."""
    generator = torch.Generator().manual_seed(1)
    return INPUTS[name](CONFIGS[name][1], lambda *shape: torch.randn(shape, generator=generator))


def _flux(config, noise):
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return {
        "hidden_states": noise(2, 16, config["in_channels"]),
        "encoder_hidden_states": noise(2, TOKENS, T5_WIDTH),
        "pooled_projections": noise(2, CLIP_WIDTH),
        "timestep": torch.tensor([0.9, 0.4]),
        "img_ids": torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], dim=1),  # [16, 3]
        "txt_ids": torch.zeros(TOKENS, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }


def _sd3(config, noise):
    return {
        "hidden_states": noise(2, config["in_channels"], 8, 8),
        "encoder_hidden_states": noise(2, TOKENS, T5_WIDTH),
        "pooled_projections": noise(2, CLIP_WIDTH + CLIP_2_WIDTH),
        "timestep": torch.tensor([900.0, 400.0]),
    }


def _wan(config, noise):
    return {
        "hidden_states": noise(1, config["in_channels"], 3, 8, 8),
        "timestep": torch.tensor([900]),
        "encoder_hidden_states": noise(1, TOKENS, UMT5_WIDTH),
    }


def _qwen_image(config, noise):
    return {
        "hidden_states": noise(2, 16, config["in_channels"]),
        "encoder_hidden_states": noise(2, TOKENS, QWEN_WIDTH),
        "encoder_hidden_states_mask": torch.ones(2, TOKENS, dtype=torch.long),
        "timestep": torch.tensor([0.9, 0.4]),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }


def _z_image(config, noise):
    return {
        "x": [noise(config["in_channels"], 1, 8, 8) for _ in range(2)],
        "t": torch.tensor([0.1, 0.6]),
        "cap_feats": [noise(TOKENS, QWEN_WIDTH), noise(TOKENS + 3, QWEN_WIDTH)],
    }


def _with_text(width):
    def take(config, noise):
        return {
            "hidden_states": noise(2, config.get("in_channels", 4), 8, 8),
            "encoder_hidden_states": noise(2, TOKENS, width),
            "timestep": torch.tensor([0.9, 0.4]),
        }

    return take


def _pixart(config, noise):
    sizes = {"resolution": None, "aspect_ratio": None}
    return _with_text(T5_WIDTH)(config, noise) | {"added_cond_kwargs": sizes, "timestep": torch.tensor([900, 400])}


def _ltx_video(config, noise):
    return {
        "hidden_states": noise(1, 3 * 4 * 4, config["in_channels"]),
        "encoder_hidden_states": noise(1, TOKENS, T5_WIDTH),
        "timestep": torch.tensor([900]),
        "encoder_attention_mask": torch.ones(1, TOKENS),
        "num_frames": 3,
        "height": 4,
        "width": 4,
    }


def _dit(config, noise):
    return {
        "hidden_states": noise(2, config["in_channels"], 8, 8),
        "timestep": torch.tensor([900, 400]),
        "class_labels": torch.tensor([3, 7]),
    }


INPUTS = {
    "flux": _flux,
    "sd3": _sd3,
    "wan": _wan,
    "qwen_image": _qwen_image,
    "z_image": _z_image,
    "sana": _with_text(GEMMA_WIDTH),
    "pixart": _pixart,
    "ltx_video": _ltx_video,
    "aura_flow": _with_text(UMT5_WIDTH),
    "dit": _dit,
}
