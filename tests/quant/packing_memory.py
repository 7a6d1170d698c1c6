"""Load a denoiser in half precision and pack it, as the infer scripts do where nothing is compared.

    python packing_memory.py FOLDER

Prints as JSON the bytes that this takes of the host's memory: at the peak, and once it is done.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

from models.families import FAMILIES
from quant.model import QuantizedModel
from quant.slots import find_slots


def bytes_of(name):
    """A line of this process' status: VmRSS is what it holds, VmHWM what it has held at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def pack(denoiser):
    """Under UAQ at 4 bits; that its parameters suit the weights is of no matter here."""
    family = FAMILIES["dit"]
    slots = find_slots(denoiser, family.slot_rules)
    entries = {}
    for key, slot in slots.items():
        scale, zero_point = torch.full(slot.shape[:1], 0.01).half(), torch.full(slot.shape[:1], 7).to(torch.int8)
        entries[key] = {"parameters": {"mse-4": {"scale": scale, "zero_point": zero_point}}}
    QuantizedModel.of_slots(denoiser, slots, family.dtype, entries).pack("mse-4")
    torch.nn.Module.to(denoiser, torch.float32)  # what is not packed lets go of the file, as in computing on a CPU


def main(folder):
    pack(DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1).half())  # loads what it needs
    before = bytes_of("VmRSS")
    denoiser = DiTTransformer2DModel.from_pretrained(folder, dtype=torch.float16)
    pack(denoiser)
    print(json.dumps({"peak": bytes_of("VmHWM") - before, "stays": bytes_of("VmRSS") - before}))


if __name__ == "__main__":
    main(sys.argv[1])
