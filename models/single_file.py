"""Pipelines in a single checkpoint file, as CompVis' and Stability AI's programs keep them, read by diffusers' loader.

Such a file holds weights alone: its components are configured by a folder of its own name beside it, by the project's
configuration of Stable Diffusion 1.x, or by the repository that diffusers knows for its kind, from the Hub or its cache.
"""

import contextlib
import logging
import zipfile
from pathlib import Path

import diffusers
import torch
from diffusers import pipelines
from diffusers.loaders.single_file import load_single_file_sub_model
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    SingleFileComponentError,
    infer_diffusers_model_type,
    load_single_file_checkpoint,
)
from huggingface_hub import snapshot_download
from transformers import CLIPTextConfig, CLIPTokenizer

from errors import InputError, first_line
from models.components import ADAPTER, UNREAD, adapter_message, component_class, explained
from models.repository import INDEX, open_repository

SD1_FOLDER = Path(__file__).parent / "ldm" / "stable-diffusion-v1"
SD1_CONFIG = SD1_FOLDER / "v1-5-pruned-emaonly"  # of a Stable Diffusion 1.x file that has no folder of its own name
SD1_TOKENIZER = "openai/clip-vit-large-patch14"
CLASS_OF_KIND = {  # as diffusers tells kinds by their weights' names
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "playground-v2-5": "StableDiffusionXLPipeline",
    "xl_refiner": "StableDiffusionXLImg2ImgPipeline",
}
NAMES_OF_PARTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")
GGUF = b"GGUF"


class SingleFile:
    """A checkpoint file and what configures it; stands where a Repository does."""

    def __init__(self, title, class_name, path):
        self.model_id, self.path = str(path), Path(path)
        self._title = title
        check_readable(title, class_name, self.path)
        self.checkpoint = self._read()
        self.configuration = self._configuration(class_name)

    @property
    def folder(self):
        return self.configuration.folder

    @property
    def index(self):
        return self.configuration.index

    def config(self, component):
        return self.configuration.config(component)

    def _read(self):
        with explained_file(self.path, self._title), torch.serialization.safe_globals(_stand_ins(self.path)):
            checkpoint = load_single_file_checkpoint(str(self.path))
            if not isinstance(checkpoint, dict) or not all(isinstance(key, str) for key in checkpoint):
                raise ValueError("no dict of tensors by name")
        check_names(self.path, self._title, checkpoint)
        return checkpoint

    def _configuration(self, class_name):
        beside = self.path.with_suffix("")
        if (beside / INDEX).is_file():
            return open_repository(beside)
        with explained_file(self.path, self._title):
            kind = infer_diffusers_model_type(self.checkpoint)
        if CLASS_OF_KIND.get(kind) != class_name:
            raise InputError(
                f"{self.path}: its weights' names are those of a {CLASS_OF_KIND.get(kind, kind)}; {self._title} needs a "
                f"{class_name}"
            )
        if kind == "v1":
            return open_repository(SD1_CONFIG)
        repo = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
        try:
            return open_repository(repo)
        except InputError as reason:
            raise InputError(
                f"{self.path}: a single file says nothing of how its components are configured; put the small files of "
                f"{repo} into a folder {beside} ({reason})"
            ) from None

    def load_component(self, name, dtype, _variants=()):
        """The component `name` in `dtype`; InputError if the file lacks one of its weights, or has others."""
        loaded_class = component_class(self, name)
        library, class_name = self.index[name]
        self._check_whole(name, loaded_class)
        with explained_file(self.path, self._title), left_over() as unused:
            module = load_single_file_sub_model(
                library_name=library,
                class_name=loaded_class.__name__ if library == "transformers" else class_name,
                name=name,
                checkpoint=self.checkpoint,
                pipelines=pipelines,
                is_pipeline_module=False,
                cached_model_config_path=str(self.folder),
                local_files_only=True,
                torch_dtype=None,  # cast below, once a text encoder's weights are known to be there
            )
        self._check_missing(name, (key for key, weight in module.state_dict().items() if weight.is_meta))
        if unused:
            raise InputError(f"{self.path}: {unused[0]}")
        return module.to(dtype).eval().requires_grad_(False)

    def _check_whole(self, name, loaded_class):
        """InputError if the file lacks a weight of one of diffusers' models, which its loader would not name."""
        convert = SINGLE_FILE_LOADABLE_CLASSES.get(loaded_class.__name__, {}).get("checkpoint_mapping_fn")
        if convert is None:
            return
        with explained_file(self.path, self._title), torch.device("meta"):
            config = loaded_class.load_config(self.folder, subfolder=name)
            wanted = loaded_class.from_config(config).state_dict()
            found = convert(config=config, checkpoint=dict(self.checkpoint))
        if found:
            self._check_missing(name, wanted.keys() - found.keys())

    def _check_missing(self, name, keys):
        missing = sorted(key for key in keys if not UNREAD.search(key))
        if missing:
            raise InputError(
                f"{self.path}: this file is not a checkpoint of {self._title} (not all weights of its {name} are in it, "
                f"first {missing[0]})"
            )

    def tokenizers(self):
        """The tokenizers that may have no vocabulary in the configuration's folder, {name: tokenizer}."""
        return {} if "tokenizer_2" in self.index else {"tokenizer": _clip_tokenizer(self.folder)}


