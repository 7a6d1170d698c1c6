"""Quantized denoisers as diffusers' artefacts: saved by `save_pretrained`, loaded by `from_pretrained`.

diffusers has no call by which a third party enters a quantizer, so `register` adds ours to its two tables; importing
`quant` does it. A saved denoiser has the state of its packed layers (see quant/layers.py) in its safetensors files and
this in its `config.json`:

    quantization_config: {quant_method: "qua2sedimo", version,
        weights, ties: see quant/packed_state.py, which checks them and the tensors,
        precision_bits, avg_bits,
        digest: of all these; those of the tensors are in their files (quant/digests.py)}

Loading replaces the layers while the model is on the meta device, so float weights never stand. On the CPU codes stay
mapped from the file. With `from_pretrained(..., quantization_config=Qua2SeDiMoConfig("kmeans-4"))` a float model is
fitted and packed layer by layer as its files are read.
"""

import copy
import enum
import json
import logging
import re
from collections import OrderedDict

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from errors import InputError
from quant.digests import NAME, check_files, digest_of, with_digests
from quant.guard import refuse_unasked
from quant.joined import is_fused, join_instead_of_fusing
from quant.layers import PackedLayer, module_places, packed_form, packed_layers, packed_parts, replace_module
from quant.packed_state import (
    check_tables,
    check_words,
    dequantize,
    empty_layers,
    is_codes_name,
    is_packed_name,
    put_layers,
    put_tensor,
    tied_names,
    told_sizes,
    weights_of,
)
from quant.quantizer import FLOAT
from quant.registry import quantizer
from quant.slots import is_weight_layer

VERSION = 2
WITHOUT_DIGESTS = 1  # read too: what it was packed from may be gone
log = logging.getLogger("qua2sedimo")


class QuantMethod(enum.StrEnum):  # diffusers asks for `.value`, JSON for a string
    """The name of this program's method in a model's `quantization_config`."""

    QUA2SEDIMO = "qua2sedimo"


class Qua2SeDiMoConfig(QuantizationConfigMixin):
    """How a model of diffusers' is quantized, or was.

    `method`: the quantizer of every weight when a float model is quantized on loading. `modules_to_not_convert`: module
    paths, or the beginnings of such, to leave in float. The rest is of a saved model; see this module's text. InputError
    for anything else.
    """

    def __init__(
        self, method=None, modules_to_not_convert=None, weights=None, ties=None, version=VERSION, quant_method=None, **notes
    ):
        self.quant_method = QuantMethod.QUA2SEDIMO
        if not isinstance(version, int) or version not in (VERSION, WITHOUT_DIGESTS) or isinstance(version, bool):
            raise InputError(f"quantization_config: version {repr(version)[:60]}, this program reads {VERSION}")
        if method is not None and quantizer(method).name == FLOAT:  # an unknown one is refused
            raise InputError("quantization_config: float quantizes nothing; leave the quantization_config out")
        if isinstance(modules_to_not_convert, str):
            modules_to_not_convert = [modules_to_not_convert]
        left = modules_to_not_convert or []
        if not isinstance(left, list | tuple) or not all(isinstance(path, str) for path in left):
            raise InputError(f"quantization_config: modules_to_not_convert is {left!r}, not a list of module paths")
        check_words(weights, ties)
        self.method, self.modules_to_not_convert, self.version = method, modules_to_not_convert, VERSION
        self.weights, self.ties = weights, ties
        self.notes = notes
        self.has_digests = version != WITHOUT_DIGESTS

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """The configuration that `to_dict` has told, as a file holds it; InputError if that was changed."""
        told = dict(config_dict)
        digest = told.pop("digest", None)
        made = super().from_dict(told, return_unused_kwargs=return_unused_kwargs, **kwargs)
        is_saved = told.get("weights") is not None or digest is not None
        if is_saved and told.get("version") != WITHOUT_DIGESTS and digest != _digest_of(told):
            raise InputError("quantization_config: is not as it was saved; get config.json again")
        return made

    def to_dict(self):
        """The entries as JSON holds them, what is unset left out; with a digest, if they are of a packed model."""
        told = {name: value for name, value in self.__dict__.items() if value is not None}
        told = self.notes | told | {"quant_method": self.quant_method.value}
        del told["notes"], told["has_digests"]
        return told if self.weights is None else told | {"digest": _digest_of(told)}

    def to_diff_dict(self):
        """The same as `to_dict`; diffusers asks for it where it logs or writes configurations."""
        return self.to_dict()

    def leaves_out(self, path):
        """Whether the module at `path` is to stay float."""
        return any(f"{path}.".startswith(f"{left}.") for left in self.modules_to_not_convert or ())


