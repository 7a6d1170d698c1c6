"""From a family to its diffusers pipeline: from the Hub, a local folder, a single file or the embedded model."""

import contextlib
import inspect
from pathlib import Path

import diffusers
import torch
import transformers
from transformers import CLIPTokenizer

from errors import InputError, first_line
from models.inputs import first_call, map_tensors

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
SINGLE_FILES = (".ckpt", ".safetensors")
SD1_FOLDER = Path(__file__).parent / "ldm" / "stable-diffusion-v1"
SD1_CONFIG = SD1_FOLDER / "v1-5-pruned-emaonly"  # of a single file that has no folder of its own name beside it
SD1_TOKENIZER = "openai/clip-vit-large-patch14"
NOT_LOADED = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError)


def is_embedded(family, model_id):
    """Whether `model_id` is the word `embedded` or the embedded pipeline's own folder."""
    return model_id == EMBEDDED or Path(model_id).resolve() == (EMBEDDED_FOLDER / family.name).resolve()


def is_single_file(model_id):
    return Path(model_id).suffix in SINGLE_FILES


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


class Sampler:
    """A family's pipeline and, where it has one, the refiner that finishes its images."""

    def __init__(self, family, pipeline, refiner=None):
        self.family, self.pipeline, self.refiner = family, pipeline, refiner

    @property
    def denoiser(self):
        return getattr(self.pipeline, self.family.denoiser)

    @property
    def native_resolution(self):
        """Pixels per side that the denoiser is made for."""
        latent_pixels = 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)
        return self.denoiser.config.sample_size * latent_pixels

    @property
    def takes_resolution(self):
        return "height" in inspect.signature(self.pipeline.__call__).parameters

    def arguments(self, prompts, resolution):
        """Arguments of the pipeline's call for prompts, or class numbers, at a resolution in pixels."""
        call = {"class_labels" if self.family.num_classes else "prompt": prompts} | dict(self.family.call)
        return call | ({"height": resolution, "width": resolution} if self.takes_resolution else {})

    def images(self, prompts, generators, steps, guidance, resolution):
        """Images (float [N, H, W, 3] in 0..1) of the prompts, or class numbers, a generator for each."""
        sampling = {"generator": generators, "num_inference_steps": steps, "guidance_scale": guidance}
        call = self.arguments(prompts, resolution) | sampling
        if self.refiner is None:
            return self.pipeline(**call, output_type="np").images
        hand_over = self.family.refiner.hand_over
        latents = self.pipeline(**call, denoising_end=hand_over, output_type="latent").images
        refined = self.refiner(prompt=prompts, image=latents, denoising_start=hand_over, output_type="np", **sampling)
        return refined.images

    def denoiser_inputs(self, resolution):
        """What the denoiser is called with for one image without guidance, on the meta device: for shapes alone."""
        prompts = [0] if self.family.num_classes else ["a picture"]
        call = self.arguments(prompts, resolution) | {"num_inference_steps": 1, "guidance_scale": 1.0}
        return map_tensors(lambda tensor: tensor.to("meta"), first_call(self.pipeline, self.denoiser, **call))


def load_sampler(family, model_id, device, refiner_id=None):
    """The family's pipeline on `device`, weights in the family's precision, its sampler set.

    `refiner_id` is a folder or Hub id of the refiner; None leaves it out. On the CPU the same weights
    are computed with in float32, which is faster there.
    """
    pipeline = _load(family, family.pipeline, model_id)
    if family.scheduler:
        pipeline.scheduler = getattr(diffusers, family.scheduler).from_config(pipeline.scheduler.config)
    refiner = None
    if refiner_id is not None:
        shared = {"vae": pipeline.vae, "text_encoder_2": pipeline.text_encoder_2}
        refiner = _load(family, family.refiner.pipeline, refiner_id, **shared)
    for each in filter(None, (pipeline, refiner)):
        each.set_progress_bar_config(disable=True)
        with _quiet():
            each.to(device, compute_dtype(family, device))
    return Sampler(family, pipeline, refiner)


