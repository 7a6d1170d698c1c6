"""Which way a packed linear layer is computed on a GPU, by the shape of its product.

`linear`: "fused" decodes in registers, "scratch" decodes to a buffer for the vendor's product. `linear_a8`, with quantized
activations: "int8" multiplies whole numbers, "half" floats that stand for them.

What `benchmarks/low_bit.py --tune` has measured on this machine is read from a file. Shapes that were not measured go by
the tables below, which are reckoned from peak rates and bandwidths, not measured.
"""

import functools
import json
import logging
from pathlib import Path

import torch

from errors import InputError
from quant.files import cache_folder, save_text

WAYS = {"linear": ("fused", "scratch"), "linear_a8": ("int8", "half")}
# Reckoned: up to so many rows reading the weights takes longest, and packed ones are a quarter.
FUSED_ROWS = 16
# Reckoned: from so many multiplications on int8 saves more than its Triton product may lose to the vendor's in half
# precision; {compute capability: multiplications}, the next lower one's for others. Beside H100s, whose vendor's products
# are the fastest, other chips gain at smaller shapes.
INT8_PRODUCTS = {(8, 0): 2**30, (8, 6): 2**29, (9, 0): 2**33}

log = logging.getLogger("qua2sedimo")
_chosen = None  # in place of the file's, if any


def choose(operator, capability, rows, depth, outputs):
    """The way (of WAYS[operator]) for x [rows, depth] times weights [outputs, depth] on a GPU of that compute capability."""
    measured = _from_file() if _chosen is None else _chosen
    return measured.get(key(operator, capability, rows, depth, outputs)) or reckoned(
        operator, capability, rows, depth, outputs
    )


def chosen(operator, x, rows, outputs):
    """`choose` for the inputs x [..., K] on their device; a CPU, where Triton's interpreter runs, counts as an H100."""
    return choose(operator, _capability(x.device), rows, x.shape[-1], outputs)


@functools.cache
def _capability(device):
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def reckoned(operator, capability, rows, depth, outputs):
    """What `choose` gives for shapes that were not measured, by the tables above."""
    if operator == "linear":
        return "fused" if rows <= FUSED_ROWS else "scratch"
    least = INT8_PRODUCTS[max((known for known in INT8_PRODUCTS if known <= tuple(capability)), default=(8, 0))]
    return "int8" if rows <= FUSED_ROWS or rows * depth * outputs >= least else "half"


def key(operator, capability, rows, depth, outputs):
    """What shapes that are measured together have in common: their sizes rounded up to powers of two."""
    sizes = "x".join(str(1 << (size - 1).bit_length()) for size in (rows, depth, outputs))
    return f"{operator} {capability[0]}.{capability[1]} {sizes}"


def path():
    """The file of what was measured."""
    return cache_folder() / "gpu_shapes.json"


def use(ways):
    """Choose by `ways` {key: way} in this process, whatever the file has; None: by the file, read anew."""
    global _chosen
    _chosen = None if ways is None else _checked(ways, "what was given")
    _from_file.cache_clear()


def save(ways, file=None):
    """Write `ways` {key: way} whole or not at all; from then on this process chooses by the file."""
    save_text(json.dumps(_checked(ways, "what was measured"), indent=1, sort_keys=True) + "\n", file or path())
    use(None)


def load(file):
    """The ways {key: way} in a file; InputError, naming it, if it is none that `save` wrote."""
    try:
        ways = json.loads(Path(file).read_text())
    except (OSError, ValueError, RecursionError):
        ways = None
    return _checked(ways, file)


def _checked(ways, name):
    sound = isinstance(ways, dict) and all(way in list(WAYS.get(shape.split(" ")[0], ())) for shape, way in ways.items())
    if not sound:
        raise InputError(f"{name}: not a table of ways by shape; remove it, or measure anew by benchmarks/low_bit.py --tune")
    return ways


@functools.cache
def _from_file():
    if not path().is_file():
        return {}
    try:
        return load(path())
    except InputError as reason:
        log.warning("%s; until then shapes go by what is reckoned", reason)
        return {}
