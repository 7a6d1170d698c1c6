"""Memory, speed and error of low-bit denoisers of real size beside full precision and other programs', in one run.

    pip install -e '.[peers]'
    python -m benchmarks.low_bit [--geometries pixart_alpha sdxl] [--arms mse-4 sdnq] [--batches 2 8]
    python -m benchmarks.low_bit --tune    # on a GPU: choose kernels by what is measured (quant/kernels/shapes.py)

Random weights of the real denoisers' geometry (see benchmarks/low_bit_arms.py for the arms). Each arm is written to a folder
by one process and loaded from there by another: bytes on the disk (in bits, of half precision's 16), seconds to load, bytes
that the denoiser takes, their peak over a denoising step, milliseconds of a step (the median of repeats, after warming up),
and the relative difference of the step's output to full precision's. On a GPU a step is timed as it is called and as a
captured CUDA graph, and the peak of a step and the autoencoder's decoding together is told, which is what a pipeline takes
once its text encoders are released. On a CPU, bytes are those of the process beyond what it was before loading. Ratios are
to full precision in the same dtype. Run it where nothing else runs. Writes benchmarks/results/low_bit_<machine>.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel

from benchmarks.low_bit_arms import ARMS, load, write, write_float
from benchmarks.low_bit_tune import tune
from benchmarks.machine import finish, installed_version, peak_memory, reset_peak_memory, status_bytes, write_result
from benchmarks.real_parts import VAE
from errors import first_line
from models import geometry
from models.families import FAMILIES
from models.inputs import map_tensors
from quant.kernels import shapes

ROOT = Path(__file__).parent.parent
ON_GPU = {"pixart_alpha": 512, "pixart_sigma": 1024, "hunyuan": 1024, "sdxl": 1024, "sdv15": 512}  # pixels
ON_CPU = {"pixart_alpha": 512}
PEERS = ("sdnq", "bitsandbytes", "torchao", "gguf")


@torch.no_grad()
def measure(name, arm, folders, dtype, device, batches, repeats):
    """The figures of an arm's folder, in this process."""
    load_small(dtype, device)  # what importing takes is not what loading takes
    before, start = used_memory(device), time.perf_counter()
    denoiser = load(name, arm, folders["float"], folders["arm"], dtype, device).eval()
    finish(device)
    figures = {"load_seconds": round(time.perf_counter() - start, 2), "steps": []}
    for batch in batches:
        reset_peak_memory(device)
        figures["steps"].append({"batch": batch, **step(name, denoiser, folders["output"], batch, device, repeats)})
        figures["steps"][-1]["peak_bytes"] = peak_memory(device) - before
        figures.setdefault("bytes", used_memory(device) - before)  # after a step, as a CPU reads files when it needs them
        if device.type == "cuda":
            figures["steps"][-1] |= on_gpu(name, denoiser, batch, before, repeats)
    return figures


def load_small(dtype, device):
    small = PixArtTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, caption_channels=8)
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        PixArtTransformer2DModel.from_pretrained(folder, dtype=dtype).to(device)


def step(name, denoiser, outputs, batch, device, repeats):
    """Milliseconds of a step, and the difference of its output to full precision's, which the first arm writes down."""
    inputs = example(name, denoiser, batch, device)
    output = denoiser(**inputs, return_dict=False)[0].float().cpu()
    milliseconds = timed(lambda: denoiser(**inputs, return_dict=False), device, repeats)
    reference = Path(outputs) / f"{batch}_{denoiser.dtype}.pt"
    if not reference.exists():
        torch.save(output, reference)
    wanted = torch.load(reference, weights_only=True)
    return {"ms": milliseconds, "relative_error": round(((output - wanted).norm() / wanted.norm()).item(), 5)}


def on_gpu(name, denoiser, batch, before, repeats):
    """Milliseconds of a step as a captured CUDA graph; the peak of a step and the autoencoder's decoding."""
    inputs = example(name, denoiser, batch, torch.device("cuda"))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            denoiser(**inputs, return_dict=False)
    torch.cuda.current_stream().wait_stream(stream)
    figures, graph = {}, torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            denoiser(**inputs, return_dict=False)
        figures["graph_ms"] = timed(graph.replay, torch.device("cuda"), repeats)
    except RuntimeError as reason:
        figures["graph_error"] = first_line(reason)
    del graph
    torch.cuda.empty_cache()
    with torch.device("cuda"):
        autoencoder = AutoencoderKL(**VAE).half()
        reset_peak_memory(torch.device("cuda"))
        latents = denoiser(**inputs, return_dict=False)[0][:1, :4]
        autoencoder.decode(latents.half())
    return figures | {"pipeline_peak_bytes": peak_memory(torch.device("cuda")) - before}


