"""The parts of the six real pipelines beside their denoisers, on the meta device: what their shapes say of memory.

Source: the config.json files of the models' repositories on the Hub.
"""

import diffusers
import torch
import transformers

T5 = {"num_layers": 24, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
CLIP = {"vocab_size": 49408}
# name -> (class in transformers, its configuration)
TEXT_ENCODERS = {
    "T5-XXL": ("T5EncoderModel", T5 | {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "vocab_size": 32128}),
    "mT5-XL": ("T5EncoderModel", T5 | {"d_model": 2048, "d_ff": 5120, "num_heads": 32, "vocab_size": 250112}),
    "CLIP-L": (
        "CLIPTextModel",
        CLIP | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    ),
    "OpenCLIP-bigG": (
        "CLIPTextModelWithProjection",
        CLIP
        | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
        | {"projection_dim": 1280},
    ),
    "BERT": (
        "BertModel",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"vocab_size": 47020},
    ),
}
ENCODERS_OF = {
    "pixart_alpha": ("T5-XXL",),
    "pixart_sigma": ("T5-XXL",),
    "hunyuan": ("BERT", "mT5-XL"),
    "sdxl": ("CLIP-L", "OpenCLIP-bigG"),
    "sdv15": ("CLIP-L",),
    "dit": (),
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
UPCAST_VAE = ("sdxl",)  # whose autoencoder overflows in half precision, so that its pipeline decodes in float32
REFINER = {
    "sample_size": 128,
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
}
REFINER_TIME_IDS = 5  # sizes, crops and an aesthetic score


def text_encoder(name, dtype):
    """The text encoder in `dtype`, but for the layers that its library keeps in float32."""
    class_name, settings = TEXT_ENCODERS[name]
    encoder_class = getattr(transformers, class_name)
    with torch.device("meta"):
        encoder = encoder_class(encoder_class.config_class(**settings)).to(dtype)
    kept = encoder_class._keep_in_fp32_modules or ()
    for path, module in encoder.named_modules():
        if dtype == torch.float16 and path.rpartition(".")[2] in kept:
            module.float()
    return encoder


def autoencoder(dtype):
    with torch.device("meta"):
        return diffusers.AutoencoderKL(**VAE).to(dtype)


def refiner(dtype):
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**REFINER).to(dtype)


def refiner_inputs(batch, pixels, dtype):
    """Arguments of one call of the refiner's U-Net at `pixels` latent pixels per side."""
    pooled = REFINER["projection_class_embeddings_input_dim"] - REFINER_TIME_IDS * REFINER["addition_time_embed_dim"]
    with torch.device("meta"):
        return {
            "sample": torch.empty(batch, 4, pixels, pixels, dtype=dtype),
            "timestep": torch.empty(batch),
            "encoder_hidden_states": torch.empty(batch, 77, REFINER["cross_attention_dim"], dtype=dtype),
            "added_cond_kwargs": {
                "text_embeds": torch.empty(batch, pooled, dtype=dtype),
                "time_ids": torch.empty(batch, REFINER_TIME_IDS, dtype=dtype),
            },
        }
