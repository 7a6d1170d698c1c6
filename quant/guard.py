"""Packed weights that diffusers would load without asking for the quantizer, refused before anything is loaded.

diffusers asks the quantizer that `config.json` names. Where it names none, or another, diffusers warns of tensors that it
does not know and goes on with weights that hold nothing. Of a single file it knows no quantizer at all. It has no call by
which others could object, so the two functions of its own through which all names of tensors come are wrapped.
"""

import functools
import inspect

from diffusers import ModelMixin
from diffusers.loaders import single_file_model

from errors import InputError


def refuse_unasked(quantizer_class):
    """Refuse packed weights whose quantizer is not a `quantizer_class`; nothing changes for any others."""
    load = inspect.getattr_static(ModelMixin, "_load_pretrained_model", None)
    if isinstance(load, classmethod):
        ModelMixin._load_pretrained_model = classmethod(_checking_quantizer(load.__func__, quantizer_class))
    read = getattr(single_file_model, "load_single_file_checkpoint", None)
    if read is not None:
        single_file_model.load_single_file_checkpoint = _checking_file(read)


def _checking_quantizer(load, quantizer_class):
    signature = inspect.signature(load)

    @functools.wraps(load)
    def checked(*args, **kwargs):
        told = signature.bind(*args, **kwargs).arguments
        if has_codes(told.get("loaded_keys", ())) and not isinstance(told.get("hf_quantizer"), quantizer_class):
            where = told.get("pretrained_model_name_or_path")
            raise InputError(f"{where}: its weights are packed, and its config.json does not say so; get the folder again")
        return load(*args, **kwargs)

    return checked


def _checking_file(read):
    @functools.wraps(read)
    def checked(path, *args, **kwargs):
        checkpoint = read(path, *args, **kwargs)
        if has_codes(checkpoint):
            raise InputError(f"{path}: its weights are packed; from_pretrained reads them, with their config.json")
        return checkpoint

    return checked


def has_codes(names):
    """Whether among the names of tensors are those of a packed layer: codes, and what decodes them."""
    names = set(names)
    return any(name.endswith(".codes") and f"{name.removesuffix('codes')}table" in names for name in names)
