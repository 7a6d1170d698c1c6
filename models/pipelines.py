"""From a family to its diffusers pipeline: from the Hub, a local folder or the embedded model."""

import contextlib
from pathlib import Path

import diffusers
import torch

from errors import InputError, first_line

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"


def embedded_folder(family):
    return EMBEDDED_FOLDER / family.name


def is_embedded(family, model_id):
    """Whether `model_id` is the word `embedded` or the embedded pipeline's own folder."""
    return model_id == EMBEDDED or Path(model_id).resolve() == embedded_folder(family).resolve()


def defaults(family, model_id):
    """The row of steps, guidance, classes and the like that fits the model: embedded or real."""
    return family.embedded if is_embedded(family, model_id) else family


def pick_device(name=None):
    """The device asked for; else CUDA where there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as reason:
        raise InputError(f"--device {name}: {first_line(reason)}") from None
    return device


def load_pipeline(family, model_id, device):
    """The family's pipeline on `device`, weights in the family's precision, its sampler set.

    On the CPU the same weights are computed with in float32, which is faster there.
    """
    folder = embedded_folder(family) if is_embedded(family, model_id) else model_id
    pipeline_class = getattr(diffusers, family.pipeline)
    try:
        with _quiet():
            pipeline = pipeline_class.from_pretrained(folder, dtype=family.dtype)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as reason:
        raise InputError(_why_not_loaded(family, model_id, reason)) from None
    if not isinstance(pipeline, pipeline_class):
        raise InputError(f"{model_id}: holds a {type(pipeline).__name__}, {family.title} needs a {family.pipeline}")
    if family.scheduler:
        pipeline.scheduler = getattr(diffusers, family.scheduler).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    with _quiet():
        return pipeline.to(device, torch.float32 if device.type == "cpu" else family.dtype)


def denoiser_of(pipeline, family):
    return getattr(pipeline, family.denoiser)


def native_resolution(pipeline, family):
    """Pixels per side that the pipeline's denoiser is made for."""
    latent_pixels = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    return denoiser_of(pipeline, family).config.sample_size * latent_pixels


def meta_denoiser(denoiser):
    """A copy of the denoiser without weights, on the meta device: for shapes alone."""
    with torch.device("meta"):
        return type(denoiser).from_config(denoiser.config)


@contextlib.contextmanager
def _quiet():
    """Loading without diffusers' own bars and notes; errors still raise."""
    level = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers.logging.set_verbosity(level)
        diffusers.logging.enable_progress_bar()


def _why_not_loaded(family, model_id, reason):
    if Path(model_id).is_dir():
        return f"{model_id}: this folder is not a {family.pipeline} in diffusers format ({first_line(reason)})"
    return (
        f"{family.title}: {model_id!r} is no local folder, not in the Hub's cache, and cannot be fetched from the Hub; "
        "give a folder or Hub id with --model_id; `--model_id embedded` works offline"
    )