def check_readable(title, class_name, path):
    """InputError unless diffusers reads single files of the pipeline, and the file may be one."""
    if not path.is_file():
        raise InputError(
            f"{path}: no such checkpoint; download {path.name} of {title} and put it there, or name another "
            "file, folder or Hub id with --model_id; `--model_id embedded` works offline"
        )
    with path.open("rb") as file:
        if file.read(len(GGUF)) == GGUF:
            raise InputError(
                f"{path}: a GGUF file, whose weights are already quantized; give the model that it was made from"
            )
    if not hasattr(getattr(diffusers, class_name), "from_single_file"):
        raise InputError(
            f"{path}: diffusers reads no single files of {title}; convert it to a folder that a {class_name} loads, "
            "and give that by --model_id"
        )


def check_names(path, title, checkpoint):
    """InputError unless the weights' names are those of a whole pipeline in one file."""
    if adapter := next(filter(ADAPTER.search, checkpoint), None):
        raise InputError(adapter_message(path, adapter))
    low_bit = next((k for k, v in checkpoint.items() if torch.is_tensor(v) and _is_low_bit(k, v)), None)
    if low_bit:
        raise InputError(
            f"{path}: {low_bit} is kept in {checkpoint[low_bit].dtype}; these weights are already quantized: give the model "
            "that they were made from"
        )
    if not any(name.startswith(NAMES_OF_PARTS) for name in checkpoint):
        first = next(iter(checkpoint), None)
        raise InputError(
            f"{path}: this file is not a checkpoint of {title} (its weights are named otherwise, first {first}); a "
            "denoiser's weights alone belong into a copy of its pipeline's folder"
        )


def _is_low_bit(key, value):
    whole = not value.is_floating_point() and not value.is_complex()
    return key.endswith("weight") and value.ndim > 1 and (whole or value.element_size() == 1)


@contextlib.contextmanager
def explained_file(path, title):
    """What a library raises is said in one line that names the file."""
    try:
        with explained(path, title):
            yield
    except (InputError, SingleFileComponentError) as error:
        reason = error.__cause__ if isinstance(error, InputError) else error
        if isinstance(reason, ImportError) or reason is None:
            raise
        raise InputError(f"{path}: this file is not a checkpoint of {title} ({first_line(reason)})") from None


@contextlib.contextmanager
def left_over():
    """A list of what diffusers' loader notes of weights that it has no place for; quiet loading would drop the note."""
    noted = []
    logger = logging.getLogger("diffusers.loaders.single_file_model")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: noted.append(" ".join(record.getMessage().split()))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield noted
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        noted[:] = [note for note in noted if "not used" in note]


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
    with contextlib.suppress(Exception):  # as many types as damaged files have
        found = folder if folder.is_dir() else snapshot_download(SD1_TOKENIZER, allow_patterns=["*.json", "merges.txt"])
        tokenizer = CLIPTokenizer.from_pretrained(found, model_max_length=text_encoder.max_position_embeddings)
        if len(tokenizer) == text_encoder.vocab_size:
            return tokenizer
    raise InputError(
        f"the checkpoint holds no vocabulary, and the {text_encoder.vocab_size} tokens of {SD1_TOKENIZER} are neither "
        f"in {folder} nor fetched from the Hub; put that model's vocab.json and merges.txt there"
    )
