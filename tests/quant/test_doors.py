"""Compiled kernels refuse what has another shape, precision or layout than they read and write."""

import numpy as np
import pytest
import torch

from quant import kmeans, kmeans_cpu, sorted_errors, uaq
from quant.doors import expect
from quant.kernels import int8
from quant.kernels.decode import decode, decode_into, look_up
from quant.packing import pack_rows

ROWS = np.sort(np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32))
WEIGHT = torch.from_numpy(ROWS)
CODES = pack_rows(torch.zeros(3, 20, dtype=torch.uint8), 4)
SCALE, ZERO = torch.ones(3), torch.zeros(3, dtype=torch.int8)
BOOKS = torch.arange(16.0).repeat(3, 1)


def test_expect_by_hand():
    expect("a", torch.zeros(2, 3), (2, None), torch.float32)
    expect("a", np.zeros((2, 3)), (None, 3), np.float32, np.float64)
    for array, shape, words in (
        (torch.zeros(2, 3), (3, 3), r"a is torch.float32 \[2, 3\], not torch.float32 \[3, 3\]"),
        (torch.zeros(2, 3), (2,), "a is"),
        (torch.zeros(2, 3).double(), (2, 3), "float64"),
        (torch.zeros(3, 2).t(), (2, 3), "not contiguous"),
    ):
        with pytest.raises(ValueError, match=words):
            expect("a", array, shape, torch.float32)


CALLS = {
    "rows of integers": lambda: kmeans_cpu.fit_sorted(ROWS.astype(np.int64), [4]),
    "one row": lambda: kmeans_cpu.fit_sorted(ROWS[0], [4]),
    "rows with gaps": lambda: kmeans_cpu.fit_sorted(ROWS[:, ::2], [4]),
    "no centroids": lambda: kmeans_cpu.fit_sorted(ROWS, [0]),
    "no values": lambda: kmeans_cpu.fit_sorted(ROWS[:, :0], [4]),
    "few counts": lambda: kmeans_cpu.fit_values(ROWS[0], np.ones(3), [4]),
    "histogram of float32": lambda: kmeans_cpu.histogram(WEIGHT),
    "many boundaries": lambda: kmeans.apply(WEIGHT, BOOKS, torch.zeros(3, 10_000)),
    "few boundaries": lambda: kmeans.apply(WEIGHT, BOOKS, torch.zeros(3, 14)),
    "codebooks of fewer channels": lambda: kmeans.apply(WEIGHT, BOOKS[:2]),
    "UAQ of float64": lambda: uaq.fit_rows(ROWS.astype(np.float64), (4,)),
    "UAQ of 9 bits": lambda: uaq.fit_rows(ROWS, (9,)),
    "few scales": lambda: sorted_errors.of_uaq(ROWS, SCALE[:2], ZERO, 4),
    "few zero points": lambda: sorted_errors.of_uaq(ROWS, SCALE, ZERO[:2], 4),
    "few codebooks": lambda: sorted_errors.of_kmeans(ROWS, BOOKS[:2]),
    "short codes": lambda: decode(CODES[:, :-1], SCALE, ZERO, 4, 20),
    "signed codes": lambda: decode(CODES.view(torch.int8), SCALE, ZERO, 4, 20),
    "scales of integers": lambda: decode(CODES, ZERO, ZERO, 4, 20),
    "offsets in another precision": lambda: decode(CODES, SCALE, SCALE.double(), 4, 20),
    "no levels": lambda: decode(CODES, BOOKS[:, :0], None, 4, 20),
    "few tables": lambda: decode(CODES, BOOKS[:2], None, 4, 20),
    "few groups": lambda: decode(CODES, torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int8), 4, 20, 8),
    "9 bits": lambda: decode(CODES, SCALE, ZERO, 9, 20),
    "few rows to write": lambda: decode_into(torch.empty(2, 20), CODES, SCALE, ZERO, 4),
    "gaps to write": lambda: decode_into(torch.empty(20, 3).t(), CODES, SCALE, ZERO, 4),
    "levels of another precision": lambda: look_up(torch.empty(3, 20), CODES, BOOKS[:, None].double(), 4),
    "levels of other rows": lambda: look_up(torch.empty(3, 20), CODES, BOOKS[:2, None], 4),
    "a narrow room": lambda: int8.quantize_rows(WEIGHT, 8, torch.empty(3, 19, dtype=torch.int8)),
    "a short bias": lambda: int8.linear(WEIGHT, None, CODES, SCALE, ZERO, 4, 8, torch.zeros(2)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_a_kernel_would_read_or_write_beyond(call):
    with pytest.raises(ValueError, match=r"\bis\b|\bare\b|have no|shape"):
        call()
