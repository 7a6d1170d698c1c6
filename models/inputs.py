"""Example inputs of each family's denoiser, for one image: what shapes are counted with."""

import torch


def denoiser_inputs(denoiser):
    """Keyword arguments of one call for one image, on the denoiser's device."""
    return INPUTS[type(denoiser).__name__](denoiser.config, denoiser.device)


def _dit(config, device):
    size = config.sample_size
    return {
        "hidden_states": torch.zeros(1, config.in_channels, size, size, device=device),
        "timestep": torch.zeros(1, dtype=torch.long, device=device),
        "class_labels": torch.zeros(1, dtype=torch.long, device=device),
    }


INPUTS = {"DiTTransformer2DModel": _dit}
