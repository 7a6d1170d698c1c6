"""What loading a packed denoiser takes: PixArt-alpha at real size, 610 M weights, random ones.

    python -m benchmarks.loading

Prints a table and writes it to benchmarks/results/loading_cpu.json: bytes of the file, seconds of `from_pretrained` in a
process of its own, and the host's memory that is new while it runs. Memory that only maps the file is counted apart, as
the system can let go of it at any time. Quantizers have made-up tables, since what they are is of no matter here.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel

from benchmarks.machine import status_bytes, write_result
from models import geometry
from models.families import FAMILIES
from quant.layers import weight_bytes
from quant.model import QuantizedModel
from quant.slots import find_slots

FAMILY = "pixart_alpha"
ROOT = Path(__file__).parent.parent
WEIGHTS = "diffusion_pytorch_model.safetensors"
MIB = 2**20


def pack(denoiser):
    """Under UAQ at 4 bits, with tables that suit no weight."""
    slots = find_slots(denoiser, FAMILIES[FAMILY].slot_rules)
    entries = {}
    for key, slot in slots.items():
        channels = slot.shape[:1]
        tables = {"scale": torch.full(channels, 0.01).half(), "zero_point": torch.full(channels, 7).to(torch.int8)}
        entries[key] = {"parameters": {"mse-4": tables}}
    QuantizedModel.of_slots(denoiser, slots, torch.float16, entries).pack("mse-4", show=False)


def write(folder, **changes):
    """Write a packed PixArt with random weights: its bytes in half precision, and those of the packed weights.

    `changes` are of its geometry.
    """
    torch.manual_seed(0)
    denoiser = geometry.build(FAMILY, **changes).half()
    half_bytes = sum(parameter.nbytes for parameter in denoiser.parameters())
    pack(denoiser)
    denoiser.save_pretrained(folder)
    return half_bytes, weight_bytes(denoiser)


def load(folder):
    """Load the folder in this process: {load_seconds, new_bytes, new_bytes_with_mapped}."""
    small = PixArtTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, caption_channels=8)
    pack(small.half())
    with tempfile.TemporaryDirectory() as once:  # what loading imports is not what it takes
        small.save_pretrained(once)
        PixArtTransformer2DModel.from_pretrained(once, dtype=torch.float16)
    own, mapped, start = status_bytes("RssAnon"), status_bytes("VmRSS"), time.perf_counter()
    denoiser = PixArtTransformer2DModel.from_pretrained(folder, dtype=torch.float16)
    seconds = time.perf_counter() - start
    new = status_bytes("RssAnon") - own
    peak = max(status_bytes("VmHWM") - mapped, 0)
    assert denoiser.dtype == torch.float16
    return {"load_seconds": round(seconds, 3), "new_bytes": new, "peak_bytes_with_mapped": peak}


def measure(folder, **changes):
    """Write and, in a process of its own, load: a dictionary of all figures."""
    half_bytes, packed_bytes = write(folder, **changes)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loading", "--load", folder], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    loaded = json.loads(done.stdout.splitlines()[-1])
    file_bytes = (Path(folder) / WEIGHTS).stat().st_size
    return {
        "model": FAMILY,
        "half_precision_bytes": half_bytes,
        "packed_weight_bytes": packed_bytes,
        "file_bytes": file_bytes,
        **loaded,
        "new_of_half_precision": round(loaded["new_bytes"] / half_bytes, 4),
    }


def show(figures):
    for name, value in figures.items():
        print(f"{name:24} {f'{value / MIB:,.1f} MiB' if 'bytes' in name else value}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", metavar="FOLDER", help="load this folder alone and print what it takes as JSON")
    folder = parser.parse_args().load
    if folder:
        print(json.dumps(load(folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(folder)
    show(figures)
    write_result("loading_cpu", figures)


if __name__ == "__main__":
    main()
