"""Whole pipelines around the zoo's denoisers: text encoders, autoencoders and schedulers in the real ones' classes."""

import diffusers
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from zoo import denoisers, text
from zoo.text import seeded

SHIFTED = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}


def flux():
    tokenizer, encoder = text.clip()
    tokenizer_2, encoder_2 = text.t5()
    return diffusers.FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SHIFTED),
        vae=_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=denoisers.build("flux"),
    )


def sd3():
    tokenizer, encoder = text.clip_with_projection(text.CLIP_WIDTH)
    tokenizer_2, encoder_2 = text.clip_with_projection(text.CLIP_2_WIDTH)
    tokenizer_3, encoder_3 = text.t5()
    return diffusers.StableDiffusion3Pipeline(
        transformer=denoisers.build("sd3"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
    )


def wan(**changes):
    """Wan 2.1's; `changes` are further arguments of the pipeline."""
    tokenizer, encoder = text.umt5()
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=seeded(vae),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=denoisers.build("wan"),
        **changes,
    )


def wan_2_2():
    """Wan 2.2's: one denoiser for the first, noisy steps and another, of other weights, for the rest."""
    second = denoisers.build("wan")
    for parameter in second.parameters():
        parameter.data *= 0.9
    return wan(transformer_2=second, boundary_ratio=0.9)


def qwen_image():
    tokenizer, encoder = text.qwen2_5_vl()
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], **statistics
    )
    return diffusers.QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SHIFTED),
        vae=seeded(vae),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=denoisers.build("qwen_image"),
    )


def z_image():
    tokenizer, encoder = text.qwen3()
    return diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=denoisers.build("z_image"),
    )


def sana():
    tokenizer, encoder = text.gemma2()
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=_deep_compression_vae(),
        transformer=denoisers.build("sana"),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def pixart():
    tokenizer, encoder = text.t5()
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=_vae(),
        transformer=denoisers.build("pixart"),
        scheduler=DPMSolverMultistepScheduler(),
    )


def ltx_video():
    tokenizer, encoder = text.t5()
    return diffusers.LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SHIFTED, shift_terminal=0.1),
        vae=_ltx_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=denoisers.build("ltx_video"),
    )


def aura_flow():
    tokenizer, encoder = text.umt5()
    return diffusers.AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=_vae(),
        transformer=denoisers.build("aura_flow"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def dit():
    return diffusers.DiTPipeline(transformer=denoisers.build("dit"), vae=_vae(), scheduler=DPMSolverMultistepScheduler())


def _vae():
    """An autoencoder of pictures: 4 channels, half the pixels per side."""
    return seeded(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=1.5,
            shift_factor=0.05,
        )
    )


def _deep_compression_vae():
    """Sana's autoencoder: 4 channels, half the pixels per side."""
    both = {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8),
        "layers_per_block": (1, 1),
        "qkv_multiscales": ((), (5,)),
    }
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in both.items()}
    return seeded(diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.41407, **sides))


def _ltx_vae():
    """LTX-Video's autoencoder: 8 channels, a quarter of the frames and of the pixels per side."""
    both = {
        "block_out_channels": (8, 8),
        "layers_per_block": (1, 1, 1),
        "spatio_temporal_scaling": (True, True),
    }
    decoder = {f"decoder_{name}": value for name, value in both.items()}
    return seeded(
        diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            down_block_types=("LTXVideoDownBlock3D",) * 2,
            decoder_inject_noise=(False,) * 3,
            downsample_type=("conv",) * 2,
            upsample_residual=(False,) * 2,
            upsample_factor=(1,) * 2,
            patch_size=1,
            **both,
            **decoder,
        )
    )