def _digest_of(told):
    return digest_of(json.dumps(told, sort_keys=True))


class Qua2SeDiMoQuantizer(DiffusersQuantizer):
    """What diffusers' `from_pretrained` and `save_pretrained` call."""

    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False
    is_compileable = True
    loaded_keys = None  # names in the files, where diffusers tells them
    device_map = None

    @property
    def supports_parallel_loading(self):
        """Whether files may be read side by side: fitting takes them one after another."""
        return self.pre_quantized

    def get_cuda_warm_up_factor(self):
        """How many times less memory than half precision diffusers is to reserve beforehand."""
        return 2 if self.pre_quantized else 8

    def validate_environment(self, device_map=None, **kwargs):
        """InputError for a device map that leaves packed layers on the disk."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise InputError(
                "device_map: says disk, where packed layers cannot wait; say cpu: there they are mapped from their file"
            )
        self.device_map = device_map

    def maybe_update_loaded_keys(self, loaded_keys, checkpoint_files):
        """Note the names of the files' tensors, which diffusers tells here alone; check the files, before any is loaded."""
        told = self.quantization_config
        if self.pre_quantized and told.weights and told.has_digests:
            check_files(checkpoint_files)
            loaded_keys = [name for name in loaded_keys if name != NAME]
        elif self.pre_quantized and told.weights:
            log.warning("%s: was saved without digests, so damage may go unseen; save the model again", checkpoint_files[0])
        self.loaded_keys = set(loaded_keys)
        return loaded_keys

    def maybe_update_state_dict(self, state_dict):
        """`from_single_file` does not say whether a file is quantized: this is where it shows."""
        if self.quantization_config.weights is None and not any(is_codes_name(name) for name in state_dict):
            self.pre_quantized = False
        return state_dict

    def update_missing_keys(self, model, missing_keys, prefix):
        """Tied tensors are in the file once; every other tensor has to be there, and nothing else."""
        tied = tied_names(model, self.quantization_config.ties)
        lost = sorted(set(missing_keys) - tied)
        if lost:
            raise InputError(f"the quantized model's files lack {len(lost)} tensors, first {lost[0]}; get the whole folder")
        expected = model.state_dict().keys() - tied
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        extra = [key for key in (self.loaded_keys or set()) - expected if not any(re.search(each, key) for each in ignored)]
        if extra and self.pre_quantized:
            raise InputError(f"the quantized model's files have {len(extra)} tensors too many, first {min(extra)}")
        return []

    def _process_model_before_weight_loading(self, model, keep_in_fp32_modules=(), **kwargs):
        told, self.kept = self.quantization_config, tuple(keep_in_fp32_modules or ())
        if not self.pre_quantized:
            if told.method is None:
                raise InputError("quantization_config: names no method to quantize by, such as kmeans-4")
            self.places = module_places(model)
            return
        if not told.weights:
            raise InputError("quantization_config: names no weights that are quantized; get the folder again")
        replace_by_empty(model, told)
        for path, layer in packed_layers(model):
            if set(self.kept) & set(path.split(".")):
                layer.compute_dtype = torch.float32
        self.sharing = {}  # path of a layer -> layers that share its tensors
        for path, shared in (told.ties or {}).items():
            self.sharing.setdefault(shared, []).append(model.get_submodule(path))

    def check_if_quantized_param(self, model, param_value, param_name, state_dict, **kwargs):
        """Whether a tensor of the files comes to `create_quantized_param`: a packed layer's, or one to be packed."""
        path, _, name = param_name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, PackedLayer):
            return name != "bias"
        return not self.pre_quantized and name == "weight" and self._converts(path, module)

    def _converts(self, path, module):
        kept = set(self.kept) & set(path.split("."))
        return is_weight_layer(module) and not kept and not self.quantization_config.leaves_out(path)

    def check_quantized_param_shape(self, param_name, current_param, loaded_param):
        """InputError: diffusers asks only where a tensor of the files has not the shape of the layer's."""
        expected, found = list(current_param.shape), list(loaded_param.shape)
        raise InputError(f"{param_name}: has shape {found}, not {expected}; the file is damaged or of another model")

    def create_quantized_param(self, model, param_value, param_name, target_device, state_dict, *args, **kwargs):
        """Put a tensor of the files into its packed layer, or fit and pack the layer of a float weight."""
        path, _, name = param_name.rpartition(".")
        value, module = state_dict[param_name], model.get_submodule(path)  # as the file has it: `param_value` is cast
        if not isinstance(module, PackedLayer):
            packed = _fit_and_pack(path, module, value.to(target_device), param_value.dtype, self.quantization_config.method)
            replace_module(self.places[id(module)], packed)
        elif self.pre_quantized:
            put_tensor(module, name, value, param_name, target_device)
            for tied in self.sharing.get(path, ()):
                setattr(tied, name, getattr(module, name))
        # else it is one that stands at several places, and is packed already

    def _process_model_after_weight_loading(self, model, **kwargs):
        self._check_all_is_there(model)
        if self.pre_quantized:
            check_tables(packed_layers(model))
        else:
            del self.places
            self.quantization_config = _completed(self.quantization_config, model)
        finish(model, self.quantization_config)

    def _check_all_is_there(self, model):
        """Whatever an index of files has promised; a device map may keep weights elsewhere for now."""
        devices = {str(device) for device in (self.device_map or {}).values()}
        empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
        if empty and len(devices) <= 1:
            raise InputError(f"{empty}: is not in the files; get the whole folder")

    def get_state_dict_and_metadata(self, state_dict, safe_serialization=False):
        """The tensors but tied ones, which the file has once, and what `fuse_qkv_projections` has added; their digests.

        InputError for tensors that are offloaded and for layers that are packed no more.
        """
        told = self.quantization_config
        ties, on_disk = told.ties or {}, _are_on_disk(getattr(state_dict, "model", None))
        for path in [path for path in told.weights if path not in ties]:
            codes = state_dict.get(f"{path}.codes", state_dict.get(f"{path}.values"))
            if codes is None:
                raise InputError(f"{path}: is not the packed layer that it was; unload LoRAs before saving")
            if codes.is_meta or on_disk:
                raise InputError(f"{path}: its weights are offloaded; take the offloading off before saving")
        tied = tuple(f"{path}." for path in ties)
        kept = {name: v for name, v in state_dict.items() if not (name.startswith(tied) and is_packed_name(name))}
        kept = {name: value for name, value in kept.items() if not is_fused(name.rpartition(".")[0], kept)}
        offloaded = next((name for name, value in kept.items() if value.is_meta), None)
        if offloaded:
            raise InputError(f"{offloaded}: is offloaded; take the offloading off before saving")
        return with_digests(kept), {}

    def _dequantize(self, model):
        dequantize(model)
        for number in [n for n, hook in model._forward_pre_hooks.items() if hook is _refuse_shared_on_disk]:
            del model._forward_pre_hooks[number]
        config = {name: value for name, value in model._internal_dict.items() if name != "quantization_config"}
        model._internal_dict = FrozenDict(config)
        return model


