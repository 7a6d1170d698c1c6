"""Imports run downwards only: scripts -> stages -> autobuild -> models, evaluation, bops -> quant."""

import ast

import pytest
from conftest import ROOT

BELOW = {  # of each folder those that it may import from, beside itself
    "quant": set(),
    "models": {"quant"},
    "evaluation": {"quant"},
    "bops": {"quant"},
    "autobuild": {"models", "evaluation", "bops", "quant"},
    "stages": {"autobuild", "models", "evaluation", "bops", "quant"},
    "scripts": {"stages"},
    "benchmarks": {"stages", "autobuild", "models", "evaluation", "bops", "quant"},
}
FOR_ALL = {"errors", "constants"}  # which import nothing of the others
OF_QUANT = {"quant.slots", "quant.files", "quant.checked_files"}  # what models may import of it: they know no quantizer
OWN = {*BELOW, *FOR_ALL, "tests", "conftest"}
MODULES = sorted(path for folder in BELOW for path in (ROOT / folder).rglob("*.py"))


def imported(source):
    """Yield (line, name) of all that a module imports, inside functions too: `import a.b` and `from a import b` are a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides its folder"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            text = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            assert isinstance(text, ast.Constant), f"line {node.lineno}: the folder of what is imported is not told"
            yield node.lineno, text.value


def upward(folder, source):
    """Lines of the imports that a module of `folder` may not have."""
    for line, name in imported(source):
        top = name.split(".")[0]
        if top not in OWN - {folder} - FOR_ALL:
            continue
        if top not in BELOW.get(folder, ()):
            yield f"line {line}: {folder} imports {name}"
        elif folder == "models" and ".".join(name.split(".")[:2]) not in OF_QUANT:
            yield f"line {line}: models import {name}, and of quant only {', '.join(sorted(OF_QUANT))}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_arrow_runs_up(path):
    assert list(upward(path.relative_to(ROOT).parts[0], path.read_text())) == []


@pytest.mark.parametrize("name", sorted(FOR_ALL))
def test_what_all_may_import_imports_none(name):
    assert list(upward(name, (ROOT / f"{name}.py").read_text())) == []


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("quant", "import models.families"),
        ("quant", "def f():\n    from evaluation import fid"),
        ("models", "from quant.config import load"),
        ("models", "from quant import methods"),
        ("models", "import quant"),
        ("models", "from evaluation.fid import distance"),
        ("evaluation", "if True:\n    from models import clip as c"),
        ("bops", "import evaluation"),
        ("autobuild", "from stages.common import log"),
        ("stages", "import importlib\nimportlib.import_module('scripts.build_config')"),
        ("stages", "import benchmarks.machine"),
        ("scripts", "from quant import config"),
        ("benchmarks", "import tests.made_up"),
        ("errors", "from quant import files"),
    ],
)
def test_an_arrow_that_runs_up_is_found(folder, source):
    assert len(list(upward(folder, source))) == 1


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("models", "from quant import files, slots\nfrom quant.files import atomic_write\nimport errors, constants, numpy"),
        ("stages", "from stages.run import log\nfrom autobuild import search\nfrom quant.config import load"),
        ("benchmarks", "import benchmarks.machine\nfrom stages import infer"),
    ],
)
def test_an_arrow_that_runs_down_is_let_through(folder, source):
    assert list(upward(folder, source)) == []


def test_every_folder_of_modules_has_its_place():
    folders = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    assert folders - {"tests"} == set(BELOW)
