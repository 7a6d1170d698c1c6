"""Which weights of any pipeline's denoiser are quantized, and why the others are not."""

import fnmatch
import re
from dataclasses import dataclass, replace

import torch

from models.any_pipeline import first_arguments, on_meta
from models.families import FAMILIES
from quant.discovery import weight_use
from quant.slots import ANY_MODULE, find_slots, weight_layers


@dataclass(frozen=True)
class Left:
    """Paths of weight layers that stay float, by the reason."""

    excluded: tuple[str, ...] = ()  # as asked for
    kept: tuple[str, ...] = ()  # which the model's class keeps in float32
    read: tuple[str, ...] = ()  # which the model reads without calling their layer
    small: tuple[str, ...] = ()  # which would take no less space
    idle: tuple[str, ...] = ()  # neither called nor read in a short call: quantized like the others, but said

    @property
    def paths(self):
        return {*self.excluded, *self.kept, *self.read, *self.small}


def rules_of(class_name, denoiser_name):
    """The slot rules of the family whose pipeline and denoiser these are; those that suit any module if there is none."""
    rows = (row for row in FAMILIES.values() if (row.pipeline, row.denoiser) == (class_name, denoiser_name))
    return next((row.slot_rules for row in rows), ANY_MODULE)


def slots_without(module, rules, paths):
    """The slots {key: WeightSlot} of a module's weights but those at `paths`."""
    return find_slots(module, replace(rules, exclude=(*rules.exclude, *map(re.escape, paths))))


def with_true_ties(module, rules):
    """The rules, their ties left out unless the weights that they tie are the same."""
    for path, layer in weight_layers(module, rules):
        shared = rules.shared_path(path)
        if shared != path and not torch.equal(layer.weight, module.get_submodule(shared).weight):
            return replace(rules, ties=())
    return rules


def matching(paths, pattern):
    """Those of the module paths that a shell-like pattern names, or whose beginning it does."""
    beginnings = {path: [path[: dot.start()] for dot in re.finditer(r"\.|$", path)] for path in paths}
    return [path for path, names in beginnings.items() if any(fnmatch.fnmatchcase(name, pattern) for name in names)]


def kept_in_float(module, paths):
    """Those of the paths that lie in modules which the model's class keeps in float32."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return [path for path in paths if kept & set(path.split("."))]


def use_of_weights(pipeline, names, call):
    """{name: WeightUse} of the pipeline's denoisers, stand-ins for which do: found on the meta device.

    A denoiser is left out if the first one's arguments do not run it there. InputError if the pipeline cannot be called.
    """
    first, arguments = first_arguments(pipeline, names, call)
    found, arguments = {}, on_meta(arguments)
    for name in names:
        module = getattr(pipeline, name)
        if name == first or type(module) is type(getattr(pipeline, first)):
            try:
                module.to("meta")
                found[name] = weight_use(module, lambda module=module: module(**arguments))
            except Exception:  # whatever a forward does that the meta device cannot
                continue
    return found
