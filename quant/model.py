"""`QuantizedModel`: any module of PyTorch's with its weights under quantizers. The library's one object.

    model = QuantizedModel(denoiser)                # every Linear and convolution in it is a weight to quantize
    model.fit(["mse-4", "kmeans-3"])                # scales, zero points, centroids; the module is as it was
    model.apply("mse-4")                            # its weights hold quantized values; another method may follow
    model.restore()                                 # or full precision again
    model = model.calibrate(moments, "mse-4")       # or rounded by what its layers are fed with; see quant/calibration.py
    model.pack({**model.uniform("mse-4"), ...})     # or packed codes alone, for good

The module keeps its class and its place; only its weight layers are replaced in it.
"""

import torch
from diffusers import ModelMixin
from tqdm import tqdm

from errors import InputError
from quant import config
from quant.calibrated import calibrated
from quant.entries import fit_entry, make_entry
from quant.exchangeable import install, on_device
from quant.joined import is_fused
from quant.layers import module_places, packed_layers, replace_module, share
from quant.memory import return_free_memory
from quant.packed_folder import refuse_saving_unread
from quant.pretrained import attach
from quant.quantizer import FLOAT
from quant.registry import SEARCH_SPACE, quantizer
from quant.slots import SlotRules, find_slots, free_keys, ties_of

SHOWN_AFTER_SECONDS = 2  # a bar


