"""The multiquantizer of the six real geometries: fitting, its file, loading it, applying configurations.

    python -m benchmarks.footprint [--device cuda] [--machine h100] [pixart_alpha ...]

Heavy-tailed random weights (benchmarks/weights.py) in each family's precision. Each family is measured in a
process of its own: seconds to fit all six quantizers of all weights and write the file; peak memory beyond the
weights, interpreter and libraries included (on a GPU: of its memory); bytes of the file and of the published
format; seconds to load the file, which checks that it belongs to these weights, to apply a random
configuration, and to go on to one that differs in a tenth of the slots. Run it where nothing else runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.machine import finish, peak_memory, reset_peak_memory, write_result
from benchmarks.weights import random_denoiser
from models.components import quiet_loading
from models.families import FAMILIES
from models.pipelines import compute_dtype, pick_device
from quant import config, multiquantizer, published, registry
from quant.model import QuantizedModel


def measure(name, device):
    """One family's figures, in this process."""
    family, denoiser = FAMILIES[name], random_denoiser(name).to(device)
    registry.fit(torch.eye(2, 4, dtype=family.dtype, device=device))  # compile, which is no part of fitting
    float_model = QuantizedModel(denoiser, **family.quantization)
    weight_bytes = sum(p.nbytes for p in denoiser.parameters())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mq.pt"
        reset_peak_memory(device)
        fit_seconds = timed(device, lambda: multiquantizer.build(float_model, path))
        peak = peak_memory(device)
        with quiet_loading():
            denoiser.to(compute_dtype(family, device))
        loaded = []
        load_seconds = timed(device, lambda: loaded.append(multiquantizer.load(path, float_model)))
        file_bytes = path.stat().st_size
    (model,) = loaded
    slots = model.slots
    first = config.draw_random(slots, seed=0, index=0)
    changed = {key: next(m for m in registry.SEARCH_SPACE if m != first[key]) for key in list(first)[::10]}
    second = first | {slot.key: changed[slot.tie] for slot in slots.values() if slot.tie in changed}
    weights = sum(slot.shape.numel() for slot in slots.values() if slot.tie == slot.key)
    return {
        "family": name,
        "weights": weights,
        "fit_seconds": round(fit_seconds, 1),
        "weights_per_second": round(weights / fit_seconds),
        "peak_gb_beyond_weights": round((peak - weight_bytes) / 1e9, 2),
        "file_bytes": file_bytes,
        "published_bytes": published.file_bytes(model),
        "load_seconds": round(load_seconds, 2),
        "apply_seconds": round(timed(device, lambda: model.apply(first)), 2),
        "switch_seconds": round(timed(device, lambda: model.apply(second)), 2),
    }


def timed(device, procedure):
    start = time.perf_counter()
    procedure()
    finish(device)
    return time.perf_counter() - start


def measure_all(names, device):
    """The lines of all families, each from a process of its own, printed as they come."""
    print(
        f"{'family':<14}{'weights':>15}{'fit':>9}{'rate':>11}{'memory':>10}{'file':>10}{'published':>11}{'smaller':>9}"
        f"{'load':>9}{'apply':>9}{'switch':>9}"
    )
    lines = []
    for name in names:
        command = [sys.executable, "-m", "benchmarks.footprint", "--device", device, "--alone", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        line = json.loads(done.stdout.splitlines()[-1])
        lines.append(line)
        smaller = line["published_bytes"] / line["file_bytes"]
        print(
            f"{name:<14}{line['weights']:>15,}{line['fit_seconds']:>7.1f} s{line['weights_per_second'] / 1e6:>7.1f} M/s"
            f"{line['peak_gb_beyond_weights']:>7.2f} GB{line['file_bytes'] / 1e6:>7.1f} MB"
            f"{line['published_bytes'] / 1e9:>8.2f} GB{smaller:>8.0f}x{line['load_seconds']:>7.2f} s"
            f"{line['apply_seconds']:>7.2f} s{line['switch_seconds']:>7.2f} s",
            flush=True,
        )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("families", nargs="*", help="default: all six")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--machine", default="cpu", help="name of the machine in the result's file name")
    parser.add_argument("--alone", action="store_true", help="measure in this process and print JSON alone")
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.families[0], pick_device(args.device))))
    else:
        write_result(f"footprint_{args.machine}", {"families": measure_all(args.families or list(FAMILIES), args.device)})


if __name__ == "__main__":
    main()
