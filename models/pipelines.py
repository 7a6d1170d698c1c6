"""From a family to its diffusers pipeline: from the Hub, a local folder, a single file or the embedded model."""

import contextlib
import inspect
import pickle
import zipfile
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub import snapshot_download
from transformers import CLIPTextConfig, CLIPTokenizer

from errors import InputError, first_line
from models.inputs import first_call, map_tensors, prompt_argument

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
SINGLE_FILES = (".ckpt", ".safetensors")
SD1_FOLDER = Path(__file__).parent / "ldm" / "stable-diffusion-v1"
SD1_CONFIG = SD1_FOLDER / "v1-5-pruned-emaonly"  # of a single file that has no folder of its own name beside it
SD1_TOKENIZER = "openai/clip-vit-large-patch14"
INDEX = "model_index.json"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
ANY_PROMPT = "a picture"  # where only shapes matter
SHORTEST = 2  # steps that every pipeline samples with
NOT_LOADED = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError),
    *(pickle.UnpicklingError, SingleFileComponentError),
)


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
    def pipelines(self):
        return [self.pipeline] if self.refiner is None else [self.pipeline, self.refiner]

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
        call = {prompt_argument(self.pipeline): prompts} | dict(self.family.call)
        return call | ({"height": resolution, "width": resolution} if self.takes_resolution else {})

    def draw(self, prompts, generators, steps, guidance, resolution):
        """Images (float [N, H, W, 3] in 0..1) of the prompts, or class numbers, a generator for each; their latents.

        Latents are float32 [N, C, h, w] on the CPU, at the scale that the denoiser sees.
        """
        vae, taken = self.pipeline.vae, []
        decode = vae.decode

        def taking(latents, *args, **kwargs):
            taken.append(latents)
            return decode(latents, *args, **kwargs)

        vae.decode = taking
        try:
            images = self.images(prompts, generators, steps, guidance, resolution)
        finally:
            vae.decode = decode
        (latents,) = taken
        return images, latents.float().cpu() * vae.config.scaling_factor

    def images(self, prompts, generators, steps, guidance, resolution):
        """The images of `draw` alone."""
        sampling = {"generator": generators, "num_inference_steps": steps, "guidance_scale": guidance}
        call = self.arguments(prompts, resolution) | sampling
        if self.refiner is None:
            return self.pipeline(**call, output_type="np").images
        hand_over = self.family.refiner.hand_over
        latents = self.pipeline(**call, denoising_end=hand_over, output_type="latent").images
        refined = self.refiner(prompt=prompts, image=latents, denoising_start=hand_over, output_type="np", **sampling)
        return refined.images

    def encode(self, prompt, guidance, resolution):
        """Take the pipelines through the encoding of one prompt as `images` would, and no further."""
        call = self.arguments([prompt], resolution) | {"num_inference_steps": SHORTEST, "guidance_scale": guidance}
        first_call(self.pipeline, self.denoiser, **call)
        if self.refiner is not None:
            unet = self.refiner.unet
            latents = torch.zeros(1, unet.config.in_channels, 8, 8, device=unet.device, dtype=unet.dtype)
            again = {"prompt": [prompt], "guidance_scale": guidance, "num_inference_steps": SHORTEST, "strength": 1.0}
            first_call(self.refiner, unet, image=latents, **again)

    def denoiser_inputs(self, resolution):
        """What the denoiser is called with for one image without guidance, on the meta device: for shapes alone."""
        prompts = [0] if self.family.num_classes else [ANY_PROMPT]
        call = self.arguments(prompts, resolution) | {"num_inference_steps": 1, "guidance_scale": 1.0}
        return map_tensors(_shape_alone, first_call(self.pipeline, self.denoiser, **call))


def load_sampler(family, model_id, device, refiner_id=None, text_encoders=True):
    """The family's pipeline on `device`, weights in the family's precision, its sampler set.

    `refiner_id` is a folder or Hub id of the refiner; None leaves it out. Without `text_encoders` it can draw
    prompts that are encoded already (models/prompt_memo.py). On the CPU the same weights are computed with in
    float32, which is faster there.
    """
    pipeline = _load(family, family.pipeline, model_id, text_encoders)
    if family.scheduler:
        pipeline.scheduler = getattr(diffusers, family.scheduler).from_config(pipeline.scheduler.config)
    refiner = None
    if refiner_id is not None:
        shared = {"vae": pipeline.vae, "text_encoder_2": pipeline.text_encoder_2}
        refiner = _load(family, family.refiner.pipeline, refiner_id, text_encoders, **shared)
    for each in filter(None, (pipeline, refiner)):
        each.set_progress_bar_config(disable=True)
        with quiet_loading():
            each.to(device, compute_dtype(family, device))
    return Sampler(family, pipeline, refiner)


def load_denoiser(family, model_id, device):
    """The family's denoiser alone, without text encoders and autoencoder, in the family's precision."""
    with _explained(family, family.pipeline, model_id):
        if is_single_file(model_id):
            denoiser = _denoiser_of_single_file(family, Path(model_id))
        else:
            folder = folder_of(family, model_id)
            _check_class(family, model_id, _index_of(folder), family.pipeline)
            denoiser = diffusers.AutoModel.from_pretrained(
                folder, subfolder=family.denoiser, dtype=family.dtype, **_variant(family, folder)
            )
    with quiet_loading():
        return denoiser.to(device, family.dtype)


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


