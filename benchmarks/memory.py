"""What each family takes of the device's and the host's memory, stage by stage, reckoned from shapes.

    python -m benchmarks.memory [--measure] [pixart_alpha ...]

Weights count in the precision that the libraries load them in, activations of one step of the denoiser, and of a refiner's,
and of decoding one image as they run on the meta device (benchmarks/live_bytes.py), at the family's resolution and batch
size with guidance. Text encoders are asked and released before the rest is loaded, so they have a line of their own; where
they do not fit on a device they come there layer by layer. --pack is reckoned for UAQ at 4 bits. Weights on the host count
whether they are read or mapped from their files; the system drops mapped ones where it runs short. Not counted are what CUDA
keeps for itself (half a gigabyte) and scratch memory of its convolutions and, on the host, the program (a gigabyte).
--measure compares what is reckoned of the CPU with what is measured there (benchmarks/memory_check.py).
"""

import argparse
from typing import NamedTuple

import torch

from benchmarks import real_parts
from benchmarks.live_bytes import peak_bytes
from benchmarks.machine import write_result
from models import geometry
from models.families import FAMILIES
from models.pipelines import OFFLOADS, quiet_loading
from quant.pretrained import Qua2SeDiMoConfig, replace_by_empty
from quant.slots import find_slots

FIT_BYTES = 50  # per weight of the largest layer, while all six quantizers are fitted to it on an H100 (fit_h100.json)
INCEPTION_BYTES = 96_000_000  # what FID's features are computed with, in float32
STAGES = ("multiquantizer", "text encoders", "eval_random", "infer --no-pack", "infer --pack")
NOT_BY_LAYERS = ("hunyuan",)  # their pipelines keep the denoiser whole on the device


class Part(NamedTuple):
    """A model of a pipeline: bytes of its weights, of its largest layer, and of its activations at their peak."""

    weights: int
    layer: int
    activations: int = 0


def part_of(module, call=None):
    return Part(size_of(module), max(map(own_size, module.modules())), peak_bytes(module, call) if call else 0)


