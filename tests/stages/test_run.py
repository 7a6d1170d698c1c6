"""How a script ends: whatever goes wrong is one line and exit code 2; --debug shows where."""

import argparse
import errno
import importlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, script

from errors import InputError, lacks_memory
from models.families import FAMILIES
from quant import files
from stages import common, infer
from stages.run import OneLineParser, run_main

SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
CUDA = "CUDA out of memory. Tried to allocate 160.00 MiB. GPU 0 has a total capacity of 7.78 GiB\nmore"


def of(raised, cause=None):
    """The exception as it is once raised, from a cause if one is given."""
    try:
        raise raised from cause
    except type(raised) as reason:
        return reason


def in_passing(raised, before):
    """The exception as it is once raised while another is handled."""
    try:
        raise before
    except type(before):
        try:
            raise raised
        except type(raised) as reason:
            return reason


def ends(main, monkeypatch, capsys, *flags):
    """(exit code, lines on the error output) of a script that does `main`."""
    monkeypatch.setattr(sys, "argv", ["x.py", *flags])
    with pytest.raises(SystemExit) as ending:
        run_main(main)
    return ending.value.code, capsys.readouterr().err.strip().splitlines()


def raising(reason):
    def main():
        raise reason

    return main


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        (InputError("--res 7: no"), "error: --res 7: no"),
        (InputError("a\nname: no such file"), "error: a name: no such file"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.pt"), "error: a.pt: No such file or directory; "),
        (OSError(errno.ENOSPC, "No space left on device"), "error: the disk, or your share of it, is full; --debug"),
        (OSError("We could not connect\nto the hub"), "error: unexpected OSError: We could not connect; --debug"),
        (ModuleNotFoundError("No module named 'torch'"), "error: No module named 'torch'; `pip install -e .`"),
        (KeyError("sample_size"), "error: unexpected KeyError: 'sample_size'; --debug shows more"),
        (RuntimeError(""), "error: unexpected RuntimeError: RuntimeError; --debug"),
    ],
)
def test_whatever_ends_a_script_is_one_line(monkeypatch, capsys, reason, line):
    code, lines = ends(raising(reason), monkeypatch, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].startswith(line)


def test_debug_shows_the_traceback_with_what_was_hidden(monkeypatch, capsys):
    def main():
        try:
            {}["weights"]
        except KeyError:
            raise InputError("x.pt: damaged") from None

    code, lines = ends(main, monkeypatch, capsys, "--debug")
    assert code == 2 and lines[-1] == "error: x.pt: damaged"
    assert (
        lines[0].startswith("Traceback") and "KeyError: 'weights'" in lines and "errors.InputError: x.pt: damaged" in lines
    )
    assert ends(main, monkeypatch, capsys) == (2, ["error: x.pt: damaged"])
    assert ends(raising(KeyError("x")), monkeypatch, capsys, "--debug")[1][-1] == "error: unexpected KeyError: 'x'"
    assert OneLineParser().parse_args(["--debug"]) == {}  # a run goes on with it or without


def test_sigterm_ends_a_script_as_ctrl_c_does(monkeypatch, capsys):
    """What is saved at Ctrl-C is saved; a second one, while that goes on, does nothing."""
    saved = []

    def main():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGTERM)
            saved.append("all")
            raise

    before = signal.getsignal(signal.SIGTERM)
    try:
        code, lines = ends(main, monkeypatch, capsys)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 143 and lines == ["stopped after 0 s; the same command goes on"] and saved == ["all"]


