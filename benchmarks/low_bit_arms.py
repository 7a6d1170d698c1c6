"""The denoisers that benchmarks/low_bit.py compares: full precision, this program's packed ones, and other programs'.

    pip install -e '.[peers]'

Each arm says how to write a folder from the float denoiser's and how to load that folder again. A program that saves
nothing of its own (GGUF, for denoisers without single files) is made anew from the float weights at each load.
"""

from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig
from torch import nn

from benchmarks.weights import random_denoiser
from models import geometry
from models.families import FAMILIES
from quant.activations import set_activation_bits
from quant.model import QuantizedModel
from quant.registry import SEARCH_SPACE, quantizer
from quant.slots import free_keys

MIXED_FOURS = 6  # of ten weights have 4 bits, which makes about 3.7 on average with scales and codebooks


@dataclass(frozen=True)
class Arm:
    """One way to hold and run a denoiser."""

    title: str
    method: str | None = None  # ours: a word, or "mixed"
    act_bits: int | None = None  # ours: bits of the activations
    simulated: bool = False  # ours: activations rounded in floating point
    peer: str | None = None
    options: dict = field(default_factory=dict)  # of the peer's configuration
    only_cuda: bool = False


ARMS = {
    "float": Arm("full precision"),
    "mse-4": Arm("UAQ, 4 bits", method="mse-4"),
    "kmeans-4": Arm("K-Means-C, 4 bits", method="kmeans-4"),
    "kmeans_all-4": Arm("K-Means-A, 4 bits", method="kmeans_all-4"),
    "mixed": Arm("all six mixed", method="mixed"),
    "mse-4-a8": Arm("UAQ, 4 bits, activations 8", method="mse-4", act_bits=8),
    "kmeans-4-a8": Arm("K-Means-C, 4 bits, activations 8", method="kmeans-4", act_bits=8),
    "kmeans_all-4-a8": Arm("K-Means-A, 4 bits, activations 8", method="kmeans_all-4", act_bits=8),
    "mixed-a8": Arm("all six mixed, activations 8", method="mixed", act_bits=8),
    "mse-4-a8-simulated": Arm("UAQ, 4 bits, activations 8 simulated", method="mse-4", act_bits=8, simulated=True),
    "sdnq": Arm("SDNQ uint4", peer="sdnq"),
    "sdnq-a8": Arm("SDNQ uint4, quantized product", peer="sdnq", options={"use_quantized_matmul": True}),
    "nf4": Arm("bitsandbytes NF4", peer="bitsandbytes"),
    "torchao-int8": Arm("torchao int8, weights only", peer="torchao", options={"bits": 8}),
    "torchao-int4": Arm("torchao int4, weights only", peer="torchao", options={"bits": 4}, only_cuda=True),
    "gguf": Arm("GGUF Q4_0", peer="gguf"),
}


def write_float(name, folder, **changes):
    """Write the family's denoiser with random weights of trained ones' spread, in half precision, to a folder.

    `changes` are of its geometry. Each layer is scaled so that its outputs are of its inputs' size, since the
    activations of random layers of a trained one's scale overflow half precision.
    """
    denoiser = random_denoiser(name, **changes).half()
    with torch.no_grad():
        for layer in denoiser.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.weight /= (layer.weight.float().std() * layer.weight[0].numel() ** 0.5).half()
            elif isinstance(layer, nn.GroupNorm | nn.LayerNorm) and layer.weight is not None:
                layer.weight.fill_(1)
    denoiser.save_pretrained(folder)


def write(name, arm, source, folder, device):
    """Write the arm's folder from the float one's at `source`, where the arm's program can."""
    if arm.peer not in (None, "gguf"):
        _of_peer(name, arm, source, torch.float16, device).save_pretrained(folder)
    if arm.method is None:
        return
    denoiser = _class(name).from_pretrained(source, dtype=torch.float16).to(device)
    model = QuantizedModel(denoiser, **FAMILIES[name].quantization | {"dtype": torch.float16})
    chosen = _mixed(model.slots) if arm.method == "mixed" else model.uniform(arm.method)
    model.pack(chosen)
    denoiser.save_pretrained(folder)


def load(name, arm, source, folder, dtype, device):
    """The arm's denoiser on `device`, computing in `dtype`."""
    written = (Path(folder) / "config.json").exists()
    if arm.peer == "gguf":
        return _gguf(_class(name).from_pretrained(source, dtype=dtype), dtype).to(device)
    if arm.peer and not written:
        return _of_peer(name, arm, source, dtype, device)
    denoiser = _class(name).from_pretrained(folder if written else source, dtype=dtype).to(device)
    if arm.act_bits:
        set_activation_bits(denoiser, arm.act_bits, simulated=arm.simulated)
    return denoiser


def _class(name):
    return getattr(diffusers, geometry.GEOMETRIES[name][0])


def _mixed(slots):
    """A configuration of all six quantizers in turn, 4 bits for six of ten weights."""
    three, four = ([word for word in SEARCH_SPACE if quantizer(word).bits == bits] for bits in (3, 4))
    chosen = {}
    for place, key in enumerate(free_keys(slots)):
        words = four if place % 10 < MIXED_FOURS else three
        chosen[key] = words[place % len(words)]
    return {key: chosen[slot.tie] for key, slot in slots.items()}


def _of_peer(name, arm, source, dtype, device):
    """Another program's denoiser, quantized as the float weights at `source` are read."""
    if arm.peer == "sdnq":
        from sdnq import SDNQConfig

        settings = SDNQConfig(weights_dtype="uint4", **arm.options)
    elif arm.peer == "bitsandbytes":
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

        settings = TorchAoConfig(Int8WeightOnlyConfig() if arm.options["bits"] == 8 else Int4WeightOnlyConfig())
    return _class(name).from_pretrained(source, dtype=dtype, quantization_config=settings).to(device)


def _gguf(denoiser, dtype):
    """The denoiser with diffusers' GGUF layers in place of its Linear ones, Q4_0 wherever rows are whole blocks of 32."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    kind = GGMLQuantizationType.Q4_0
    for path, layer in list(denoiser.named_modules()):
        if type(layer) is nn.Linear and layer.in_features % 32 == 0:
            new = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype)
            codes = torch.from_numpy(quantize(layer.weight.detach().float().numpy(), kind))
            new.weight, new.bias = GGUFParameter(codes, quant_type=kind), layer.bias
            denoiser.set_submodule(path, new)
    return denoiser
