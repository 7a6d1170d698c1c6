"""Kernels: kept between runs where there is a place, compiled anew where there is none or what is kept is damaged."""

import errno
import os
import shutil
import subprocess
import sys

import numba
import pytest
from conftest import ROOT
from unprivileged import run_unprivileged

from quant.compiled import kernel


def twice(x):
    return 2 * x


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def test_kernels_are_kept(cache):
    assert kernel()(twice)(21) == 42
    assert [path.suffix for path in cache.rglob("*.*")] == [".nbc"]
    again = kernel()(twice)
    assert again(21) == 42 and sum(again.stats.cache_hits.values()) == 1


def multiplier(factor):
    @kernel()
    def inner(x):
        return factor * x

    @kernel()
    def outer(x):
        return inner(x) + 1

    return outer


def test_kernels_made_of_kernels_are_kept_and_told_apart(cache):
    assert [multiplier(factor)(21) for factor in (2, 3)] == [43, 64]
    again = multiplier(3)
    assert again(21) == 64 and sum(again.stats.cache_hits.values()) == 1


DECODE = """
import sys, torch
from quant.kernels.decode import _decode_anywhere, decode
for bits in map(int, sys.argv[1:]):
    codes, table = torch.randint(256, (5, bits), dtype=torch.uint8), torch.randn(2**bits)
    assert torch.equal(decode(codes, table, None, bits, 8), _decode_anywhere(codes, table, None, bits, 8, 0)), bits
"""


@pytest.mark.slow
def test_variants_that_several_processes_have_kept_are_told_apart(cache):
    """Numba names symbols by a number that each process counts for itself."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    for variants in (["2"], ["3"], ["4"], ["4", "3", "2"]):
        subprocess.run([sys.executable, "-c", DECODE, *variants], env=environment, check=True)


def test_variants_of_a_kernel_have_files_of_their_own(cache):
    """Or one process could overwrite what another is about to name."""
    assert [multiplier(factor)(21) for factor in (2, 3)] == [43, 64]
    assert len(list(cache.rglob("*outer*.nbc"))) == 2


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]])
def test_a_damaged_file_is_compiled_anew(cache, damage):
    assert kernel()(twice)(21) == 42
    (path,) = cache.rglob("*.nbc")
    path.write_bytes(damage(path.read_bytes()))
    again, third = kernel()(twice), kernel()(twice)
    assert again(21) == 42 and not again.stats.cache_hits
    assert third(21) == 42 and sum(third.stats.cache_hits.values()) == 1  # mended


def test_a_kernel_that_cannot_be_kept_works(cache, monkeypatch):
    def replace(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    assert kernel()(twice)(21) == 42 and not [path for path in cache.rglob("*") if path.is_file()]


def test_kernels_of_a_changed_source_take_the_place_of_the_old_ones(cache):
    assert kernel()(twice)(21) == 42
    (path,) = cache.rglob("*.nbc")
    name, stamp, mark, suffix = path.name.rsplit(".", 3)
    path.rename(path.with_name(f"{name}.{stamp[::-1]}.{mark}.{suffix}"))
    assert kernel()(twice)(21) == 42
    assert [each.name for each in cache.rglob("*.nbc")] == [path.name]


def test_a_read_only_installation_without_a_home(tmp_path):
    """All kernels are there and compute, though Numba itself has no place to keep them."""
    shutil.copytree(ROOT / "quant", tmp_path / "quant", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "errors.py", tmp_path)
    code = (
        "import numpy as np\nfrom numba import njit\nimport quant.kmeans, quant.kmeans_cpu, quant.sorted_errors, quant.uaq\n"
        "from quant.power import sum_of_powers\n"
        "try:\n  njit(cache=True)(sum_of_powers.py_func)\n"
        "except RuntimeError as reason:\n  print(reason)\n"
        "print(sum_of_powers(np.ones(3, np.float32)))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    for folder, _, names in os.walk(tmp_path):
        for name in (*names, ""):
            os.chmod(os.path.join(folder, name), 0o444 if name else 0o555)
    environment |= {"HOME": "/dev/null/nowhere", "PYTHONPATH": str(tmp_path)}
    done = run_unprivileged([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    os.chmod(tmp_path, 0o755)
    os.chmod(tmp_path / "quant", 0o755)
    assert done.returncode == 0, done.stderr
    reason, total = done.stdout.splitlines()
    assert "no locator available" in reason and float(total) == pytest.approx(3)
    assert not list(tmp_path.rglob("__pycache__"))
