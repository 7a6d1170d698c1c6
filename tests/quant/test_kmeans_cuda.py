"""K-Means-C's CUDA kernel: on a GPU where there is one, else by Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

pytest.importorskip("triton")

# A row of whole numbers ties, a constant row and one of three values have too few, of one the sums do not tell most
# values apart: these go to the CPU, and so do 17 centroids.
CODE = """
import torch
from quant import kmeans_cpu, kmeans_cuda
generator = torch.Generator().manual_seed(0)
rows = torch.randn({rows}, {width}, generator=generator) ** 3
rows[0], rows[1], rows[2] = torch.arange({width}), 1.5, torch.arange({width}) % 3
rows[3] = 1 + (torch.arange({width}) == 0) * 1e5
rows[3, 1:15] += torch.arange(14) * 1e-6
mine = kmeans_cuda.fit_per_channel(rows.to("{device}"), [8, 4, 17])
for table, expected in zip(mine, kmeans_cpu.fit_sorted(rows.sort(dim=1).values.numpy(), [8, 4, 17]), strict=True):
    torch.testing.assert_close(table.cpu(), expected, rtol=1e-12, atol=1e-12)
print("equal")
"""


@pytest.mark.slow
def test_equals_the_cpu():
    device, size = ("cuda", (500, 700)) if torch.cuda.is_available() else ("cpu", (5, 20))
    code = CODE.format(rows=size[0], width=size[1], device=device)
    environment = os.environ | ({} if device == "cuda" else {"TRITON_INTERPRET": "1"})
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_all_six_fits_equal_the_cpus(dtype):
    from quant import registry

    weight = (torch.randn(200, 600, generator=torch.Generator().manual_seed(0)) ** 3 * 0.02).to(dtype)
    (mine, errors), (expected, expected_errors) = (registry.fit_with_errors(w) for w in (weight.cuda(), weight))
    for name, parameters in expected.items():
        assert all(torch.equal(mine[name][key].cpu(), tensor) for key, tensor in parameters.items()), name
        assert errors[name] == pytest.approx(expected_errors[name], rel=2e-6)