def _are_on_disk(model):
    """Whether diffusers' group offloading keeps weights in files, and what has no meaning in their place."""
    for module in [] if model is None else model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("group_offloading")
        if getattr(getattr(hook, "group", None), "offload_to_disk_path", None):
            return True
    return False


def _refuse_shared_on_disk(model, _inputs):
    """diffusers writes each group of layers to the disk in turn, and what a later one shares has been let go by then."""
    if not torch.compiler.is_compiling() and _are_on_disk(model):
        raise InputError(
            f"{type(model).__name__}: layers of it share weights, which diffusers loses on their way to the disk; "
            "load it again, and offload it without offload_to_disk_path"
        )


def _completed(configuration, model):
    """A copy of the configuration that a float model was quantized by on loading, with what came of it."""
    told = copy.copy(configuration)
    told.weights = weights_of(model)
    if not told.weights:
        raise InputError("quantization_config: leaves no weight to quantize")
    table = next(layer.table for _, layer in packed_layers(model))
    told.notes = told_sizes(model, None, 8 * table.itemsize) | told.notes
    return told


def register():
    """Enter the quantizer in diffusers' tables, and the configuration in transformers', which pipelines ask too.

    Called once, by `import quant`.
    """
    for table, entry in (
        ("AUTO_QUANTIZER_MAPPING", Qua2SeDiMoQuantizer),
        ("AUTO_QUANTIZATION_CONFIG_MAPPING", Qua2SeDiMoConfig),
    ):
        if not isinstance(getattr(auto, table, None), dict):
            raise ImportError(f"diffusers {diffusers.__version__} has no {table}; this program knows 0.36 to 0.42")
        getattr(auto, table)[QuantMethod.QUA2SEDIMO.value] = entry
    from transformers.quantizers import auto as transformers_auto

    transformers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QuantMethod.QUA2SEDIMO.value, Qua2SeDiMoConfig)
    refuse_unasked(Qua2SeDiMoQuantizer)


