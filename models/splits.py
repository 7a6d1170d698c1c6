"""Where weights that read a concatenated skip are split: the channels of the hidden state, which come first."""


def half(_denoiser, _path, layer):
    """Hidden state and skip are of one width."""
    return layer.weight.shape[1] // 2


def hidden_channels(denoiser, path, _layer):
    """Channels of the hidden state that reaches a U-Net's up-block resnet, before a skip is concatenated."""
    below = denoiser.down_blocks[-1] if denoiser.mid_block is None else denoiser.mid_block
    resnets = [below.resnets[-1], *(resnet for block in denoiser.up_blocks for resnet in block.resnets)]
    before = resnets.index(denoiser.get_submodule(path.rpartition(".")[0])) - 1
    return resnets[before].conv1.weight.shape[0]
