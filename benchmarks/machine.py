"""What a figure was measured on, and where it is kept."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def describe_machine():
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numba", "numpy", "scikit-learn", "diffusers")}
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "gpu": gpu, "python": platform.python_version(), **versions}


def installed_version(name):
    """Version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_result(name, result):
    """Write `benchmarks/results/<name>.json`, the machine included."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": describe_machine(), **result}, indent=1) + "\n")
    print(path)


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux


def peak_memory(device):
    """Bytes at the peak since the last reset: of the GPU's tensors, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return status_bytes("VmHWM")


def status_bytes(name):
    """A line of this process' status: RssAnon is what it holds of its own, VmRSS with pages of mapped files that it has
    read, VmHWM all that it has held at most.
    """
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def finish(device):
    """Wait until a GPU has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
