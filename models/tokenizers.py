"""What is asked of a pipeline's tokenizers and small files, before and after they are read.

transformers makes something up where a file is missing: an empty vocabulary, settings of its own. Here that is an error.
"""

import importlib.util

from errors import InputError
from models.components import TEXT_ENCODERS, require

TOKENIZERS = tuple(name.replace("text_encoder", "tokenizer") for name in TEXT_ENCODERS)
VOCABULARIES = {  # where there is no tokenizer.json: what a tokenizer is made from
    "T5Tokenizer": ("spiece.model",),
    "BertTokenizer": ("vocab.txt",),
    "CLIPTokenizer": ("vocab.json", "merges.txt"),
}
NEEDED = {"spiece.model": ("sentencepiece", "google.protobuf")}  # packages that read a vocabulary file
IN_TEXT = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def check_small_files(source, given):
    """InputError if a file is missing without which a sampler or tokenizer would be made up, or not be made.

    Or a package that reads it. What is in `given` is not read.
    """
    index = source.index
    if index.get("scheduler"):
        require(source, "scheduler/scheduler_config.json")
    for name in TOKENIZERS:
        if name in given or not isinstance(index.get(name), list) or index[name][0] is None:
            continue
        require(source, f"{name}/tokenizer_config.json")
        if f"{name}/tokenizer.json" not in source.names:
            for file in VOCABULARIES.get(str(index[name][1]).removesuffix("Fast"), ()):
                require(source, f"{name}/{file}")
                _check_packages(source, f"{name}/{file}", NEEDED.get(file, ()))


def _check_packages(source, file, packages):
    for package in packages:
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # of the package that it is in
            found = None
        if found is None:
            wheel = {"google.protobuf": "protobuf"}.get(package, package)
            raise InputError(f"{source.model_id}: {file} is read by {wheel}, which is not installed: pip install {wheel}")


def check_tokenizers(source, pipeline):
    """InputError if a tokenizer has no vocabulary, or gives numbers of tokens that its text encoder has no row for."""
    for name, encoder in zip(TOKENIZERS, TEXT_ENCODERS, strict=True):
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is None:
            continue
        tokens, rows = len(tokenizer), source.config(encoder).get("vocab_size")
        if tokens <= len(set(tokenizer.all_special_ids)) + 1:
            raise InputError(f"{source.model_id}: its {name} has no vocabulary; its folder lacks a file, fetch it again")
        if rows is not None and (highest := _highest_in_text(tokenizer)) >= rows:
            raise InputError(
                f"{source.model_id}: its {name} gives numbers up to {highest}, and its {encoder} knows {rows} tokens; "
                "they are not of one model"
            )


def _highest_in_text(tokenizer):
    """The highest number of a token that text can become: reserved ones, as T5's extra ids, are in no prompt."""
    used = {getattr(tokenizer, kind, None) for kind in IN_TEXT}
    reserved = set(tokenizer.all_special_tokens) - used
    return max(number for token, number in tokenizer.get_vocab().items() if token not in reserved)
