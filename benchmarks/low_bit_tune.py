"""Measure which way each linear layer of the real denoisers is fastest on this GPU, for quant/kernels/shapes.py.

Run by `python -m benchmarks.low_bit --tune`. Of each shape class of the geometries, both ways are timed on random weights
at 4 bits, and the faster is written to the file that packed layers choose by from then on.
"""

import statistics

import torch
from torch import nn

from models import geometry
from quant.kernels import shapes
from quant.packing import row_bytes

BITS, ACT_BITS = 4, 8


def linear_shapes(name, batch, pixels):
    """{(rows, depth, outputs)} of all linear layers of the family's denoiser in a step, as it runs on the meta device."""
    found = set()

    def note(layer, args):
        found.add((args[0].numel() // args[0].shape[-1], layer.in_features, layer.out_features))

    with torch.device("meta"):
        denoiser = geometry.build(name)
        inputs = geometry.example_inputs(name, denoiser, batch=batch, pixels=min(pixels // 8, denoiser.config.sample_size))
        for layer in denoiser.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(note)
        denoiser(**inputs, return_dict=False)
    return found


def packed_layer(depth, outputs, device):
    """Random codes, scales and zero points of UAQ."""
    codes = torch.randint(256, (outputs, row_bytes(depth, BITS)), dtype=torch.uint8, device=device)
    scale = torch.full((outputs,), 0.01, dtype=torch.float16, device=device)
    return codes, scale, torch.full((outputs,), 7, dtype=torch.int8, device=device)


def calls(rows, depth, outputs, device):
    """{operator of `shapes`: a call of it} on random numbers of a shape."""
    from quant.kernels.triton_fused import linear_cuda
    from quant.kernels.triton_int8 import linear_a8_cuda

    x = torch.randn(rows, depth, dtype=torch.float16, device=device)
    codes, scale, zero = packed_layer(depth, outputs, device)
    return {
        "linear": lambda: linear_cuda(x, codes, scale, zero, BITS, 0, None),
        "linear_a8": lambda: linear_a8_cuda(x, codes, scale, zero, BITS, ACT_BITS, None),
    }


def tune(names, batches, pixels_of, device, timed):
    """{key: way} of the faster way for every shape class; `timed(procedure)` gives milliseconds.

    A class whose members differ goes by the median of the ratios.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    found = set().union(*(linear_shapes(name, batch, pixels_of[name]) for name in names for batch in batches))
    ratios = {}
    try:
        for rows, depth, outputs in sorted(found):
            for operator, call in calls(rows, depth, outputs, device).items():
                key, times = shapes.key(operator, capability, rows, depth, outputs), []
                for way in shapes.WAYS[operator]:
                    shapes.use({key: way})
                    times.append(timed(call))
                ratios.setdefault(key, []).append(times[0] / times[1])
    finally:
        shapes.use(None)
    ways = {}
    for key, own in ratios.items():
        first, second = shapes.WAYS[key.split(" ")[0]]
        ways[key] = first if statistics.median(own) <= 1 else second
        print(f"{key:<44}{ways[key]:<10}{statistics.median(own):>8.3f} times {second}", flush=True)
    return ways