def test_ctrl_c_while_a_checkpoint_is_written_is_no_error_of_torchs(tmp_path, monkeypatch):
    """It comes as the file is written: torch's own writer would make a RuntimeError of it."""

    class Interrupting(io.BufferedWriter):
        def write(self, _bytes):
            raise KeyboardInterrupt

    fdopen = os.fdopen
    monkeypatch.setattr(files.os, "fdopen", lambda handle, mode: Interrupting(fdopen(handle, mode).detach()))
    with pytest.raises(KeyboardInterrupt):
        files.save_checkpoint({"a": torch.ones(3)}, tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--outdir", ""], ["--outdir="], ["--outdir", " "]])
def test_an_empty_name_of_a_folder_is_none(words):
    parser = OneLineParser(prog="x.py")
    parser.add_argument("--outdir", type=Path)
    with pytest.raises(InputError, match="--outdir: the name is empty"):
        parser.parse_args(words)


def test_arguments_that_are_not_utf8_are_one_line():
    parser = OneLineParser(prog="x.py")
    parser.add_argument("--outdir", type=Path)
    with pytest.raises(InputError, match=r"'caf\\udce9': is not UTF-8"):
        parser.parse_args(["--outdir", b"caf\xe9".decode("utf-8", "surrogateescape")])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_runs_a_stage_by_its_name(path):
    """That is what gives a script --debug and its one line, failures to import included."""
    stage, *families = [word.strip('",') for word in path.read_text().partition("run_script(")[2].rstrip(")\n").split()]
    assert (ROOT / "stages" / f"{stage.replace('.', '/')}.py").exists() and set(families) <= set(FAMILIES)


def test_a_package_that_is_not_there_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    there = f"{tmp_path}{os.pathsep}{ROOT}"
    command = script("dit_infer.py", "--model_id", "embedded")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": there})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: No module named 'torch'; `pip install -e .` in the project's folder installs")