def _shape_alone(tensor):
    """The tensor on the meta device, in the precision of `meta_denoiser`."""
    return tensor.to("meta", torch.float32) if tensor.is_floating_point() else tensor.to("meta")


def meta_denoiser(denoiser):
    """A copy of the denoiser in float32 without weights, on the meta device: for shapes alone."""
    with torch.device("meta"):
        return type(denoiser).from_config(denoiser.config)


def _load(family, class_name, model_id, text_encoders=True, **parts):
    pipeline_class = getattr(diffusers, class_name)
    with _explained(family, class_name, model_id):
        if is_single_file(model_id):
            return _load_single_file(family, pipeline_class, Path(model_id))
        folder = folder_of(family, model_id)
        index = _index_of(folder)
        _check_class(family, model_id, index, class_name)
        if not text_encoders:
            parts |= {name: None for name in TEXT_ENCODERS if name in index}
        return pipeline_class.from_pretrained(folder, dtype=family.dtype, **parts, **_variant(family, folder))


def _index_of(folder):
    """The index of the pipeline in a folder or, fetched at once or not at all, of a Hub id."""
    local = folder if Path(folder).is_dir() else snapshot_download(folder, allow_patterns=INDEX)
    return diffusers.DiffusionPipeline.load_config(local)


def _load_single_file(family, pipeline_class, path):
    """The pipeline of a CompVis checkpoint, configured without the Hub."""
    config = _config_beside(family, path)
    parts = {"tokenizer": _clip_tokenizer(config), "safety_checker": None, "feature_extractor": None}
    pipeline = _from_single_file(family, pipeline_class, path, config, **parts)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and any(weight.is_meta for weight in part.parameters()):
            raise ValueError(f"not all weights of its {name} are in it")
    return pipeline


def _denoiser_of_single_file(family, path):
    config = _config_beside(family, path)
    denoiser_class = getattr(diffusers, _index_of(config)[family.denoiser][1])
    return _from_single_file(family, denoiser_class, path, config, subfolder=family.denoiser)


def _from_single_file(family, loaded_class, path, config, **arguments):
    with torch.serialization.safe_globals(_stand_ins(path)):
        return loaded_class.from_single_file(
            str(path), config=str(config), local_files_only=True, dtype=family.dtype, **arguments
        )


def _config_beside(family, path):
    """The folder that configures a checkpoint: of its own name beside it, else the project's."""
    if not path.is_file():
        raise InputError(
            f"{path}: no such checkpoint; download {path.name} of {family.title} and put it there, or name another "
            "file, folder or Hub id with --model_id; `--model_id embedded` works offline"
        )
    beside = path.with_suffix("")
    config = beside if (beside / INDEX).is_file() else SD1_CONFIG
    _check_class(family, config, _index_of(config), family.pipeline)
    return config


class _StandIn:
    """Takes the place of an object that is not read: does nothing with whatever it is given."""

    def __init__(self, *_arguments):
        pass

    def __setstate__(self, _state):
        pass


def _stand_ins(path):
    """(stand-in, name) of everything in a checkpoint that is neither tensor nor plain data.

    The published checkpoint keeps its trainer's callbacks, objects of PyTorch Lightning, beside the weights.
    """
    if not zipfile.is_zipfile(path):
        return []
    return [(_StandIn, name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)]


def _clip_tokenizer(config):
    """The tokenizer in the configuration's folder, else CLIP's from the Hub or its cache.

    Tokens are counted because transformers takes a folder without a vocabulary for an empty one.
    """
    text_encoder = CLIPTextConfig.from_pretrained(config, subfolder="text_encoder")
    folder = config / "tokenizer"
    with contextlib.suppress(*NOT_LOADED):
        found = folder if folder.is_dir() else snapshot_download(SD1_TOKENIZER, allow_patterns=["*.json", "merges.txt"])
        tokenizer = CLIPTokenizer.from_pretrained(found, model_max_length=text_encoder.max_position_embeddings)
        if len(tokenizer) == text_encoder.vocab_size:
            return tokenizer
    raise InputError(
        f"the checkpoint holds no vocabulary, and the {text_encoder.vocab_size} tokens of {SD1_TOKENIZER} are neither "
        f"in {folder} nor fetched from the Hub; put that model's vocab.json and merges.txt there"
    )


def _variant(family, folder):
    """The family's file variant on the Hub; a local folder has its own files."""
    return {"variant": family.variant} if family.variant and not Path(folder).is_dir() else {}


def _check_class(family, model_id, index, wanted):
    if index["_class_name"] != wanted:
        raise InputError(f"{model_id}: holds a {index['_class_name']}, {family.title} needs a {wanted}")


@contextlib.contextmanager
def _explained(family, class_name, model_id):
    """Loading in quiet; what fails is said in one line."""
    try:
        with quiet_loading():
            yield
    except NOT_LOADED as reason:
        raise InputError(_why_not_loaded(family, class_name, model_id, reason)) from None


@contextlib.contextmanager
def quiet_loading():
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
