"""Any pipeline of diffusers': which of its components denoise, what they are called with, which of its files it needs."""

import contextlib
import inspect
import re
from collections import Counter
from pathlib import Path

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin

from errors import InputError, first_line, lacks_memory
from models.components import component_class, dtypes_of, explained, quiet_loading
from models.inputs import map_tensors, prompt_argument
from models.listening import first_of
from models.repository import INDEX, open_repository

# Models of diffusers' that denoise nothing, by words in their classes' names.
OTHER_MODELS = re.compile(
    "Autoencoder|VAE|Vae|VQModel|ControlNet|Adapter|SafetyChecker|Encoder|Decoder|Projection|TextProj|Vocoder|Connector"
    "|Upsampler|Upscaler|Tokenizer|Detokenizer|Conditioner|Embedder|EnhancerHead"
)
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float32}
WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|onnx|pb|msgpack|gguf|h5|xml)$|\.(safetensors|bin)\.index\b.*\.json$")
LIBRARIES = ("diffusers", "transformers")  # whose layouts of weight files are known
FRAMES = 9  # of a video, where its first is all that is looked at: a number that autoencoders of 4 and of 8 frames take


def open_pipeline(model_id):
    """The Repository of a pipeline in diffusers' format, a folder or Hub id; InputError by the reason for anything else."""
    if Path(model_id).is_file():
        how = "read it by from_single_file of its pipeline's class in diffusers, and save_pretrained it to one"
        raise InputError(f"{model_id}: is a single file, where a pipeline's folder is needed; {how}")
    source = open_repository(model_id)
    if INDEX not in source.names:
        raise InputError(f"{model_id}: has no {INDEX}; give the folder or Hub id of a whole pipeline in diffusers format")
    return source


def pipeline_class(source):
    """The class of the pipeline; InputError if the installed diffusers has none of the name."""
    name = source.index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if found is None:
        raise InputError(f"{source.model_id}: is a {name}, which diffusers {diffusers.__version__} does not have")
    return found


def components(source):
    """{name: library} of the components that the pipeline has."""
    listed = {name: value for name, value in source.index.items() if isinstance(value, list) and len(value) == 2}
    return {name: value[0] for name, value in listed.items() if value[0] is not None}


def denoiser_names(source):
    """The components that denoise: models of diffusers' that are no autoencoder, adapter or the like.

    InputError if there are none.
    """
    names = [name for name, library in components(source).items() if library == "diffusers" and _denoises(source, name)]
    if not names:
        raise InputError(f"{source.model_id}: its {INDEX} names no denoiser (a transformer, unet or prior of diffusers')")
    return names


def _denoises(source, name):
    found = component_class(source, name)
    return issubclass(found, ModelMixin) and not OTHER_MODELS.search(found.__name__)


def own_precision(source, name, variants=()):
    """The floating-point type that most tensors of a component's weight files have."""
    files = source.weights(name, "diffusers", variants)
    source.fetch(files.names)
    if not files.safetensors:
        return torch.float16  # what pickled weights are, would have to be read to know
    with explained(source.model_id, name):
        kinds = Counter(kind for file in files.names for kind in dtypes_of(source.folder / file).values())
    return next((FLOATS[kind] for kind, _ in kinds.most_common() if kind in FLOATS), torch.float16)


def empty_denoiser(source, name):
    """A component without weights, its parameters on the meta device and its buffers where they are computed."""
    with explained(source.model_id, name), init_empty_weights():
        return component_class(source, name).from_config(source.config(name)).eval().requires_grad_(False)


def stand_in(source, name):
    """A component of which every parameter is a single zero, expanded: it takes no memory, and can be asked everything
    that a pipeline asks of its denoiser before it calls it.
    """
    module = empty_denoiser(source, name)
    for each in module.modules():
        for key, parameter in each._parameters.items():
            if parameter is not None:
                zero = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                each._parameters[key] = torch.nn.Parameter(zero, requires_grad=False)
    return module


def load_pipeline(found_class, folder, given, dtype):
    """The pipeline of a folder with the `given` components {name: module}, the others read in `dtype`.

    By its own class: `DiffusionPipeline` does not know which components the class calls optional, and reads those, too.
    """
    with explained(folder, "pipeline"), quiet_loading():
        return found_class.from_pretrained(str(folder), dtype=dtype, **given)


