"""Loading a packed denoiser holds no float weight: a process of its own measures what it takes."""

import sys

import pytest

from benchmarks import loading


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_new_memory_is_a_twentieth_of_half_precision(tmp_path):
    figures = loading.measure(tmp_path, num_layers=6)
    half = figures["half_precision_bytes"]
    assert 2e8 < half < 4e8
    assert 0.25 * half < figures["packed_weight_bytes"] < figures["file_bytes"] < 0.28 * half
    assert figures["new_bytes"] < 0.05 * half
    # The whole file is read to compare digests: its pages are mapped, and the system may take them back.
    assert figures["peak_bytes_with_mapped"] < figures["file_bytes"] + 0.1 * half
