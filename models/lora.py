"""LoRA adapters (Hu et al., 2022) fused into a model's weights before anything is done with them.

Files of diffusers, of PEFT and, for U-Nets, of kohya's and AUTOMATIC1111's programs are read. A weight W becomes
W + scale x alpha / r x B A, computed in float32 and rounded to W's precision once for all adapters.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import diffusers
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file

from errors import InputError, first_line, shown
from models.components import DENOISERS, TEXT_ENCODERS, one_line
from models.repository import not_fetched

NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # of a safetensors file that diffusers wrote
OTHER_KINDS = re.compile(r"dora_scale|lora_magnitude_vector|hada_w|lokr_w|lora_mid|lora_B\.bias|diff_b|\.diff$|oft_")
# How a key ends: PEFT's lora_A and lora_B, diffusers' old lora.down and lora_linear_layer.up, kohya's lora_down.
KIND = re.compile(
    r"\.(?:lora_([AB])(?:\.\w+)?\.weight|(?:lora_linear_layer\.|lora\.)?(down|up)\.weight|lora_(down|up)\.weight|alpha)$"
)
OLD_PROJECTION = re.compile(r"\.(?:processor\.)?(to_[qkv]|to_out)_lora\.")
PLAIN_PATTERN = re.compile(r"[\w.^$|*\\-]{1,200}")  # of alpha_pattern: nothing that takes long to match
PROJECTIONS = {"to_out": "to_out.0"}
TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Lora(NamedTuple):
    """An adapter: what the user named, its file and its scale."""

    source: str
    path: Path
    scale: float

    @property
    def key(self):
        """What labels made with it depend on: its scale and a hash of its file."""
        with self.path.open("rb") as file:
            return f"{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}:{self.scale:g}"

    @property
    def name(self):
        """For file names."""
        stem = self.path.stem if self.path.name not in NAMES else Path(self.source).name
        return re.sub(r"[^\w.-]", "_", stem) + ("" if self.scale == 1 else f"@{self.scale:g}")


class Update(NamedTuple):
    """What an adapter adds to a weight [C, ...]: factor x B A."""

    down: torch.Tensor  # A [r, ...]
    up: torch.Tensor  # B [C, r, ...]
    factor: float


def open_lora(text):
    """The Lora that `--lora PATH_OR_ID[:scale]` names; of a Hub id its file is fetched."""
    source, colon, number = str(text).rpartition(":")
    scale = 1.0
    if colon and source:
        try:
            scale = float(number)
        except ValueError:
            source = str(text)
    else:
        source = str(text)
    if not math.isfinite(scale):
        raise InputError(f"--lora {text}: the scale must be an ordinary number")
    return Lora(source, _file_of(source), scale)


def _file_of(source):
    path = Path(source or "an empty name")
    if path.is_file():
        return path
    if not path.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            raise InputError(f"--lora {source}: no such file or folder, and no Hub id either")
        try:
            path = Path(snapshot_download(source, allow_patterns=["*.safetensors", CONFIG]))
        except Exception as reason:  # as many types as the network has
            raise InputError(f"--lora: {not_fetched(source, reason)}") from None
    files = [path / name for name in NAMES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if len(files) != 1 and not (files and files[0].name in NAMES):
        found = ", ".join(file.name for file in files) or "none"
        raise InputError(f"--lora {source}: which of its .safetensors files is meant? Name one (there: {found})")
    return files[0]


def fuse(loras, components, pipeline_class_name, configurations):
    """Fuse all adapters into those `components` {name: module} that they are for.

    `configurations` {name: dict} has the configuration of every component of the pipeline, loaded or not. InputError if an
    adapter is of another kind or model.
    """
    updates = {}
    for lora in loras:
        with one_line(lora.path, "adapter"):
            found = read(lora, pipeline_class_name, configurations)
        for (component, path), update in found.items():
            if component in components:
                updates.setdefault((component, path), []).append((lora, update))
    for (component, path), several in updates.items():
        with one_line(" or ".join(str(lora.path) for lora, _ in several), "adapter"):
            _fuse_weight(components[component], component, path, several)


@torch.no_grad()
def _fuse_weight(module, component, path, several):
    """Add what the adapters say of one weight."""
    layers = dict(module.named_modules())
    layer = layers.get(path, layers.get(path.removeprefix("text_model.")))
    weight = getattr(layer, "weight", None)
    total = None if weight is None else weight.float()
    for lora, update in several:
        product = update.up.float().flatten(1) @ update.down.float().flatten(1)  # [C, n]
        if weight is None or product.numel() != weight.numel() or len(product) != len(weight):
            raise InputError(
                f"{lora.path}: is of another model: it has {path}, which this {component} has not in that shape"
            )
        total = total + update.factor * product.view(weight.shape).to(weight.device)
    if not total.isfinite().all():
        raise InputError(f"{several[0][0].path}: makes values of {component}.{path} that are not numbers")
    weight.copy_(total)


def read(lora, pipeline_class_name, configurations):
    """{(component, module path): Update} of an adapter's file; InputError if it is none that is read here."""
    state, metadata = _load(lora.path)
    if not state or (other := next(filter(OTHER_KINDS.search, state), None)):
        what = f"has {other}, of a kind of adapter that is not fused here" if state else "is empty"
        raise InputError(f"{lora.path}: {what}; merge it into the model with the program that made it")
    pipeline_class = getattr(diffusers, pipeline_class_name)
    denoiser = next(name for name in configurations if name in DENOISERS)
    alphas = None
    if hasattr(pipeline_class, "lora_state_dict"):
        try:
            state, alphas = pipeline_class.lora_state_dict(
                dict(state), unet_config=SimpleNamespace(**configurations[denoiser])
            )
        except (ValueError, KeyError, RuntimeError, AttributeError) as reason:
            raise InputError(f"{lora.path}: not a LoRA of this model ({first_line(reason)})") from None
    names = [*(name for name in TEXT_ENCODERS if name in configurations), denoiser]
    found = {}
    for component, weights in _by_component(state, names, denoiser).items():
        for path, (down, up, alpha) in _pairs(lora, component, weights, alphas or {}).items():
            factor = lora.scale * _factor(path, len(down), alpha, metadata, component)
            found[component, path] = Update(down, up, factor)
    if not found:
        raise InputError(f"{lora.path}: holds no LoRA weights (first {next(iter(state))})")
    return found