def size_of(module):
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def own_size(module):
    return sum(tensor.nbytes for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


class Pipeline(NamedTuple):
    """The parts of a family's pipeline in one precision; `quantizable` are the bytes of the weights that are quantized."""

    encoders: list
    denoiser: Part
    packed: Part | None  # the denoiser once packed
    others: list  # autoencoder, and refiner if there is one
    quantizable: int
    largest: int  # weights of the largest layer


def pipeline_of(family, dtype, denoiser, encoders, batch, pixels, packed=True):
    """The parts as they draw `batch` images at once. `denoiser`, on the meta device, ends up packed if that is asked."""
    with quiet_loading():
        denoiser = denoiser.to(dtype).eval()
    with torch.device("meta"):
        inputs = geometry.example_inputs(family.name, denoiser, batch=2 * batch, pixels=pixels // 8)
    slots = find_slots(denoiser, family.slot_rules)
    plain = part_of(denoiser, lambda: denoiser(**inputs))
    counts = [slot.shape.numel() for slot in slots.values()]
    if packed:
        pack(denoiser, slots)
    packed_part = part_of(denoiser, lambda: denoiser(**inputs)) if packed else None
    decoding = torch.float32 if family.name in real_parts.UPCAST_VAE else dtype
    vae = real_parts.autoencoder(decoding)
    latents = torch.empty(1, 4, pixels // 8, pixels // 8, dtype=decoding, device="meta")
    others = [part_of(vae, lambda: vae.decode(latents))]
    if family.refiner:
        refiner = real_parts.refiner(dtype)
        arguments = real_parts.refiner_inputs(2 * batch, pixels // 8, dtype)
        others.append(part_of(refiner, lambda: refiner(**arguments)))
    return Pipeline(encoders, plain, packed_part, others, sum(counts) * dtype.itemsize, max(counts))


def pack(denoiser, slots):
    """Pack a denoiser on the meta device under UAQ at 4 bits."""
    weights = {}
    for slot in slots.values():
        weights.setdefault(slot.module_path, []).append(["mse-4", slot.shape[1]])
    replace_by_empty(denoiser, Qua2SeDiMoConfig(weights=weights))


def real_pipeline(name, dtype=None, packed=True):
    """The family's real pipeline at its published settings, in its own precision by default."""
    family = FAMILIES[name]
    dtype = dtype or family.dtype
    with torch.device("meta"):
        denoiser = geometry.build(name)
    encoders = [part_of(real_parts.text_encoder(each, dtype)) for each in real_parts.ENCODERS_OF[name]]
    return pipeline_of(family, dtype, denoiser, encoders, family.batch_size, family.resolution, packed)


def on_device(parts, offload, whole=None):
    """Bytes at most while the parts work one after the other; the part `whole` is never taken layer by layer."""
    if offload == "none":
        return sum(part.weights for part in parts) + max(part.activations for part in parts)
    if offload == "model":
        return max(part.weights + part.activations for part in parts)
    return max((part.weights if part is whole else part.layer) + part.activations for part in parts)


def device_bytes(pipeline, stage, offload, by_layers=True):
    """Bytes of the device at the peak of a stage."""
    if stage == "multiquantizer":
        return pipeline.denoiser.weights + FIT_BYTES * pipeline.largest
    if stage == "text encoders":
        return on_device(pipeline.encoders, offload)
    denoiser = pipeline.packed if stage == "infer --pack" else pipeline.denoiser
    features = INCEPTION_BYTES if stage == "eval_random" else 0
    return features + on_device([denoiser, *pipeline.others], offload, None if by_layers else denoiser)


def host_bytes(pipeline, stage, offload):
    """Bytes of the host at the peak of a stage that computes on a GPU; weights come to the device through the host."""
    if stage == "multiquantizer":
        return pipeline.denoiser.weights
    if stage == "text encoders":
        return weights_of(pipeline.encoders)
    loaded = weights_of([pipeline.denoiser, *pipeline.others])
    if stage == "infer --pack":  # float weights go while codes come
        return loaded + pipeline.packed.weights
    if stage == "eval_random":  # what a weight was before it was quantized
        return max(loaded, pipeline.quantizable) if offload == "none" else loaded + pipeline.quantizable
    return loaded


def cpu_bytes(loaded, computing, stage):
    """Bytes of the host at the peak of a stage that computes on it: models are loaded in their own precision, then cast."""
    if stage == "multiquantizer":
        return loaded.denoiser.weights
    if stage == "text encoders":
        return weights_of([*loaded.encoders, *computing.encoders])
    parts = [computing.packed if stage == "infer --pack" else computing.denoiser, *computing.others]
    drawing = weights_of(parts) + max(part.activations for part in parts)
    drawing += loaded.quantizable if stage == "eval_random" else 0
    return max(weights_of([loaded.denoiser, *loaded.others, *parts]), drawing)


def weights_of(parts):
    return sum(part.weights for part in parts)


def reckon(name):
    """Lines of a family, one per stage."""
    own, computing = real_pipeline(name), real_pipeline(name, torch.float32)
    for stage in STAGES:
        if stage == "text encoders" and not own.encoders:
            continue
        ways = ("none",) if stage == "multiquantizer" else OFFLOADS
        device = {way: device_bytes(own, stage, way, name not in NOT_BY_LAYERS) for way in ways}
        host = {way: host_bytes(own, stage, way) for way in ways} | {"no GPU": cpu_bytes(own, computing, stage)}
        yield {"family": name, "stage": stage, "device": device, "host": host}


def table(lines):
    """The lines in gigabytes (10^9 bytes), a column for each --offload; on the host also one without a GPU."""
    ways = (*OFFLOADS, "no GPU")
    yield f"{'':<30}{'on the device':^33}{'on the host':^44}"
    yield f"{'family':<14}{'stage':<16}" + "".join(f"{way:>11}" for way in (*OFFLOADS, *ways))
    for line in lines:
        numbers = [line["device"].get(way) for way in OFFLOADS] + [line["host"].get(way) for way in ways]
        cells = "".join(f"{'' if number is None else f'{number / 1e9:.1f}':>11}" for number in numbers)
        yield f"{line['family']:<14}{line['stage']:<16}{cells}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("families", nargs="*", help="default: all six")
    parser.add_argument("--measure", action="store_true", help="compare with a measured peak, which takes minutes")
    args = parser.parse_args()
    lines = [line for name in args.families or FAMILIES for line in reckon(name)]
    print("\n".join(table(lines)), flush=True)
    result = {"families": lines}
    if args.measure:
        from benchmarks.memory_check import MEASURED, measure

        result["measured"] = [line for name in MEASURED for line in measure(name)]
        for line in result["measured"]:
            reckoned, measured = (f"{line[name] / 1e9:.2f} GB" for name in ("reckoned", "measured"))
            print(f"{line['family']}, {line['stage']}: reckoned {reckoned}, measured {measured}")
    write_result("memory", result)


if __name__ == "__main__":
    main()
