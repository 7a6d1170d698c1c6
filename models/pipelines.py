"""From a family to its diffusers pipeline: from the Hub, a local folder, a single file or the embedded model.

Text encoders are loaded, asked and released before what draws is loaded: on a device that holds either, both need not fit.
"""

import functools
import gc
import inspect
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch

from errors import InputError, first_line
from models import facts, lora, schedulers
from models.components import TEXT_ENCODERS, component_class, explained, one_line, quiet_loading, refuse_quantized
from models.inputs import map_tensors, prompt_argument
from models.listening import first_call, latents_taken, until_latents
from models.repository import Repository
from models.tokenizers import check_small_files, check_tokenizers

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
ANY_PROMPT = "a picture"  # where only shapes matter
SHORTEST = 2  # steps that every pipeline samples with
OFFLOADS = ("none", "model", "sequential")
# What pipelines may have and these do not need: labels and images are of the denoiser alone, on every machine.
LEFT_OUT = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
SWITCHED_OFF = {"requires_safety_checker": False, "add_watermarker": False}


def is_embedded(family, model_id):
    """Whether `model_id` is the word `embedded` or the embedded pipeline's own folder."""
    return model_id == EMBEDDED or Path(model_id).resolve() == (EMBEDDED_FOLDER / family.name).resolve()


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


def compute_dtype(family, device, wanted=None):
    """What a device computes in: what is `wanted`; else the family's precision, on the CPU float32."""
    return wanted or (torch.float32 if device.type == "cpu" else family.dtype)


def has_bfloat16_units():
    """Whether this machine's CPU multiplies bfloat16 faster than float32."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


@dataclass(frozen=True)
class Extras:
    """How a model departs from its family's published use."""

    refiner_id: str | None = None  # folder, file or Hub id of the refiner; None leaves it out
    loras: tuple[lora.Lora, ...] = ()  # fused into its weights
    scheduler: str | None = None  # class in diffusers
    negative_prompt: str | None = None
    vae_tiling: bool = False
    offload: str = "none"  # one of OFFLOADS
    compute_dtype: torch.dtype | None = None  # what is computed in; None: what `compute_dtype` says


PLAIN = Extras()


class Sampler:
    """A family's pipeline and, where it has one, the refiner that finishes its images."""

    def __init__(self, family, pipeline, refiner=None, extras=PLAIN):
        self.family, self.pipeline, self.refiner, self.extras = family, pipeline, refiner, extras

    @property
    def pipelines(self):
        return [self.pipeline] if self.refiner is None else [self.pipeline, self.refiner]

    @property
    def denoiser(self):
        return getattr(self.pipeline, self.family.denoiser)

    @property
    def takes_resolution(self):
        return "height" in inspect.signature(self.pipeline.__call__).parameters

    def arguments(self, prompts, resolution):
        """Arguments of the pipeline's call for prompts, or class numbers; resolution is pixels per side or "HxW"."""
        call = {prompt_argument(self.pipeline): prompts} | dict(self.family.call) | self._negative(self.pipeline, prompts)
        if self.takes_resolution and resolution is not None:
            height, width = height_width(resolution)
            call |= {"height": height, "width": width}
        return call

    def _negative(self, pipeline, prompts):
        """The negative prompt, once for each prompt as pipelines want it."""
        negative = self.extras.negative_prompt
        takes_it = "negative_prompt" in inspect.signature(pipeline.__call__).parameters
        return {"negative_prompt": [negative] * len(prompts)} if negative is not None and takes_it else {}

    def draw(self, prompts, generators, steps, guidance, resolution):
        """Images (float [N, H, W, 3] in 0..1) of the prompts, or class numbers, a generator for each; their latents.

        Latents are float32 [N, C, h, w] on the CPU, at the scale that the denoiser sees.
        """
        vae = self.pipeline.vae
        with latents_taken(vae) as taken:
            images = self.images(prompts, generators, steps, guidance, resolution)
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
        sampling |= {"denoising_start": hand_over} | self._negative(self.refiner, prompts)
        return self.refiner(prompt=prompts, image=latents, output_type="np", **sampling).images

    def encode(self, prompt, guidance, resolution):
        """Take the pipelines through the encoding of one prompt as `images` would, and no further."""
        call = self.arguments([prompt], resolution) | {"num_inference_steps": SHORTEST, "guidance_scale": guidance}
        until_latents(self.pipeline, **call)
        if self.refiner is not None:
            latents = torch.zeros(1, self.refiner.unet.config.in_channels, 8, 8)
            again = {"prompt": [prompt], "guidance_scale": guidance, "num_inference_steps": SHORTEST, "strength": 1.0}
            until_latents(self.refiner, image=latents, **again, **self._negative(self.refiner, [prompt]))

    def denoiser_inputs(self, resolution):
        """What the denoiser is called with for one image without guidance, on the meta device: for shapes alone."""
        prompts = [0] if self.family.num_classes else [ANY_PROMPT]
        call = self.arguments(prompts, resolution) | {"num_inference_steps": SHORTEST, "guidance_scale": 1.0}
        return map_tensors(_shape_alone, first_call(self.pipeline, self.denoiser, **call))

    def place(self, device):
        """Put the pipelines on the device, or see to it that their parts come there when they are called.

        What is not packed is cast to what is computed in.
        """
        if (dtype := compute_dtype(self.family, device, self.extras.compute_dtype)) != self.family.dtype:
            for pipeline in self.pipelines:
                _cast(pipeline, dtype)
        _place(self.pipelines, device, self.extras.offload)

    def gather(self):
        """Take all weights back to the host, where they can be changed; `place` undoes it."""
        if self.extras.offload != "none":
            for pipeline in self.pipelines:
                pipeline.remove_all_hooks()
                pipeline.to("cpu")