def _load(path):
    """The tensors of an adapter's file, and what it or the configuration beside it says of their scale."""
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: LoRA files are read as .safetensors alone")
    try:
        state = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except Exception as reason:  # damaged files raise many types
        raise InputError(f"{path}: not a readable .safetensors file ({first_line(reason)})") from None
    beside = path.parent / CONFIG
    if beside.is_file() and path.name == NAMES[1]:
        try:
            metadata = json.loads(beside.read_text())
        except (ValueError, RecursionError) as reason:
            raise InputError(f"{beside}: not readable JSON ({first_line(reason)})") from None
        if not isinstance(metadata, dict):
            raise InputError(f"{beside}: not a JSON object")
        if metadata.get("use_dora") or metadata.get("peft_type", "LORA") != "LORA":
            raise InputError(f"{beside}: not of a plain LoRA; merge it into the model with the program that made it")
    return state, metadata


def _by_component(state, names, denoiser):
    """{component: {key below it: tensor}}; keys that name no component are the denoiser's."""
    by_component = {}
    for key, tensor in state.items():
        key = key.removeprefix("base_model.model.").removeprefix("diffusion_model.")
        component = next((name for name in names if key.startswith(f"{name}.")), None)
        below = key if component is None else key.removeprefix(f"{component}.")
        by_component.setdefault(component or denoiser, {})[below] = tensor
    return by_component


def _pairs(lora, component, weights, alphas):
    """{module path: (A, B, alpha or None)} of a component's weights, whatever convention names them."""
    named = {}  # (module path, "A" or "B" or "alpha") -> tensor
    for key, tensor in weights.items():
        path, kind = _parsed(key, component)
        if kind is None:
            raise InputError(f"{lora.path}: {key} is no LoRA weight; merge it with the program that made it")
        named[path, kind] = tensor
        if f"{component}.{key}.alpha" in alphas:
            named[path, "alpha"] = alphas[f"{component}.{key}.alpha"]
    pairs = {}
    for path in dict.fromkeys(path for path, _ in named):
        if (path, "A") not in named or (path, "B") not in named:
            raise InputError(f"{lora.path}: has one of the two weights of {path} alone; fetch it again")
        alpha = named.get((path, "alpha"))
        pairs[path] = named[path, "A"], named[path, "B"], None if alpha is None else float(alpha)
    return pairs


def _parsed(key, component):
    """(module path, "A", "B" or "alpha") of an adapter's key; (key, None) if it is none."""
    projections = TEXT_PROJECTIONS if component in TEXT_ENCODERS else PROJECTIONS
    key = OLD_PROJECTION.sub(lambda match: f".{projections.get(match[1], match[1])}.", key)
    match = KIND.search(key)
    if not match:
        return key, None
    kind = {"A": "A", "down": "A", "B": "B", "up": "B"}.get(match[1] or match[2] or match[3], "alpha")
    return key[: match.start()], kind


def _factor(path, rank, alpha, metadata, component):
    """alpha / r of a weight, alpha being r where nothing is said (alpha / sqrt(r) of rank-stabilised adapters)."""
    said = metadata
    if any(name.startswith(f"{component}.") for name in metadata):
        said = {name.removeprefix(f"{component}."): value for name, value in metadata.items()}
    if alpha is None:
        alpha = said.get("lora_alpha") or rank
        for pattern, value in (said.get("alpha_pattern") or {}).items():
            if not PLAIN_PATTERN.fullmatch(pattern):
                raise InputError(f"{component}: the adapter's alpha_pattern {shown(pattern)} is none that is read here")
            if re.search(rf"(^|\.)(?:{pattern.lstrip('^')})$", path):
                alpha = value
    return alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)
