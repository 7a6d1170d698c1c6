"""What a model's small files tell of it before a weight is read: whether it is of the family, its size, classes, sampler."""

from errors import InputError
from models.repository import INDEX, is_single_file, open_repository

ADAPTER_FILES = ("adapter_config.json", "pytorch_lora_weights.safetensors", "adapter_model.safetensors")
# Settings of U-Nets that ask for inputs, or have weights, which the families' pipelines do not give or expect.
PLAIN_UNET = {
    "in_channels": 4,
    "time_cond_proj_dim": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "dual_cross_attention": False,
    "time_embedding_type": "positional",
}
MEANING = {
    "in_channels": "takes other inputs, such as a mask or an image, beside noise",
    "time_cond_proj_dim": "has a conditional time projection, as latent consistency models have",
}


def open_model(family, model_id, class_name=None):
    """The Repository, or SingleFile, of a model whose pipeline must be a `class_name`, the family's by default.

    InputError, by the reason that is true, for everything else.
    """
    class_name = class_name or family.pipeline
    if is_single_file(model_id):
        from models.single_file import SingleFile  # imported late: diffusers' loader of such files, with all that it loads

        source = SingleFile(family.title, class_name, model_id)
    else:
        source = open_repository(model_id)
        if INDEX not in source.names:
            raise InputError(_no_pipeline(source, class_name))
    found = source.index.get("_class_name")
    if found != class_name:
        raise InputError(f"{model_id}: holds a {found}, {family.title} needs a {class_name}")
    check_denoiser(family, source)
    return source


def _no_pipeline(source, class_name):
    adapter = next((name for name in ADAPTER_FILES if name in source.names), None)
    if adapter:
        what = f"{source.model_id}: holds an adapter ({adapter}), not a model"
        return f"{what}; give the base model by --model_id and this by --lora"
    if "config.json" in source.names:
        alone = source.read_json("config.json").get("_class_name") or "component"
        return f"{source.model_id}: holds a {alone} alone; give the folder of the whole pipeline, the one with {INDEX}"
    if source.hub:
        return source.missing(INDEX)
    return f"{source.model_id}: this folder is not a {class_name} in diffusers format (it has no {INDEX})"


def check_denoiser(family, source):
    """InputError unless the pipeline's denoiser is there and its configuration is one that the family's program runs."""
    if not isinstance(source.index.get(family.denoiser), list) or source.index[family.denoiser][0] is None:
        raise InputError(f"{source.model_id}: its {INDEX} names no {family.denoiser}, which {family.title} needs")
    config = source.config(family.denoiser)
    if not config:
        raise InputError(source.missing(f"{family.denoiser}/config.json"))
    if family.denoiser != "unet":
        return
    for name, plain in PLAIN_UNET.items():
        if config.get(name, plain) != plain:
            meaning = MEANING.get(name, "is of another kind than the family's")
            raise InputError(
                f"{source.model_id}: its unet {meaning} ({name} is {config[name]}); it cannot be quantized here"
            )


def native_pixels(family, source):
    """(height, width) in pixels that the denoiser is made for."""
    size = source.config(family.denoiser).get("sample_size") or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    levels = source.config("vae").get("block_out_channels") or (0,) * 4
    factor = 2 ** (len(levels) - 1)
    return height * factor, width * factor


def num_classes(family, source):
    """How many classes the model knows; 0 if it takes prompts."""
    return (source.config(family.denoiser).get("num_embeds_ada_norm") or family.num_classes) if family.num_classes else 0


def own_scheduler(source):
    """(class name, configuration) of the sampler that lies with the model."""
    name = source.index.get("scheduler") or (None, None)
    return name[1], source.config("scheduler")
