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

CASES, SLOW = triton_cases.CASES, triton_cases.SLOW


@functools.cache
def interpreted(slow):
    """{case: what went wrong in it} of all slow cases or all others: one process, since each starts for seconds."""
    names = [name for name in CASES if (name in SLOW) == slow]
    command = [sys.executable, triton_cases.__file__, "cpu", *names]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_kernels(name):
    failure = triton_cases.failure("cuda", name) if torch.cuda.is_available() else interpreted(name in SLOW)[name]
    assert not failure, failure


def test_the_operator_has_a_kernel_for_gpus():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("qua2sedimo::decode", "CUDA")
