"""Packed modules of any library saved and loaded: for those that have no `save_pretrained` of their own.

A folder has `model.safetensors`, the module's state dictionary with each tensor once, and `quantization_config.json`:

    {quant_method: "qua2sedimo", version, weights, ties: {}, digest, as in quant/pretrained.py,
     same: {name in the state dictionary: name of the tensor in the file that it is},
     dtypes: {module path: precision that the packed layer says its weight has}}
"""

import functools
import json
from pathlib import Path

import safetensors.torch
import torch

from errors import InputError, first_line
from quant.digests import NAME, check_files, with_digests
from quant.files import atomic_write, save_text
from quant.layers import packed_layers
from quant.packed_state import check_tables, empty_layers, put_layers, put_tensor, weights_of
from quant.pretrained import Qua2SeDiMoConfig

TENSORS, CONFIGURATION = "model.safetensors", "quantization_config.json"


def save_packed(module, folder):
    """Write a module whose weights were packed (see `QuantizedModel.pack`) to a folder, which is made if need be.

    InputError if it has no packed layer, has state that is no tensor or is offloaded, or cannot be written.
    """
    layers = dict(packed_layers(module))
    if not layers:
        raise InputError(f"{type(module).__name__}: has no packed layer; pack it first")
    tensors, same = _each_once(module.state_dict())
    dtypes = {path: str(layer.compute_dtype).removeprefix("torch.") for path, layer in layers.items()}
    told = Qua2SeDiMoConfig(weights=weights_of(module), same=same, dtypes=dtypes).to_dict()
    with atomic_write(Path(folder) / TENSORS) as file:
        file.write(safetensors.torch.save(with_digests(tensors), metadata={"format": "pt"}))
    save_text(json.dumps(told, indent=2, sort_keys=True) + "\n", Path(folder) / CONFIGURATION)


def refuse_saving_unread(module):
    """Let no model in `module` save its packed weights by a `save_pretrained` whose files nothing would read again.

    Those that diffusers saves and loads packed are left alone: they have an `hf_quantizer` (see quant/pretrained.py).
    transformers would fill the weights that it misses at random.
    """
    for each in module.modules():
        if hasattr(type(each), "save_pretrained") and not hasattr(each, "hf_quantizer") and any(packed_layers(each)):
            each.save_pretrained = functools.partial(_refuse_saving, type(each).__name__)


def _refuse_saving(name, *args, **kwargs):
    raise InputError(
        f"{name}: its save_pretrained knows no packed weights, and would write what cannot be loaded; use "
        "quant.save_packed and load_packed, or pack another component"
    )


def _each_once(state_dict):
    """The tensors {name: tensor} of a state dictionary without repetitions, and {name left out: name kept}."""
    tensors, same, first = {}, {}, {}
    for name, tensor in state_dict.items():
        if not torch.is_tensor(tensor) or tensor.is_meta:
            raise InputError(f"{name}: is no tensor, or one that is offloaded; it cannot be saved")
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if identity in first:
            same[name] = first[identity]
        else:
            first[identity] = name
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, same


def load_packed(module, folder):
    """Make a float module the packed one that `save_packed` wrote to a folder; returns the module.

    `module` is of the same architecture, its weights of no matter: on the meta device they cost nothing. On the CPU
    codes stay mapped from the file. InputError, the module being left as it was, if the folder is damaged or of another
    module.
    """
    told = _read_configuration(Path(folder) / CONFIGURATION)
    tensors = _read_tensors(Path(folder) / TENSORS, told.has_digests)
    for name, kept in told.notes["same"].items():
        if kept not in tensors or name in tensors:
            raise InputError(f"{folder}: {name!r} cannot be the same as {kept!r}")
        tensors[name] = tensors[kept]
    layers = empty_layers(module, told.weights, told.ties)
    at = _paths(module, layers)
    floats = _split(module, at, tensors, folder)
    for path, packed in at.items():
        _fill(packed, path, tensors, told.notes["dtypes"])
    check_tables(at.items())
    put_layers(module, layers)
    module.load_state_dict(floats, strict=False, assign=True)
    return module.requires_grad_(False)


def _read_configuration(path):
    """The checked `Qua2SeDiMoConfig` of a file."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as reason:
        raise InputError(f"{path}: cannot be read ({first_line(reason)})") from None
    if not isinstance(told, dict) or told.get("quant_method") != "qua2sedimo":
        raise InputError(f"{path}: is not of a module that was packed")
    for name in ("same", "dtypes"):
        entries = told.setdefault(name, {})
        if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
            raise InputError(f"{path}: {name} is not a dictionary of names")
    try:
        told = Qua2SeDiMoConfig.from_dict(told)
    except InputError as reason:
        raise InputError(f"{path}: {reason}") from None
    if not told.weights:
        raise InputError(f"{path}: names no weights that are packed")
    return told


def _read_tensors(path, has_digests):
    """The tensors {name: tensor} of a safetensors file, mapped; compared with their digests where there are any."""
    if has_digests:
        check_files([path])
    try:
        tensors = safetensors.torch.load_file(path)
    except Exception as reason:  # of types of its own
        raise InputError(f"{path}: cannot be read ({first_line(reason)})") from None
    if has_digests:
        del tensors[NAME]
    return tensors


def _paths(module, layers):
    """{path: packed layer} of every place in `module` of the float layers in {float layer: packed layer}."""
    return {path: layers[each] for path, each in module.named_modules(remove_duplicate=False) if each in layers}


def _split(module, at, tensors, folder):
    """The float tensors among `tensors`; refuses what lacks, is too much or has another shape than the module's."""
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for path, packed in at.items():
        for name in [name for name in expected if name.startswith(f"{path}.") and name != f"{path}.bias"]:
            del expected[name]  # the weight, or what a parametrization makes it of
        expected |= {f"{path}.{name}": None for part in packed.parts for name in part.names}
    for name in sorted(expected.keys() ^ tensors.keys()):
        how = "lacks" if name in expected else "has, beside what the module has,"
        raise InputError(f"{folder}: {how} {name}; it is damaged or of another module")
    unsaved = [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in expected]
    if unsaved:
        raise InputError(f"{unsaved[0]}: is not of what is saved; build the module, or this of it, on the CPU")
    floats = {name: tensor for name, tensor in tensors.items() if expected[name] is not None}
    for name, tensor in floats.items():
        if tensor.shape != expected[name]:
            raise InputError(f"{folder}: {name} has shape {list(tensor.shape)}, not {list(expected[name])}")
    return floats


def _fill(packed, path, tensors, dtypes):
    """Put the tensors of the packed layer at `path`, and the precision that it computes in."""
    dtype = getattr(torch, dtypes.get(path, "float32"), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"quantization_config: {path} has the precision {dtypes[path]!r}")
    packed.compute_dtype = dtype
    for name in [name for part in packed.parts for name in part.names]:
        put_tensor(packed, name, tensors[f"{path}.{name}"], f"{path}.{name}", "cpu")
