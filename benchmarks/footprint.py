"""Bytes of a multiquantizer file beside the published format, on DiT-XL/2's own geometry.

    python -m benchmarks.footprint

Builds the file for random half-precision weights (see benchmarks/fit.py) of the real shapes, layer
by layer, and reads it back.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.fit import heavy_tailed
from benchmarks.machine import write_result
from models import geometry
from models.families import FAMILIES
from models.layers import find_slots, free_keys
from quant import multiquantizer, published
from quant.storage import load_checkpoint


def real_denoiser():
    """DiT-XL/2 in half precision with heavy-tailed random weights, its timestep embedders tied."""
    with torch.device("meta"):
        denoiser = geometry.build("dit")
    denoiser = denoiser.to(torch.float16).to_empty(device="cpu")
    slots = find_slots(denoiser, FAMILIES["dit"])
    for number, key in enumerate(free_keys(slots)):
        weight = denoiser.get_submodule(slots[key].module_path).weight
        weight.data.copy_(heavy_tailed(len(weight), weight[0].numel(), seed=number).view_as(weight))
    for slot in slots.values():
        shared = denoiser.get_submodule(slots[slot.tie].module_path).weight
        denoiser.get_submodule(slot.module_path).weight.data.copy_(shared.data)
    return denoiser


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--machine", default="cpu", help="name of the machine in the result's file name")
    args = parser.parse_args()
    family, denoiser = FAMILIES["dit"], real_denoiser()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dit_mq.pt"
        start = time.perf_counter()
        multiquantizer.build(denoiser, family, path)
        fit_seconds = time.perf_counter() - start
        start = time.perf_counter()
        load_checkpoint(path)
        load_seconds = time.perf_counter() - start
        own, theirs = path.stat().st_size, published.file_bytes(denoiser, family)
    print(f"{own:,} bytes; published format {theirs:,} bytes; {theirs / own:.1f} times smaller")
    print(f"all six quantizers fitted and stored in {fit_seconds:.0f} s, read in {load_seconds:.2f} s")
    result = {
        "geometry": "dit",
        "bytes": own,
        "published_bytes": theirs,
        "times_smaller": round(theirs / own, 1),
        "fit_seconds": round(fit_seconds, 1),
        "load_seconds": round(load_seconds, 2),
    }
    write_result(f"footprint_{args.machine}", result)


if __name__ == "__main__":
    main()
