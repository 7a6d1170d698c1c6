"""One component of a pipeline at a time: its class, its weights, and that they are all there and nothing else is."""

import contextlib
import errno
import re

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open

from errors import RUST_PANIC, InputError, first_line, lacks_memory
from quant.files import load_checkpoint

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
DENOISERS = ("transformer", "unet", "prior")
ADAPTER = re.compile(r"\b(lora_(A|B|up|down|unet|te\d?)|base_layer|hada_w\d|lokr_w\d)\b|lora_unet_|lora_te")
# Parts of text encoders that no pipeline reads, and tables of numbers that old versions kept with the weights.
UNREAD = re.compile(r"(^|\.)(pooler\.|position_ids$)")
QUANTIZED_HERE = "qua2sedimo"  # what the configuration of a denoiser says that this program has packed (quant/pretrained.py)
LOW_BIT = {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "I8", "U8"}
LOW_BIT_DTYPES = {torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}


def load_component(repository, name, dtype, variants=()):
    """The component `name` of a repository's pipeline in `dtype`, on the CPU, in evaluation mode.

    What its library keeps in float32 stays so. InputError names the component and the first key if the file lacks a
    weight or has others.
    """
    library = repository.index[name][0]
    require(repository, f"{name}/config.json")  # without it transformers would take a configuration of its own
    check_plain(repository, name)
    loaded_class = component_class(repository, name)
    files = repository.weights(name, library, variants)
    repository.fetch(files.names)
    where = f"{repository.folder / files.names[0]}"
    with explained(repository.model_id, name):
        if not is_packed(repository, name):
            check_float(repository.folder, files, name)
        module, report = loaded_class.from_pretrained(
            repository.folder / name,
            dtype=dtype,
            variant=files.variant,
            use_safetensors=files.safetensors,
            local_files_only=True,
            output_loading_info=True,
            **MISMATCHES_REPORTED.get(library, {}),
        )
    check_keys(f"{where} ({name})", module, report)
    return module.eval().requires_grad_(False)


# transformers would make up at random what does not fit; so it reports it, and check_keys refuses.
MISMATCHES_REPORTED = {"transformers": {"ignore_mismatched_sizes": True}}


def require(repository, *names):
    """InputError that names the first of the small files that is not there."""
    for name in names:
        if name not in repository.names:
            raise InputError(repository.missing(name))


def component_class(repository, name):
    """The class of a pipeline's component; InputError if the installed libraries have no such class."""
    library, class_name = repository.index[name]
    module = {"diffusers": diffusers, "transformers": transformers}.get(library)
    if module is None:
        raise InputError(
            f"{repository.model_id}: its {name} needs code of its own ({library}.{class_name}), which is not run"
        )
    found = getattr(module, str(class_name), None)
    if found is None:
        version = f"{library} {module.__version__}"
        raise InputError(f"{repository.model_id}: its {name} is a {class_name}, which {version} does not have")
    return found


def quantized_by(repository, name):
    """Who has quantized a component, as its configuration says; None if no one, and "" if it does not say."""
    settings = repository.config(name).get("quantization_config")
    if not settings:
        return None
    return str(settings.get("quant_method") or settings.get("quant_algo") or "") if isinstance(settings, dict) else ""


def is_packed(repository, name):
    """Whether a component was packed by this program."""
    return quantized_by(repository, name) == QUANTIZED_HERE


def check_plain(repository, name):
    """InputError if a component's configuration says that another program has quantized it."""
    if not is_packed(repository, name):
        refuse_quantized(repository, name)


def refuse_quantized(repository, name):
    """InputError if a component's configuration says that it is quantized, by this program or another."""
    how = quantized_by(repository, name)
    if how is None:
        return
    who = "this program" if how == QUANTIZED_HERE else how
    raise InputError(
        f"{repository.model_id}: its {name} is already quantized{f' by {who}' if who else ''}; give the model that "
        "it was made from, in half precision or float32"
    )