def first_arguments(pipeline, names, call):
    """(name of the denoiser that is called first, its arguments), without running it; InputError tells why it is not."""
    try:
        taken = first_of(pipeline, {name: getattr(pipeline, name) for name in names}, **call)
    except Exception as reason:  # as many types as there are pipelines
        if lacks_memory(reason):
            raise
        what = f"{type(pipeline).__name__}: cannot be called with {asked(call)}"
        raise InputError(f"{what} ({first_line(reason)})") from reason
    if taken is None:
        raise InputError(f"{type(pipeline).__name__}: did not call its {' or '.join(names)}")
    return taken


def asked(call):
    """The names of a call's arguments, in words."""
    return ", ".join(name for name in call if name not in ("generator", "output_type"))


def on_meta(arguments):
    """A call's arguments as shapes alone, floating-point ones in the precision of a denoiser made on the meta device."""
    return map_tensors(lambda t: t.to("meta", torch.float32) if t.is_floating_point() else t.to("meta"), arguments)


def call_arguments(found_class, prompt, steps=None, resolution=None, more=None):
    """Arguments of a pipeline's call that draw a prompt, or class number, as far as its class takes them.

    `resolution` is (height, width) in pixels; `more` {name: value} are taken as they are: InputError names one that the
    pipeline has not.
    """
    known = inspect.signature(found_class.__call__).parameters
    more = more or {}
    for name in more:
        if name not in known:
            raise InputError(f"--call {name}: {found_class.__name__} has no such argument")
    call = {prompt_argument(found_class): [prompt], "num_inference_steps": steps, "num_frames": FRAMES, "output_type": "np"}
    if resolution is not None:
        call |= {"height": resolution[0], "width": resolution[1], "use_resolution_binning": False}
    return {name: value for name, value in call.items() if name in known and value is not None} | more


def takes_words(found_class):
    """Whether what a pipeline draws is told in words; else by class numbers."""
    return prompt_argument(found_class) == "prompt"


def needed_files(source, denoisers, variants=()):
    """{name in the pipeline's folder: name in the repository} of all files that a pipeline needs beside its denoisers'.

    Of several forms of a component's weights one is taken, under its plain name, and nothing of what else lies there.
    """
    names = all_names(source)
    taken = {name: name for name in names if "/" not in name and _belongs_on_top(name)}
    for component, library in components(source).items():
        if component in denoisers:
            continue
        inside = [name for name in names if name.startswith(f"{component}/")]
        taken |= {name: name for name in inside if not WEIGHTS.search(name)}
        taken |= _weight_files(source, component, library, inside, variants)
    return taken


def all_names(source):
    """Names of all files of a repository, in deeper folders too."""
    if source.hub:
        return sorted(source.names)
    return sorted(path.relative_to(source.folder).as_posix() for path in source.folder.rglob("*") if path.is_file())


def _belongs_on_top(name):
    if name.startswith(".") or name.upper() == "README.MD" or WEIGHTS.search(name):
        return False
    return Path(name).suffix.lower() in ("", ".md", ".txt", ".json", ".py", ".yaml", ".pdf")


def _weight_files(source, component, library, inside, variants):
    """{plain name: name} of a component's chosen weight files, and of the index that goes with shards."""
    weights = [name for name in inside if WEIGHTS.search(name)]
    if not weights:
        return {}
    try:
        chosen = source.weights(component, library if library in LIBRARIES else "transformers", variants)
    except InputError:
        return {name: name for name in weights}  # of a layout that is not known: all of them
    taken = {plain_name(name, chosen.variant): name for name in chosen.names}
    if len(chosen.names) > 1:
        ending = "safetensors" if chosen.safetensors else "bin"
        indexes = [name for name in weights if f".{ending}.index" in name or f".{ending}.index.json" in name]
        index = next((name for name in indexes if (chosen.variant or "") in name), None)
        taken |= {plain_name(index, chosen.variant): index} if index else {}
    return taken


def plain_name(name, variant):
    """A weight file's name without its variant, by which it is found unasked."""
    return re.sub(rf"\.{re.escape(variant)}(?=[.-])", "", name) if variant else name


@contextlib.contextmanager
def without_bars(pipeline):
    """The pipeline's own bars of steps show only where a picture takes long."""
    with contextlib.suppress(AttributeError):
        pipeline.set_progress_bar_config(desc="steps", unit="step", leave=False, delay=5)
    yield pipeline