def load_denoiser(family, model_id, device):
    """The family's denoiser alone, without text encoders and autoencoder, as `load_sampler` would load it."""
    if is_single_file(model_id):
        denoiser = getattr(_load(family, family.pipeline, model_id), family.denoiser)
    else:
        with _explained(family, family.pipeline, model_id):
            folder = folder_of(family, model_id)
            _check_class(family, model_id, diffusers.DiffusionPipeline.load_config(folder)["_class_name"])
            denoiser = diffusers.AutoModel.from_pretrained(
                folder, subfolder=family.denoiser, dtype=family.dtype, **_variant(family, folder)
            )
    return denoiser.to(device, compute_dtype(family, device))


def compute_dtype(family, device):
    return torch.float32 if device.type == "cpu" else family.dtype


def folder_of(family, model_id):
    """The folder or Hub id that `model_id` stands for."""
    return str(EMBEDDED_FOLDER / family.name) if is_embedded(family, model_id) else model_id


def refiner_of(family, model_id):
    """Folder or Hub id of the refiner that goes with a model; None if the family has none."""
    if family.refiner is None:
        return None
    return str(EMBEDDED_FOLDER / family.refiner.name) if is_embedded(family, model_id) else family.refiner.model_id


def meta_denoiser(denoiser):
    """A copy of the denoiser without weights, on the meta device: for shapes alone."""
    with torch.device("meta"):
        return type(denoiser).from_config(denoiser.config)


def _load(family, class_name, model_id, **parts):
    pipeline_class = getattr(diffusers, class_name)
    with _explained(family, class_name, model_id):
        if is_single_file(model_id):
            return _load_single_file(family, pipeline_class, Path(model_id))
        folder = folder_of(family, model_id)
        pipeline = pipeline_class.from_pretrained(folder, dtype=family.dtype, **parts, **_variant(family, folder))
    _check_class(family, model_id, type(pipeline).__name__, class_name)
    return pipeline


def _load_single_file(family, pipeline_class, path):
    """A CompVis checkpoint, its configuration from a folder beside it or in the project, never from the Hub."""
    if not path.is_file():
        raise InputError(
            f"{path}: no such checkpoint; download {path.name} of {family.title} and put it there, or name another "
            "file, folder or Hub id with --model_id; `--model_id embedded` works offline"
        )
    config = path.with_suffix("")
    config = config if config.is_dir() else SD1_CONFIG
    return pipeline_class.from_single_file(
        str(path),
        config=str(config),
        tokenizer=_clip_tokenizer(config),
        safety_checker=None,
        feature_extractor=None,
        local_files_only=True,
        torch_dtype=family.dtype,
    )


def _clip_tokenizer(config):
    """The tokenizer in the configuration's folder, else CLIP's from the Hub or its cache."""
    if (config / "tokenizer").is_dir():
        return CLIPTokenizer.from_pretrained(config / "tokenizer")
    try:
        return CLIPTokenizer.from_pretrained(SD1_TOKENIZER)
    except NOT_LOADED:
        raise InputError(
            f"the checkpoint holds no vocabulary, and {SD1_TOKENIZER} cannot be fetched from the Hub; "
            f"put that model's vocab.json and merges.txt in {config / 'tokenizer'}"
        ) from None


def _variant(family, folder):
    """The family's file variant on the Hub; a local folder has its own files."""
    return {"variant": family.variant} if family.variant and not Path(folder).is_dir() else {}


def _check_class(family, model_id, found, wanted=None):
    wanted = wanted or family.pipeline
    if found != wanted:
        raise InputError(f"{model_id}: holds a {found}, {family.title} needs a {wanted}")


@contextlib.contextmanager
def _explained(family, class_name, model_id):
    """Loading in quiet; what fails is said in one line."""
    try:
        with _quiet():
            yield
    except NOT_LOADED as reason:
        raise InputError(_why_not_loaded(family, class_name, model_id, reason)) from None


@contextlib.contextmanager
def _quiet():
    """Loading without the libraries' own bars and notes; errors still raise."""
    libraries = (diffusers.logging, transformers.logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def _why_not_loaded(family, class_name, model_id, reason):
    if is_single_file(model_id):
        return f"{model_id}: this file is not a checkpoint of {family.title} ({first_line(reason)})"
    if Path(model_id).is_dir():
        return f"{model_id}: this folder is not a {class_name} in diffusers format ({first_line(reason)})"
    return (
        f"{family.title}: {model_id!r} is no local folder, not in the Hub's cache, and cannot be fetched from the Hub; "
        "give a folder or Hub id with --model_id; `--model_id embedded` works offline"
    )
