"""A Stable Diffusion 1.x pipeline written as CompVis writes one: a single .ckpt, by names of this file's own.

The names of the autoencoder's and the text encoder's modules are from the state dictionaries of
CompVis/stable-diffusion and of transformers 4, whose CLIP model stood in a module `text_model`.
"""

import re

import torch

from models.compvis import compvis_names

VAE_NAMES = (
    (r"conv_norm_out", "norm_out"),
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"up_blocks\.(\d+)\.resnets", r"up.\1.block"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"conv_shortcut", "nin_shortcut"),
)


def compvis_state(pipeline):
    """{name: tensor} of the pipeline's three models, and some of the schedule that CompVis keeps with them."""
    text = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in pipeline.text_encoder.state_dict().items()}
    positions = torch.arange(pipeline.text_encoder.config.max_position_embeddings)[None]
    text["text_model.embeddings.position_ids"] = positions
    alphas = pipeline.scheduler.alphas_cumprod
    return {
        "betas": pipeline.scheduler.betas,
        "alphas_cumprod": alphas,
        "sqrt_alphas_cumprod": alphas.sqrt(),
        **_under("model.diffusion_model", unet_state(pipeline.unet)),
        **_under("first_stage_model", vae_state(pipeline.vae)),
        **_under("cond_stage_model.transformer", text),
    }


def unet_state(unet):
    names = compvis_names(unet)
    modules = {name: name.rpartition(".") for name in unet.state_dict()}  # path, dot, weight or bias
    return {f"{names[modules[name][0]]}.{modules[name][2]}": weight for name, weight in unet.state_dict().items()}


def vae_state(vae):
    """Weights by CompVis' names: decoder levels are counted from the finest, attention is by 1x1 convolutions."""
    last = len(vae.config.block_out_channels) - 1
    state = {}
    for name, weight in vae.state_dict().items():
        for pattern, replacement in VAE_NAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"\bup\.(\d+)", lambda found: f"up.{last - int(found[1])}", name)
        state[name] = weight[..., None, None] if ".attn_1." in name and weight.ndim == 2 else weight
    return state


OPEN_CLIP_NAMES = (
    (r"^(?:text_model\.)?embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^(?:text_model\.)?embeddings\.token_embedding", "token_embedding"),
    (r"^(?:text_model\.)?final_layer_norm", "ln_final"),
    (r"^(?:text_model\.)?encoder\.layers", "transformer.resblocks"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
)


def sdxl_state(pipeline):
    """{name: tensor} of a Stable Diffusion XL pipeline's four models, as Stability AI's program names them."""
    text = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in pipeline.text_encoder.state_dict().items()}
    return {
        **_under("model.diffusion_model", unet_state(pipeline.unet)),
        **_under("first_stage_model", vae_state(pipeline.vae)),
        **_under("conditioner.embedders.0.transformer", text),
        **_under("conditioner.embedders.1.model", open_clip_state(pipeline.text_encoder_2)),
    }


def open_clip_state(encoder):
    """Weights by OpenCLIP's names: the three projections of attention in one, the last projection transposed."""
    state = {}
    for name, weight in encoder.state_dict().items():
        for pattern, replacement in OPEN_CLIP_NAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = weight
    state["text_projection"] = state.pop("text_projection.weight").T.contiguous()
    for name in [name for name in state if ".self_attn.q_proj." in name]:
        three = [state.pop(name.replace("q_proj", f"{each}_proj")) for each in "qkv"]
        block, _, kind = name.partition(".self_attn.q_proj.")
        state[f"{block}.attn.in_proj_{kind}"] = torch.cat(three)
    return state


def _under(prefix, state):
    return {f"{prefix}.{name}": weight for name, weight in state.items()}


def same_weights(one, two):
    """Whether two modules have the same state dictionary."""
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
