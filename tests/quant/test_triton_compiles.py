"""The Triton kernels compiled for three GPUs, of which none is needed: as they are called at the sizes of real layers."""

import contextlib
import re
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed here")

from quant.kernels import triton_decode, triton_fused, triton_int8  # noqa: E402
from quant.packing import row_bytes  # noqa: E402

CAPABILITIES = {"A100": 80, "RTX 4090": 89, "H100": 90}
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # that a block may take, by NVIDIA's tables
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
}
UAQ, AFFINE, CHANNEL, WHOLE = "UAQ", "affine", "K-Means-C", "K-Means-A"
OUTPUTS, DEPTH = 1152, 4608


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def weight(kind, bits, dtype=torch.float16, group=0):
    lead = (OUTPUTS, DEPTH // group) if group else (OUTPUTS,)
    shape = {UAQ: lead, AFFINE: lead, CHANNEL: (*lead, 2**bits), WHOLE: (2**bits,)}[kind]
    zero = {UAQ: torch.zeros(lead, dtype=torch.int8), AFFINE: torch.zeros(lead, dtype=dtype)}.get(kind)
    return torch.zeros(OUTPUTS, row_bytes(DEPTH, bits), dtype=torch.uint8), torch.ones(shape, dtype=dtype), zero


@contextlib.contextmanager
def recorded():
    """A list, to which kernels that are called while it is entered are added with their arguments, instead of running."""
    calls = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: calls.append((self.kernel, args, kwargs))

    kernels = {
        triton_decode: ("decode_to_floats", "decode_to_int8"),
        triton_fused: ("linear",),
        triton_int8: ("quantize", "product", "packed_product"),
    }
    with contextlib.ExitStack() as stack:
        for module, names in kernels.items():
            for name in names:
                stack.enter_context(mock.patch.object(module, name, Recorder(getattr(module, name))))
        yield calls


def compiled(capability, kernel, args, kwargs):
    """The kernel's binary for such arguments, specialised as Triton does when it is called."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if torch.is_tensor(value) or (isinstance(value, int) and value != 1 and not parameter.is_constexpr):
            signature[parameter.name] = POINTERS[value.dtype] if torch.is_tensor(value) else "i32"
            if torch.is_tensor(value) or value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
    options = {name: value for name, value in kwargs.items() if name in ("num_warps", "num_stages")}
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


def resources(binary, tmp_path):
    """{what: how much} of a thread's registers and spilled bytes, as NVIDIA's tool tells them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        pytest.skip("this Triton brings no cuobjdump, which tells what is spilled")
    file = tmp_path / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])
    told = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}


def check(calls, capability, tmp_path):
    """Compile the calls, none of which may spill or ask for more shared memory than there is; {kernel: its PTX}."""
    texts = {}
    for kernel, args, kwargs in calls:
        binary = compiled(capability, kernel, args, kwargs)
        found = resources(binary, tmp_path)
        name = kernel.fn.__name__
        print(f"{name} sm_{capability}: {found['REG']} registers, {binary.metadata.shared} bytes of shared memory")
        assert (found["STACK"], found["LOCAL"]) == (0, 0), name
        assert binary.metadata.shared <= SHARED_BYTES[capability], name
        texts[name] = binary.asm["ptx"]
    assert texts
    return texts


def gpus(function):
    return pytest.mark.parametrize("capability", CAPABILITIES.values(), ids=CAPABILITIES)(function)


@gpus
def test_products_of_large_shapes(capability, tmp_path):
    """On an H100 they are its own instructions, wgmma."""
    halves, tokens = torch.empty(4096, DEPTH, dtype=torch.float16), torch.empty(4096, DEPTH)
    with recorded() as calls:
        triton_fused.fused(halves, *weight(UAQ, 4), 4, 0, None)
        triton_int8.int8_linear(tokens, *weight(UAQ, 4), 4, 8, torch.empty(OUTPUTS))
        triton_int8.token_values(halves, 6)
    texts = check([call for call in calls if call[0].fn.__name__ != "decode_to_int8"], capability, tmp_path)
    assert all(("wgmma" in texts[name]) == (capability == 90) for name in ("linear", "product"))
    assert "s32.s8.s8" in texts["product"]


@pytest.mark.slow
@gpus
@pytest.mark.parametrize(
    ("kind", "bits", "dtype", "group"),
    [
        (UAQ, 4, torch.float16, 0),
        (UAQ, 3, torch.bfloat16, 64),
        (AFFINE, 4, torch.float16, 0),
        (AFFINE, 3, torch.bfloat16, 64),
        (CHANNEL, 4, torch.float16, 0),
        (WHOLE, 3, torch.bfloat16, 0),
        (CHANNEL, 8, torch.float32, 0),
    ],
    ids=str,
)
def test_each_kind_of_weight(kind, bits, dtype, group, capability, tmp_path):
    """Decoded, to int8 too, and multiplied by a few rows and by many."""
    half = torch.float16 if dtype == torch.float32 else dtype
    packed, bias = weight(kind, bits, dtype, group), torch.empty(OUTPUTS, dtype=half)
    with recorded() as calls:
        triton_decode.decode_into(torch.empty(OUTPUTS, DEPTH, dtype=half), *packed, bits, group)
        for rows in (1, 40, 4096):
            triton_fused.fused(torch.empty(rows, DEPTH, dtype=half), *packed, bits, group, bias)
        if not group:
            triton_int8.int8_linear(torch.empty(1, DEPTH, dtype=half), *packed, bits, 8, bias)
            triton_decode.decode_int8(*packed, bits, DEPTH)
    check(calls, capability, tmp_path)
