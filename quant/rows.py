"""What the fitting kernels share: a weight's channels as sorted rows, and their threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch

_ONE_AT_A_TIME = threading.Lock()


def sorted_rows(weight):
    """The output channels of `weight` [C, ...], each ascending: numpy [C, n], float32 (float64 for float64)."""
    check(weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows = weight.detach().reshape(len(weight), -1).to("cpu", dtype, copy=True).numpy()
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: part.sort(axis=1), np.array_split(rows, min(len(rows), 4 * threads))))
    return rows


def check(weight):
    """Raise ValueError unless quantizers can be fitted to `weight`."""
    if not weight.numel():
        raise ValueError("the weight is empty; no quantizer can be fitted to it")
    total = weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32))  # one pass, no copy
    if not total.isfinite() and not weight.isfinite().all():
        raise ValueError("the weight has NaN or infinite values; no quantizer can be fitted to it")


def run(kernel, *args):
    """Call a parallel Numba kernel with as many threads as torch has, one kernel at a time.

    Numba's first run sets OpenMP's number of threads, which is torch's too: it is put back.
    """
    with _ONE_AT_A_TIME:
        threads = torch.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        try:
            kernel(*args)
        finally:
            torch.set_num_threads(threads)