@pytest.mark.slow
def test_help_is_told_without_what_only_some_runs_need():
    """Not what reads digits, single files, or a family's pipeline: together as slow to import as a third of all else."""
    needless = {"sklearn", "diffusers.loaders.single_file", "diffusers.pipelines.stable_diffusion_xl"}
    ask = f"import sys, atexit\natexit.register(lambda: print({needless} & sys.modules.keys()))\n"
    run = 'from stages import infer\nfrom models.families import FAMILIES\ninfer.main(FAMILIES["sdxl"])'
    done = subprocess.run([sys.executable, "-c", ask + run, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("usage: sdxl_infer.py") and done.stdout.endswith("set()\n"), done.stdout + done.stderr


@pytest.mark.parametrize("name", sorted({path.read_text().split('run_script("')[1].split('"')[0] for path in SCRIPTS}))
def test_every_stage_has_the_flag(monkeypatch, capsys, name):
    stage = importlib.import_module(f"stages.{name}")
    monkeypatch.setattr(sys, "argv", ["x.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        stage.main(*([FAMILIES["sdxl"]] if name in ("multiquantizer", "labelling.eval_random", "infer") else []))
    assert "--debug" in capsys.readouterr().out


def test_a_rust_panic_is_one_line_and_other_endings_pass(monkeypatch, capsys):
    panic = type("PanicException", (BaseException,), {})("called `Option::unwrap()` on a `None` value")
    assert ends(raising(panic), monkeypatch, capsys)[1][0].startswith("error: unexpected PanicException: called")
    with pytest.raises(GeneratorExit):
        run_main(raising(GeneratorExit()))
    assert ends(raising(SystemExit(3)), monkeypatch, capsys) == (3, [])


def test_interrupted(monkeypatch, capsys):
    code, lines = ends(raising(KeyboardInterrupt()), monkeypatch, capsys)
    assert code == 130 and lines == ["stopped after 0 s; the same command goes on"]
    assert ends(raising(KeyboardInterrupt("nothing is kept")), monkeypatch, capsys)[1] == [
        "stopped after 0 s; nothing is kept"
    ]


def test_a_reader_that_goes_away_ends_a_script_quietly():
    code = "from stages.run import run_main\nrun_main(lambda: [print('x' * 100) for _ in range(100000)])"
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | head -n 1; exit ${PIPESTATUS[0]}', sys.executable, code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 141 and done.stdout == "x" * 100 + "\n" and done.stderr == ""


@pytest.mark.parametrize(
    ("closed", "encoding", "printed"), [("2>&-", "utf-8", "ü\n"), (">&-", "utf-8", ""), ("", "ascii", "\\xfc\n")]
)
def test_closed_outputs_and_narrow_encodings(closed, encoding, printed):
    code = "from stages.run import run_main\nimport sys\nrun_main(lambda: (print('\\u00fc'), print('x', file=sys.stderr)))"
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {closed}', sys.executable, code],
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and done.stdout.decode() == printed


NO_MEMORY = [
    torch.OutOfMemoryError("x"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5 GiB)"),
    MemoryError("Allocation failed (probably too large)."),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    of(ValueError("cannot be loaded"), torch.OutOfMemoryError("x")),
    in_passing(ValueError("cannot be loaded"), MemoryError()),
]


@pytest.mark.parametrize("reason", NO_MEMORY, ids=repr)
def test_lack_of_memory_is_told_by_any_library(reason):
    assert lacks_memory(reason)


def test_lack_of_memory_as_it_comes():
    for wasteful in (lambda: torch.empty(2**56), lambda: np.empty(2**50), lambda: bytearray(2**62)):
        with pytest.raises((RuntimeError, MemoryError)) as reason:
            wasteful()
        assert lacks_memory(reason.value)


def test_other_errors_are_no_lack_of_memory():
    assert not lacks_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lacks_memory(FileNotFoundError(errno.ENOENT, "No such file", "out of memory.png"))
    assert not lacks_memory(ImportError("libgomp.so.1: cannot allocate memory in static TLS block"))
    assert not lacks_memory(ImportError("x.so: failed to map segment from shared object: Operation not permitted"))


def test_a_file_is_not_called_damaged_for_lack_of_memory(monkeypatch, capsys):
    def main():
        try:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        except RuntimeError as reason:
            raise InputError(f"x.pt: not a readable checkpoint ({reason})") from None

    code, (line,) = ends(main, monkeypatch, capsys)
    assert code == 2 and line.startswith("error: out of memory (DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize(
    ("flags", "reason", "advice"),
    [
        (
            ("--no-pack",),
            torch.OutOfMemoryError(CUDA),
            "a smaller --batch_size, --offload model or sequential, --pack, --no_refiner, --vae_tiling, a smaller --res, "
            "--device cpu",
        ),
        (
            ("--batch_size", "1", "--pack", "--offload", "sequential", "--vae_tiling"),
            torch.OutOfMemoryError(CUDA),
            "--no_refiner, a smaller --res, --device cpu",
        ),
        (("--no_refiner", "--no-pack"), MemoryError(), "a smaller --batch_size, --pack, --vae_tiling, a smaller --res"),
    ],
)
def test_out_of_memory_names_the_scripts_own_flags(monkeypatch, capsys, flags, reason, advice):
    def check_first(args, *_):
        raise reason

    monkeypatch.setattr(infer, "check_first", check_first)
    flags = ("--model_id", "embedded", *flags)
    code, lines = ends(lambda: infer.main(FAMILIES["sdxl"]), monkeypatch, capsys, *flags)
    assert code == 2 and len(lines) == 1
    assert lines[0].startswith("error: out of memory (") and lines[0].endswith(f"; what takes less: {advice}")


def test_out_of_memory_of_a_script_without_such_flags(monkeypatch, capsys):
    def main():
        OneLineParser(prog="x.py").parse_args()
        raise MemoryError

    assert ends(main, monkeypatch, capsys) == (
        2,
        ["error: out of memory (MemoryError); a machine with more memory is needed"],
    )


def test_words_that_are_not_utf8_are_refused():
    assert common.utf8("a ${season} 漢字") == "a ${season} 漢字"
    with pytest.raises(argparse.ArgumentTypeError, match="is not UTF-8"):
        common.utf8(b"caf\xe9".decode("utf-8", "surrogateescape"))