def check_float(folder, files, name):
    """InputError if the weights are of no floating-point type that quantizers are fitted to."""
    for file in files.names:
        try:
            kinds = dtypes_of(folder / file) if files.safetensors else pickled_dtypes_of(folder / file)
        except (OSError, SafetensorError) as reason:
            raise InputError(
                f"{folder / file} ({name}): damaged, not a whole .safetensors file ({first_line(reason)}); fetch it again"
            ) from None
        if key := next((key for key, kind in kinds.items() if kind in LOW_BIT), None):
            raise InputError(
                f"{folder / file} ({name}): {key} is kept in {kinds[key]}; these weights are already quantized: give the "
                "model that they were made from"
            )


def dtypes_of(path):
    """{key: name of its type} of a safetensors file."""
    with safe_open(path, framework="pt") as weights:
        return {key: weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118 (no dict)


def pickled_dtypes_of(path):
    """{key: name of its type} of the matrices and kernels in a pickled file of weights."""
    content = load_checkpoint(path, lazily=True)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no weights by name; fetch it again")
    return {
        key: LOW_BIT_DTYPES.get(tensor.dtype, "")
        for key, tensor in content.items()
        if torch.is_tensor(tensor) and tensor.ndim > 1
    }


def check_keys(where, module, report):
    """InputError, naming the first key, unless the file's keys are the module's, no more and no fewer, of its shapes."""
    missing = _that_matter(report["missing_keys"])
    unexpected = _that_matter(report["unexpected_keys"])
    if adapter := next(filter(ADAPTER.search, unexpected), None):
        raise InputError(adapter_message(where, adapter))
    if report["mismatched_keys"]:
        key, *shapes = sorted(report["mismatched_keys"], key=str)[0]
        shapes = " and not ".join(str(list(shape)) for shape in shapes)
        raise InputError(f"{where}: {key} has the shape {shapes} of its configuration")
    left = [key for key, weight in module.state_dict().items() if weight.is_meta]
    if missing := sorted({*missing, *_that_matter(left)}):
        raise InputError(f"{where}: lacks {_count(missing)}, first {missing[0]}; fetch or convert it again")
    if unexpected:
        raise InputError(
            f"{where}: has {_count(unexpected)} that a {type(module).__name__} has no place for, first "
            f"{unexpected[0]}; is it of another model?"
        )


def adapter_message(where, key):
    return (
        f"{where}: holds an adapter's weights (LoRA or the like: {key}), not a model's alone; give the base model by "
        "--model_id and the adapter by --lora, or merge and save it first (fuse_lora, unload_lora_weights)"
    )


def _that_matter(keys):
    return sorted(key for key in keys if not UNREAD.search(key))


def _count(keys):
    return f"{len(keys):,} weight" + "s" * (len(keys) != 1)


@contextlib.contextmanager
def explained(model_id, what):
    """Loading in quiet; what a library raises is said in one line, with its own reason."""
    with quiet_loading(), one_line(model_id, what):
        yield


@contextlib.contextmanager
def one_line(model_id, what):
    """Whatever a library raises that does not expect what it reads of a model is said in one line, with its own reason.

    The default precision is put back, which diffusers leaves at the model's where it fails.
    """
    dtype = torch.get_default_dtype()
    try:
        yield
    except InputError:
        raise
    except BaseException as reason:
        torch.set_default_dtype(dtype)
        if lacks_memory(reason) or not (isinstance(reason, Exception) or type(reason).__name__ == RUST_PANIC):
            raise
        raise InputError(why_not_loaded(model_id, what, reason)) from reason


def why_not_loaded(model_id, what, reason):
    """One line that tells why a part of a model cannot be loaded."""
    if isinstance(reason, ImportError):
        return f"{model_id}: its {what} needs a package that is not installed: {_package_of(reason)}"
    if isinstance(reason, OSError) and reason.errno == errno.ENOSPC:
        return f"{model_id}: the disk is full ({first_line(reason)})"
    return f"{model_id}: its {what} cannot be read ({first_line(reason)})"


def _package_of(reason):
    """What an ImportError asks for: libraries' messages are long, and name it somewhere in them."""
    text = " ".join(str(reason).split())
    if named := re.search(r"pip install ([\w\-\[\]>=.]+)", text):
        return f"pip install {named[1]}"
    return f"pip install {reason.name}" if reason.name else text[:200]


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