def attach(model, ties, precision_bits, **notes):
    """Make a model of diffusers' whose layers were packed in place one that saves as if it were loaded packed."""
    sizes = told_sizes(model, ties, precision_bits)
    configuration = Qua2SeDiMoConfig(weights=weights_of(model), ties=ties or None, **sizes | notes)
    model.hf_quantizer = Qua2SeDiMoQuantizer(configuration, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, configuration.quant_method
    finish(model, configuration)


def replace_by_empty(model, configuration):
    """Put empty packed layers in the place of the weight layers that a saved configuration names."""
    put_layers(model, empty_layers(model, configuration.weights, configuration.ties))


def finish(model, configuration):
    """Give a packed model what it has beside its layers: configuration, no gradients, what diffusers and PEFT ask of it."""
    model.requires_grad_(False)
    model.register_to_config(quantization_config=configuration)
    join_instead_of_fusing(model)
    if configuration.ties and _refuse_shared_on_disk not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_refuse_shared_on_disk)
    if _with_lazy_weights not in getattr(model, "_state_dict_hooks", {}).values():
        model._register_state_dict_hook(_with_lazy_weights)


@torch.no_grad()
def _fit_and_pack(path, layer, weight, dtype, method):
    """The packed layer of a float layer on the meta device, whose weight has been read."""
    try:
        parameters = quantizer(method).fit(weight)
    except ValueError as reason:
        raise InputError(f"{path}: {reason}") from None
    packed = packed_form(layer, packed_parts(weight.shape, [method]))
    packed.compute_dtype = dtype
    packed.fill(packed.parts[0], weight, parameters)
    return packed


class _StateDict(OrderedDict):
    """A state dictionary that also answers for `X.weight` of a packed layer X, which is not listed, so is not saved."""

    def __init__(self, *args, model=None):
        super().__init__(*args)
        self.model = model

    def __missing__(self, name):
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and self.model is not None:
            try:
                return self.model.get_submodule(path).weight
            except AttributeError:
                pass
        raise KeyError(name)

    def __reduce__(self):
        return OrderedDict, (list(self.items()),)


def _with_lazy_weights(model, state_dict, prefix, _metadata):
    """Hook of `state_dict()`: diffusers' LoRA loaders look weights up in it to learn their shapes."""
    if prefix or any(value.is_meta for name, value in state_dict.items() if is_packed_name(name)):
        return None
    answering = _StateDict(state_dict, model=model)
    answering._metadata = getattr(state_dict, "_metadata", None)
    return answering
