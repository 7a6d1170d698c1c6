"""Cheap paired proxies of image quality: how far images are from the full-precision ones of the same noise.

They cost next to nothing beside the images, and, both sides starting from the same noise, they tell quantizers
apart on far fewer images than FID.
"""

import numpy as np
import torch

PSNR_CAP = 100.0  # dB, of equal images
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601)
WINDOW_REACH = 5  # pixels on each side of its middle
PER_IMAGE = ("latent_mse", "image_mse", "psnr", "ssim")


def paired(images, latents, originals, original_latents, device):
    """{proxy: float64 [N]} of images (uint8 [N, H, W, 3]) and latents (float32 [N, C, h, w]) beside their originals.

    latent_mse and image_mse are mean squared differences (of values in 0..1 for images), psnr is in dB, ssim the
    structural similarity of the luminance (Wang et al., 2004).
    """
    ours, theirs = (_as_tensor(each, device) for each in (images, originals))
    image_mse = _row_means((ours - theirs) ** 2)
    with np.errstate(divide="ignore"):
        psnr = np.minimum(-10 * np.log10(image_mse), PSNR_CAP)
    return {
        "latent_mse": _row_means((torch.as_tensor(latents) - torch.as_tensor(original_latents)).to(torch.float64) ** 2),
        "image_mse": image_mse,
        "psnr": psnr,
        "ssim": _ssim(ours, theirs),
    }


def _as_tensor(images, device):
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in 0..1."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255


def _row_means(values):
    return values.flatten(1).to(torch.float64).mean(dim=1).cpu().numpy()


def _ssim(ours, theirs):
    """Of the luminance, where the window of 11 x 11 pixels lies inside the image, as in the paper's program."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # imported late: it takes seconds

    weights = torch.tensor(LUMINANCE, device=ours.device).view(1, 3, 1, 1)
    gray = [(each * weights).sum(dim=1, keepdim=True) for each in (ours, theirs)]
    _, places = structural_similarity_index_measure(*gray, data_range=1.0, reduction="none", return_full_image=True)
    return _row_means(places[..., WINDOW_REACH:-WINDOW_REACH, WINDOW_REACH:-WINDOW_REACH])
