"""The key strings by which files name weights: configurations, multiquantizers, labels, and all that is published.

A key is `model.<name>.weight_quantizer`, the name being the module's path or, where a published model has other names,
what that calls the module; the second part of a split weight has `model.<name>.weight_quantizer_0`. Everywhere else a
weight is a `WeightKey`: files are converted where they are read and written.
"""


def file_key(name, part=0):
    """The key in files of the weight of a module, by its name there, and of its first or second part."""
    return f"model.{name}.weight_quantizer" + ("_0" if part else "")


def by_file_key(values, slots):
    """{file key: value} of {weight's key: value}."""
    return {slots[key].file_key: value for key, value in values.items()}


def by_weight(values, slots):
    """{weight's key: value} of {file key: value}; what is of none of the slots is left out."""
    keys = {slot.file_key: key for key, slot in slots.items()}
    return {keys[name]: value for name, value in values.items() if name in keys}


def file_ties(slots):
    """{file key: file key of the weight that it shares, its own if none}."""
    return {slot.file_key: slots[slot.tie].file_key for slot in slots.values()}


def tied_file_key(key, rules):
    """File key of the weight that the one of `key` shares by the slot rules; its own if none. Names are module paths."""
    path = key.removeprefix("model.").removesuffix(".weight_quantizer")
    shared = rules.shared_path(path)
    return key if shared == path else file_key(shared)
