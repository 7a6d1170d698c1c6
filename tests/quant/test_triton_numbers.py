"""What the Triton kernels compute: on a GPU where there is one, else by Triton's interpreter, in a process of its own."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

pytest.importorskip("triton", reason="Triton is not installed here")

import triton_cases

CASES = triton_cases.CASES


@functools.cache
def interpreted():
    """{case: what went wrong in it} of all cases: one process, since each starts for seconds."""
    command = [sys.executable, triton_cases.__file__, "cpu", *CASES]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kernels(name):
    failure = triton_cases.failure("cuda", name) if torch.cuda.is_available() else interpreted()[name]
    assert not failure, failure


@pytest.mark.parametrize("operator", ["decode", "linear", "linear_a8"])
def test_operators_have_kernels_for_gpus(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qua2sedimo::{operator}", "CUDA")