def _cast(pipeline, dtype):
    """Cast all models of a pipeline but what diffusers keeps in float32.

    diffusers' own `to` refuses packed ones, whose codes and tables stay as they are.
    """
    for part in pipeline.components.values():
        if isinstance(part, diffusers.ModelMixin) and dtype != torch.float32 and part._keep_in_fp32_modules:
            kept = set(part._keep_in_fp32_modules)
            for path, module in part.named_modules():
                if kept.isdisjoint(path.split(".")):
                    module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, recurse=False)
        elif isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype=dtype)


def _place(pipelines, device, offload):
    """As `Sampler.place`. A model that two pipelines share is hooked once: hooks on hooked weights fail."""
    placed = set()
    for pipeline in pipelines:
        shared = {name: part for name, part in pipeline.components.items() if id(part) in placed}
        placed |= {id(part) for part in pipeline.components.values() if isinstance(part, torch.nn.Module)}
        for name in shared:
            object.__setattr__(pipeline, name, None)
        if offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        else:
            pipeline.to(device)
        for name, part in shared.items():
            object.__setattr__(pipeline, name, part)


def height_width(resolution):
    """(height, width) of pixels per side or "HxW"."""
    height, _, width = str(resolution).partition("x")
    return int(height), int(width or height)


def _in_one_line(load):
    """A loader of (family, model_id, ...) that says in one line what a library does not expect of the model's files."""

    @functools.wraps(load)
    def told(family, model_id, *others, **named):
        with one_line(model_id, "pipeline"):
            return load(family, model_id, *others, **named)

    return told


@_in_one_line
def load_sampler(family, model_id, device, extras=PLAIN, text_encoders=True, place=True):
    """The family's pipeline on `device`, weights in the family's precision, its sampler set.

    Without `text_encoders` it can draw prompts that are encoded already (models/prompt_memo.py); without `place` it stays on
    the host until `Sampler.place`. On the CPU the same weights are computed with in float32.
    """
    wanted = None if text_encoders else ()
    source = model_of(family, model_id)
    embedded = is_embedded(family, model_id)
    pipeline = _load_pipeline(family, source, family.pipeline, extras, wanted, embedded=embedded)
    if not embedded and hasattr(pipeline.vae, "use_slicing"):
        pipeline.vae.enable_slicing()  # decoding a batch of large images at once takes more memory than all weights
    refiner = None
    if extras.refiner_id is not None:
        shared = {"vae": pipeline.vae} | ({"text_encoder_2": pipeline.text_encoder_2} if text_encoders else {})
        refiner = _load_refiner(family, extras, wanted, embedded, shared)
    return _ready(Sampler(family, pipeline, refiner, extras), device, place)


@_in_one_line
def load_encoder(family, model_id, device, extras=PLAIN):
    """The family's pipelines with their text encoders alone: a Sampler that can `encode` and nothing else."""
    source, embedded = model_of(family, model_id), is_embedded(family, model_id)
    dtype = compute_dtype(family, device, extras.compute_dtype)
    pipeline = _load_pipeline(family, source, family.pipeline, extras, TEXT_ENCODERS, embedded=embedded, dtype=dtype)
    refiner = None
    if extras.refiner_id is not None:
        shared = {"text_encoder_2": pipeline.text_encoder_2}
        refiner = _load_refiner(family, extras, TEXT_ENCODERS, embedded, shared, dtype)
    sampler = _ready(Sampler(family, pipeline, refiner, extras), device, place=False)
    _place_encoders(sampler, device)
    return sampler


