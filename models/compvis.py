"""Names of a Stable Diffusion 1.x U-Net's modules: diffusers' and those of the CompVis checkpoints, both ways.

Published configurations and predictors of SDv1.5 name modules as CompVis does (`input_blocks.1.0.in_layers.2`).
Source: the two public implementations' state dictionaries (CompVis/stable-diffusion, diffusers).
"""

from errors import InputError

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE_BLOCKS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "add_embedding.linear_1": "label_emb.0.0",  # of Stable Diffusion XL, as Stability AI's program keeps it
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def compvis_names(unet):
    """{diffusers' module path: CompVis' module path} of every module that holds parameters itself."""
    prefixes = dict(_block_prefixes(unet))
    names = {}
    for path, module in unet.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            names[path] = OUTSIDE_BLOCKS.get(path) or _inside_block(path, prefixes)
    return names


def _block_prefixes(unet):
    """(diffusers' path, CompVis' path) of every resnet, attention and resampling layer of a U-Net."""
    place = 1  # input_blocks.0 is the first convolution
    for i, block in enumerate(unet.down_blocks):
        for j, _ in enumerate(block.resnets):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{place}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{place}.1"
            place += 1
        if block.downsamplers:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{place}.0.op"
            place += 1
    if unet.mid_block is not None:  # some distilled U-Nets have none
        yield from (
            ("mid_block.resnets.0", "middle_block.0"),
            ("mid_block.attentions.0", "middle_block.1"),
            ("mid_block.resnets.1", "middle_block.2"),
        )
    place = 0
    for i, block in enumerate(unet.up_blocks):
        has_attention = bool(getattr(block, "attentions", None))
        for j, _ in enumerate(block.resnets):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{place}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{place}.1"
            place += 1
        if block.upsamplers:
            yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{place - 1}.{1 + has_attention}.conv"


def _inside_block(path, prefixes):
    prefix = next((prefix for prefix in prefixes if path == prefix or path.startswith(f"{prefix}.")), None)
    if prefix is None:
        raise InputError(f"{path}: CompVis' U-Nets have no such layer, so it has no name in configurations of this family")
    inside = path[len(prefix) + 1 :]
    if ".resnets." in prefix:
        inside = RESNET[inside]
    return prefixes[prefix] + (f".{inside}" if inside else "")