def example(name, denoiser, batch, device):
    torch.manual_seed(0)
    pixels = min((ON_GPU | ON_CPU)[name] // 8, denoiser.config.sample_size)
    inputs = geometry.example_inputs(name, denoiser, batch=batch, pixels=pixels)
    return map_tensors(lambda tensor: tensor.to(device), inputs)


def timed(procedure, device, repeats):
    """Milliseconds of a call, the median of `repeats` after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        finish(device)
        start = time.perf_counter()
        procedure()
        finish(device)
        seconds.append(time.perf_counter() - start)
    return round(1000 * statistics.median(seconds[1:]), 3)


def used_memory(device):
    """Bytes that the GPU's tensors take; or this process, pages of mapped files that it has read included."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    return status_bytes("VmRSS")


def run_arm(name, key, folders, args, dtype):
    """An arm written by one process and measured in another; or why not."""
    arm = ARMS[key]
    if arm.only_cuda and args.device == "cpu":
        return {"error": "needs a GPU"}
    settings = {"name": name, "arm": key, "folders": folders, "dtype": dtype, "device": args.device}
    settings |= {"batches": args.batches, "repeats": args.repeats}
    figures = {}
    if not Path(folders["arm"]).exists():
        figures = child("write", settings)
    if "error" not in figures or ARMS[key].peer:  # what cannot be written may still be made at loading
        figures = {"write_error": figures.pop("error"), **figures} if "error" in figures else figures
        figures |= child("measure", settings)
    return figures


def child(task, settings):
    command = [sys.executable, "-m", "benchmarks.low_bit", "--child", task, json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"error": first_line((done.stderr.strip().splitlines() or ["no reason"])[-1])}
    return json.loads(done.stdout.splitlines()[-1])


def be_child(task, settings):
    arm, folders, device = ARMS[settings["arm"]], settings["folders"], torch.device(settings["device"])
    if task == "write":
        write(settings["name"], arm, folders["float"], folders["arm"], device)
        figures = {}
    else:
        dtype = getattr(torch, settings["dtype"])
        figures = measure(settings["name"], arm, folders, dtype, device, settings["batches"], settings["repeats"])
    print(json.dumps(figures))


def size_of(folder):
    return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) or None


def show(line, base):
    """Print one arm's line; ratios to `base`, full precision's."""
    if "error" in line:
        print(f"{line['title']:<38}{line['dtype']:<10}does not run: {line['error']}", flush=True)
        return
    for of, step in zip(base["steps"], line["steps"], strict=True):
        graph = f"{step['graph_ms']:>10.1f}" if "graph_ms" in step else f"{'-':>10}"
        disk = f"{line['disk_bytes'] / 1e6:>9.0f}" if line["disk_bytes"] else f"{'-':>9}"
        bits = f"{16 * line['disk_bytes'] / base['disk_bytes']:>7.2f}" if line["disk_bytes"] else f"{'-':>7}"
        print(
            f"{line['title']:<38}{line['dtype']:<10}{step['batch']:>6}{bits}{disk}{line['load_seconds']:>8.2f}"
            f"{line['bytes'] / 1e6:>9.0f}{line['bytes'] / base['bytes']:>7.3f}{step['peak_bytes'] / 1e6:>9.0f}"
            f"{step['ms']:>11.1f}{step['ms'] / of['ms']:>7.3f}{graph}{step['relative_error']:>9.4f}",
            flush=True,
        )


def compare(name, args, keep):
    """The lines of one geometry, printed as they come."""
    print(f"\n{FAMILIES[name].title}, {(ON_GPU | ON_CPU)[name]} px")
    print(
        f"{'':<38}{'dtype':<10}{'batch':>6}{'bits':>7}{'disk MB':>9}{'load s':>8}{'MB':>9}{'ratio':>7}{'peak MB':>9}"
        f"{'ms':>11}{'ratio':>7}{'graph ms':>10}{'error':>9}"
    )
    work = Path(keep) / name
    folders = {each: str(work / each) for each in ("float", "output")}
    work.mkdir(parents=True, exist_ok=True)
    Path(folders["output"]).mkdir(exist_ok=True)
    if not (work / "float").exists():
        write_float(name, folders["float"], **({"num_layers": args.layers} if args.layers else {}))
    lines = []
    for dtype in args.dtypes:
        base = None
        for key in dict.fromkeys(("float", *args.arms)):
            figures = run_arm(name, key, folders | {"arm": str(work / key)}, args, dtype)
            disk = size_of(folders["float"] if key == "float" else work / key)
            line = {"geometry": name, "arm": key, "title": ARMS[key].title, "dtype": dtype, "disk_bytes": disk} | figures
            base = base or line
            if "error" in base:
                sys.exit(f"full precision does not run: {base['error']}")
            show(line, base)
            lines.append(line)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--geometries", nargs="+", choices=list(ON_GPU), default=list(ON_GPU if has_gpu else ON_CPU))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if has_gpu else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float16"] if has_gpu else ["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 8] if has_gpu else [2])
    parser.add_argument("--repeats", type=int, default=10 if has_gpu else 3)
    parser.add_argument("--machine", default="cuda" if has_gpu else "cpu", help="name in the result's file name")
    parser.add_argument("--layers", type=int, help="blocks of a transformer instead of all, for a quick look")
    parser.add_argument("--folder", help="keep the written models here, and use those that it has")
    parser.add_argument("--tune", action="store_true", help="measure which kernels packed layers are to take on this GPU")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        be_child(args.child[0], json.loads(args.child[1]))
        return
    if args.tune:
        device = torch.device(args.device)
        if device.type != "cuda":
            sys.exit("--tune: is for a GPU; a CPU has one way")
        ways = tune(args.geometries, args.batches, ON_GPU, device, lambda call: timed(call, device, args.repeats))
        shapes.save(ways)
        print(shapes.path())
        return
    if args.device == "cpu":
        print("No GPU: the part of a CPU. Not measured: CUDA graphs, memory of a GPU, torchao int4.")
    with tempfile.TemporaryDirectory() as temporary:
        lines = []
        for name in args.geometries:
            lines += compare(name, args, args.folder or temporary)
            result = {
                "threads": torch.get_num_threads(),
                "peers": {name: installed_version(name) for name in PEERS},
                "lines": lines,
            }
            if args.device == "cuda":
                result |= {"capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda}
            write_result(f"low_bit_{args.machine}", result)


if __name__ == "__main__":
    main()