def _place_encoders(sampler, device):
    """On the device as `Sampler.place` has it; layer by layer where they do not fit."""
    try:
        sampler.place(device)
    except torch.OutOfMemoryError:
        if sampler.extras.offload == "sequential":
            raise
        for pipeline in sampler.pipelines:
            pipeline.remove_all_hooks()
            pipeline.to("cpu")
        gc.collect()  # a model and its layers refer to one another
        torch.cuda.empty_cache()
        _place(sampler.pipelines, device, "sequential")


def _ready(sampler, device, place):
    for pipeline in sampler.pipelines:
        pipeline.set_progress_bar_config(disable=True)
        if sampler.extras.vae_tiling and pipeline.vae is not None:
            pipeline.vae.enable_tiling()
    if place:
        with quiet_loading():
            sampler.place(device)
    return sampler


def _load_refiner(family, extras, wanted, embedded, shared, dtype=None):
    source = facts.open_model(family, extras.refiner_id, family.refiner.pipeline)
    plain = Extras(scheduler=extras.scheduler)
    return _load_pipeline(family, source, family.refiner.pipeline, plain, wanted, shared, embedded, dtype)


def _load_pipeline(family, source, class_name, extras, wanted=None, shared=None, embedded=False, dtype=None):
    """The pipeline of a source, its models on the host in the family's precision; some are `shared` with another.

    `wanted` is None for all models, () for all but text encoders, or the names of those that are loaded; a description of
    `dtype` stands in for the others that a pipeline reads settings of.
    """
    modules, configurations = dict(shared or {}), _configurations(source, family)
    names = [name for name in configurations if name not in modules]
    if wanted == ():
        modules |= {name: None for name in names if name in TEXT_ENCODERS}
    elif wanted is not None:
        modules |= {name: None for name in names if name not in wanted}
    variants = (family.variant,) if family.variant and family.dtype == torch.float16 else ()
    loaded = {name: source.load_component(name, family.dtype, variants) for name in names if name not in modules}
    lora.fuse(extras.loras, loaded, class_name, configurations)
    pipeline = _assemble(source, class_name, modules | loaded)
    pipeline.scheduler = schedulers.settled(pipeline.scheduler, family, embedded, extras.scheduler)
    for name in names:
        if wanted and name not in wanted and name not in TEXT_ENCODERS:
            object.__setattr__(pipeline, name, _description(source, name, dtype))
    return pipeline


def _configurations(source, family):
    """{name: configuration} of the models of a pipeline: its denoiser, autoencoder and text encoders."""
    names = (family.denoiser, "vae", *TEXT_ENCODERS)
    index = source.index
    return {name: source.config(name) for name in names if isinstance(index.get(name), list) and index[name][0]}


def _assemble(source, class_name, modules):
    """The pipeline with these models, and its own tokenizers and sampler."""
    pipeline_class = getattr(diffusers, class_name)
    known = inspect.signature(pipeline_class.__init__).parameters
    switches = {name: value for name, value in (LEFT_OUT | SWITCHED_OFF).items() if name in known}
    if isinstance(source, Repository):
        check_small_files(source, modules)
    else:
        modules = modules | source.tokenizers()
    with explained(source.model_id, "pipeline"):
        pipeline = pipeline_class.from_pretrained(str(source.folder), **modules, **switches)
    check_tokenizers(source, pipeline)
    return pipeline


def _description(source, name, dtype):
    """What a pipeline may ask of a model that is not loaded: its settings and precision."""
    settings = inspect.signature(component_class(source, name).__init__).parameters
    known = {key: each.default for key, each in settings.items() if each.default is not inspect.Parameter.empty}
    return SimpleNamespace(config=SimpleNamespace(**known | source.config(name)), dtype=dtype)


@_in_one_line
def load_denoiser(family, model_id, device, loras=()):
    """The family's float denoiser alone, without text encoders and autoencoder, in the family's precision."""
    source = model_of(family, model_id)
    refuse_quantized(source, family.denoiser)
    variants = (family.variant,) if family.variant and family.dtype == torch.float16 else ()
    denoiser = source.load_component(family.denoiser, family.dtype, variants)
    lora.fuse(loras, {family.denoiser: denoiser}, family.pipeline, _configurations(source, family))
    with quiet_loading():
        return denoiser.to(device)


def model_of(family, model_id):
    """The Repository or SingleFile that `model_id` stands for."""
    return facts.open_model(family, folder_of(family, model_id))


def folder_of(family, model_id):
    """The folder, file or Hub id that `model_id` stands for."""
    return str(EMBEDDED_FOLDER / family.name) if is_embedded(family, model_id) else str(model_id)


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