class QuantizedModel:
    """A module, its weight slots, what quantizers were fitted to them, and the methods that they are under.

    `dtype` is the precision P that quantizers are fitted in and sizes are counted in; None: the weights' own. `include`
    and `exclude` are patterns of whole module paths. `splits` {pattern: boundary} give a weight two quantizers, the first
    on the input channels before the boundary, a number or a function (module, path, layer). `ties` {pattern: path} name
    the layer that others share their weights with; InputError if the weights differ. `rules` are all of these in one
    SlotRules, in their place. `name` is what files say that they are of; None: the module's class.

    A weight's key is a `WeightKey`: the module's path, and the part, which is 1 for the second part of a split weight.

    Attributes: `slots` {key: WeightSlot}; `entries` {key: entry}, empty until fitted (see quant/entries.py); `module`;
    `name`; `dtype`.
    """

    def __init__(
        self, module, dtype=None, include=None, exclude=(), splits=None, ties=None, rules: SlotRules | None = None, name=None
    ):
        rules = rules or SlotRules(
            None if include is None else tuple(include),
            tuple(exclude),
            tuple((splits or {}).items()),
            tuple((ties or {}).items()),
        )
        self._set(module, find_slots(module, rules), dtype, {}, name)
        self._check_ties()

    @classmethod
    def of_slots(cls, module, slots, dtype=None, entries=None, name=None):
        """The model of slots that are known, with what was fitted to them."""
        model = cls.__new__(cls)
        model._set(module, slots, dtype, entries or {}, name)
        return model

    def _set(self, module, slots, dtype, entries, name):
        if not slots:
            raise InputError(f"{type(module).__name__}: has no Linear or convolution whose weight could be quantized")
        if isinstance(module, ModelMixin):
            _refuse_fused(module, slots)
        self.module, self.slots, self.entries = module, slots, entries
        self.name = name or type(module).__name__
        first = module.get_submodule(next(iter(slots.values())).module_path)
        self.dtype = dtype or first.weight.dtype
        self._parts = None

    def _check_ties(self):
        for key, tie in ties_of(self.slots).items():
            if key == tie:
                continue
            own, shared = self.weight(key), self.weight(tie)
            if not own.is_meta and not torch.equal(own, shared):
                raise InputError(f"{key}: its weights differ from {tie}, which it is to share")

    @property
    def precision_bits(self):
        """P: bits of a float weight, which sizes are counted in."""
        return torch.finfo(self.dtype).bits

    @property
    def is_packed(self):
        """Whether the module holds packed layers."""
        return next(packed_layers(self.module), None) is not None

    def weight(self, key):
        """The slot's float weight [C, ...] in the precision P, which is what quantizers are fitted to."""
        if self._parts is not None:
            return self._parts[key].original
        slot = self.slots[key]
        return slot.part_of(self.module.get_submodule(slot.module_path).weight.detach()).to(self.dtype)

    def fit(self, methods=SEARCH_SPACE, show=True):
        """Fit quantizers of the `methods` (words) to every weight that has none yet; returns `entries`."""
        keys = [key for key in free_keys(self.slots) if not self._fitted(key) >= set(methods)]
        for key in self._bar(keys, "fitting", show):
            self.fit_weight(key, methods)
        return self.entries

    def _fitted(self, key):
        return set(self.entries[key]["parameters"] if key in self.entries else ()) | {FLOAT}

    @torch.no_grad()
    def fit_weight(self, key, methods=SEARCH_SPACE):
        """Fit quantizers of the `methods` that it lacks to one weight."""
        missing = tuple(method for method in methods if method not in self._fitted(key))
        if not missing:
            return
        try:
            entry = fit_entry(self.weight(key), missing)
        except ValueError as reason:
            raise InputError(f"{key}: {reason}") from None
        known = self.entries.setdefault(key, entry)
        for each in ("parameters", "errors"):
            known[each] = known[each] | entry[each]

    @torch.no_grad()
    def calibrate(self, moments, configuration, levels=None, rounding=None, show=True):
        """A model of the same module whose methods of a configuration are calibrated by `moments` {key: Moments}.

        Those are `collect`ed (quant/calibration.py) of the module in full precision. Each weight's entry has the one method
        that the configuration gives it: with `levels` its tables are fitted by the moments, with `rounding` it has codes
        that compensate errors (quant/compensation.py); None is what pays for the algorithm. A weight without moments is
        as it was. InputError for moments of other inputs than a weight's.
        """
        configuration, entries = self.configuration(configuration), {}
        for key in self._bar(free_keys(self.slots), "calibrating", show):
            own, weight, method = moments.get(key), self.weight(key), quantizer(configuration[key])
            parameters = on_device(weight.device, self.parameters(key, method.name))
            if own is not None and method.tables:
                try:
                    parameters = calibrated(weight, method, parameters, own, levels, rounding)
                except ValueError as reason:
                    raise InputError(f"{key}: {reason}") from None
            entries[key] = make_entry(weight, {method.name: parameters})
        model = QuantizedModel.of_slots(self.module, self.slots, self.dtype, entries, self.name)
        model._parts = self._parts
        return model

    def uniform(self, method):
        """The configuration {key: method} in which every weight takes `method`."""
        return config.uniform(self.slots, method)

    def configuration(self, chosen):
        """The checked configuration {key: method} of `chosen`: a method for all, or {name: method}.

        A name is a module path, for all parts of its weight, or a key (module path, part), which has the last word.
        """
        if isinstance(chosen, str):
            return self.uniform(chosen)
        keys_at = {}
        for key in self.slots:
            keys_at.setdefault(key.path, []).append(key)
        parts = {name: method for name, method in chosen.items() if not isinstance(name, str)}
        whole = {key: chosen[path] for path in chosen if path not in parts for key in keys_at.get(path, [path])}
        ties = ties_of(self.slots)
        configuration = config.expand_ties(whole | parts, ties)
        config.check(configuration, ties)
        return configuration

    @property
    def parts(self):
        """{key: WeightPart} of the exchangeable layers, which the first use puts into the module."""
        return self._install(keep_originals=True)

    def _install(self, keep_originals):
        if self.is_packed:
            raise RuntimeError("the model is packed: its float weights are gone; load it again")
        if self._parts is None:
            self._parts = install(self.module, self.slots, self.dtype, keep_originals)
        return self._parts

    def apply(self, configuration, for_good=False):
        """Let the weights hold the values of a configuration (see `configuration`); unchanged ones are not touched.

        `for_good` keeps no float originals, so no other configuration can follow.
        """
        configuration = self.configuration(configuration)
        for key, part in self._install(keep_originals=not for_good).items():
            parameters = self.parameters(key, configuration[key])
            if part.method != configuration[key] or part.parameters is not parameters:
                part.set_method(configuration[key], parameters)

    def keep_originals(self):
        """Keep float weights from now on, so that the module may be cast and still take configurations of them."""
        self._install(keep_originals=True)

    def restore(self):
        """Put the float weights back."""
        for part in self.parts.values():
            if part.method is not None:
                part.set_method(None)

    def parameters(self, key, method):
        """The parameters {name: tensor} of a method for a slot; fitted now if they were not."""
        if method == FLOAT:
            return {}
        tie = self.slots[key].tie
        self.fit_weight(tie, [method])
        return self.entries[tie]["parameters"][method]

    def pack(self, configuration, show=True):
        """Turn every weight into packed codes of a configuration, layer by layer, for good; returns the module.

        What has not been fitted is fitted on the way; weights that are to stay `float` stay float layers. A denoiser of
        diffusers' is afterwards saved by its own `save_pretrained` and loaded by `from_pretrained` (see
        quant/pretrained.py).
        """
        configuration = self.configuration(configuration)
        if set(configuration.values()) == {FLOAT}:
            raise InputError("configuration: leaves every weight float, so that there is nothing to pack")
        left = list(dict.fromkeys(part.layer for part in self._install(keep_originals=False).values()))
        self._parts, places = None, module_places(self.module)
        for layer in self._bar(_drained(left), "packing", show, len(left)):
            keys = [part.slot.key for part in layer.parts]
            methods = [configuration[key] for key in keys]
            packed = layer.packed(methods, [self.parameters(key, configuration[key]) for key in keys])
            replace_module(places[id(layer)], packed)
            layer.parts.clear()
        packed = dict(packed_layers(self.module))
        ties = {path: shared for path, shared in self._ties().items() if path in packed}
        share(self.module, ties)
        if isinstance(self.module, ModelMixin):
            attach(self.module, ties, precision_bits=self.precision_bits, **self._told_bits(configuration))
        refuse_saving_unread(self.module)
        return_free_memory()
        return self.module

    def _told_bits(self, configuration):
        """{avg_bits} of all weights, where some stay float: packed layers tell their own."""
        if FLOAT not in configuration.values():
            return {}
        free = {key: configuration[key] for key in free_keys(self.slots)}
        description = config.describe(free, self.slots, self.entries, self.precision_bits)
        return {"avg_bits": round(config.avg_bits(description, self.precision_bits), 4)}

    def _ties(self):
        """{path of a layer: path of the layer whose weights it shares}."""
        return {key.path: tie.path for key, tie in ties_of(self.slots).items() if key != tie}

    def describe(self, configuration):
        """{key: [method, bytes at P, quantized bytes with overhead, error]} of a configuration, fitted where need be."""
        configuration = self.configuration(configuration)
        for key, method in configuration.items():
            self.parameters(key, method)
        return config.describe(configuration, self.slots, self.entries, self.precision_bits)

    def avg_bits(self, configuration):
        """Average bits per weight of a configuration, scales and codebooks counted."""
        return config.avg_bits(self.describe(configuration), self.precision_bits)

    def _bar(self, items, description, show, total=None):
        options = {"unit": "weight", "leave": False, "delay": SHOWN_AFTER_SECONDS, "disable": not show}
        return tqdm(items, desc=description, total=total, **options)


def _refuse_fused(denoiser, slots):
    """InputError for a layer that diffusers made of others: a saved model names it, and a new one does not have it."""
    names = denoiser.state_dict().keys()
    fused = next((slot.module_path for slot in slots.values() if is_fused(slot.module_path, names)), None)
    if fused:
        raise InputError(f"{fused}: is made of other layers by fuse_qkv_projections; unfuse them, or load the model again")


def _drained(items):
    """The items of a list in turn, each let go by it."""
    items.reverse()
    while items:
        yield items.pop()
