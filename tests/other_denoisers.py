"""Denoisers beyond the six families, of diffusers' own classes at small width, and the arguments of a call."""

import diffusers
import torch

IMAGE_TOKENS, TEXT_TOKENS = 16, 5  # of the models that take images as rows of tokens: 4 x 4 of them


def flux():
    denoiser = diffusers.FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    rows = torch.arange(4.0)
    return denoiser, {
        "hidden_states": torch.randn(2, IMAGE_TOKENS, 8),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, 12),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.tensor([0.5, 0.9]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), rows, rows),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }


def sd3():
    denoiser = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return denoiser, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, 12),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.tensor([500.0, 900.0]),
    }


def wan():
    denoiser = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=20,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return denoiser, {
        "hidden_states": torch.randn(2, 4, 3, 8, 8),
        "timestep": torch.tensor([500, 900]),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, 20),
    }


def qwen_image():
    denoiser = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    mask = torch.ones(2, TEXT_TOKENS, dtype=torch.long)
    return denoiser, {
        "hidden_states": torch.randn(2, IMAGE_TOKENS, 16),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, 12),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([0.5, 0.9]),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }


def z_image():
    denoiser = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 64, 64],
    )
    return denoiser, {
        "x": [torch.randn(4, 1, 8, 8) for _ in range(2)],
        "t": torch.tensor([0.5, 0.9]),
        "cap_feats": [torch.randn(TEXT_TOKENS, 12) for _ in range(2)],
    }


def sana():
    denoiser = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=4,
    )
    return denoiser, {
        "hidden_states": torch.randn(2, 4, 4, 4),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, 12),
        "timestep": torch.tensor([500.0, 900.0]),
    }


def ltx_video():
    denoiser = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=12,
    )
    return denoiser, {
        "hidden_states": torch.randn(2, 2 * IMAGE_TOKENS, 8),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, 12),
        "encoder_attention_mask": torch.ones(2, TEXT_TOKENS, dtype=torch.long),
        "timestep": torch.tensor([500.0, 900.0]),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def aura_flow():
    denoiser = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    return denoiser, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, 12),
        "timestep": torch.tensor([0.5, 0.9]),
    }


MAKERS = (flux, sd3, wan, qwen_image, z_image, sana, ltx_video, aura_flow)


def make(maker):
    """(denoiser of random weights, arguments of a call for two images), always the same."""
    torch.manual_seed(0)
    denoiser, inputs = maker()
    for parameter in denoiser.parameters():  # some are zero when new, and with them the output
        torch.nn.init.normal_(parameter, std=0.2)
    return denoiser.eval().requires_grad_(False), inputs
