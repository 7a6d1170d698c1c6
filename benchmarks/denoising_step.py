"""One denoising step of each family at its real size and resolution, on random weights.

    python -m benchmarks.denoising_step

Float, then all weights under UAQ at 4 bits, then with activations at 8 and at 6 bits: seconds per
step for one image with guidance (batch 2), peak GPU memory, and the relative change of the output.
"""

import argparse
import gc
import time

import torch

from benchmarks.machine import finish, write_result
from models import geometry
from models.families import FAMILIES
from quant.activations import set_activation_bits
from quant.model import QuantizedModel


def timed_step(denoiser, inputs, repeats):
    """The output and mean seconds of a step, after one to warm up."""
    out = denoiser(**inputs, return_dict=False)[0].float()
    finish(out.device)
    start = time.perf_counter()
    for _ in range(repeats):
        denoiser(**inputs, return_dict=False)
    finish(out.device)
    return out, (time.perf_counter() - start) / repeats


@torch.no_grad()
def measure(name, device, dtype, repeats):
    """A line per setting of one family."""
    family = FAMILIES[name]
    gc.collect()  # the denoiser before: its layers and their parts refer to one another
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    with device:
        denoiser = geometry.build(name).to(dtype).eval()
        pixels = min(family.resolution // 8, denoiser.config.sample_size)
        inputs = geometry.example_inputs(name, denoiser, batch=2, pixels=pixels)
    original, seconds = timed_step(denoiser, inputs, repeats)
    yield line(name, "full precision", seconds, 0.0)
    QuantizedModel(denoiser, **family.quantization).apply("mse-4")
    for bits in (None, 8, 6):
        set_activation_bits(denoiser, bits)
        out, seconds = timed_step(denoiser, inputs, repeats)
        change = ((out - original).norm() / original.norm()).item()
        yield line(name, "UAQ 4 bit" + (f", activations {bits} bit" if bits else ""), seconds, change)


def line(name, setting, seconds, change):
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    result = {"family": name, "setting": setting, "seconds": round(seconds, 4), "relative_change": round(change, 4)}
    print(f"{name:<14}{setting:<32}{seconds:>9.4f} s{change:>9.4f}", flush=True)
    return result | ({"peak_gpu_bytes": peak} if peak else {})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--machine", default="cpu", help="name of the machine in the result's file name")
    args = parser.parse_args()
    device = torch.device(args.device)
    lines = []
    for name in args.families:
        lines += measure(name, device, torch.float32 if device.type == "cpu" else FAMILIES[name].dtype, args.repeats)
        write_result(f"denoising_step_{args.machine}", {"batch": 2, "lines": lines})


if __name__ == "__main__":
    main()
