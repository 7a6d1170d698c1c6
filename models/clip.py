"""A CLIP model (Radford et al., 2021) and its processor, from a local folder, the Hub's cache or the Hub."""

from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from transformers import CLIPModel, CLIPProcessor

from errors import InputError, first_line
from models.components import one_line, quiet_loading
from models.repository import why_not_fetched

CLIP_MODEL = "openai/clip-vit-base-patch16"
WAY_OUT = "give a local folder in the same format by --clip_model, or leave out --clip_score"


def load_clip(model_id):
    """Model, in float32 on the CPU, and processor from a folder or the Hub's cache, else the Hub; InputError if none."""
    model_id = str(model_id)
    if Path(model_id).is_dir():
        return _from_folder(model_id, f"{model_id}: this folder is not a CLIPModel in transformers format", WAY_OUT)
    try:
        copy = snapshot_download(model_id, local_files_only=True)
    except Exception:  # as many types as there are reasons
        wrong = "not in the Hub's cache"
    else:
        try:
            return _from_pretrained(copy)
        except Exception as reason:  # damaged files raise many types
            wrong = f"its copy in the Hub's cache, {copy}, is incomplete or damaged ({first_line(reason)})"
    copy = _fetch(model_id, wrong)
    whole = Path(copy).parents[1]  # with the files that the copy links to
    return _from_folder(
        copy, f"CLIP score: {model_id}: its copy in the Hub's cache is damaged", f"delete {whole} and run again"
    )


def _fetch(model_id, wrong):
    """The folder of the Hub's cache with all that is needed of a model; `wrong` says why it has to be fetched."""
    try:
        # Asked first since it fails at once without a network, where a download tries for minutes.
        files = [file.rfilename for file in HfApi().model_info(model_id, timeout=10).siblings]
        weights = "model*.safetensors" if any(name.endswith(".safetensors") for name in files) else "pytorch_model*.bin"
        return snapshot_download(model_id, allow_patterns=["*.json", "*.txt", weights])
    except Exception as reason:  # as many types as there are reasons
        raise InputError(
            f"CLIP score: {model_id!r} is no local folder, {wrong}, and cannot be fetched from the Hub "
            f"({why_not_fetched(reason)}); {WAY_OUT}"
        ) from None


def _from_folder(folder, wrong, way_out):
    try:
        with one_line(folder, "CLIP model"):
            return _from_pretrained(folder)
    except InputError as reason:
        raise InputError(f"{wrong} ({first_line(reason.__cause__ or reason)}); {way_out}") from None


def _from_pretrained(folder):
    """Model in float32, and processor. What transformers would make up is an error here."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError("it has no config.json")
    with quiet_loading():
        model, report = CLIPModel.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # so that they are in the report
            output_loading_info=True,
        )
        if report["missing_keys"] or report["mismatched_keys"]:
            raise ValueError("its weights do not fit its configuration")
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    if len(processor.tokenizer) <= len(processor.tokenizer.all_special_ids):
        raise ValueError("its tokenizer has no vocabulary")
    return model, processor
