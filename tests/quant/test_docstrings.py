"""Every public name of the library says what it is."""

import ast

import pytest
from conftest import ROOT

MODULES = sorted(path.relative_to(ROOT) for path in (ROOT / "quant").rglob("*.py"))


def undocumented(node, prefix=""):
    for each in node.body:
        if isinstance(each, ast.FunctionDef | ast.ClassDef) and not each.name.startswith("_"):
            if ast.get_docstring(each) is None:
                yield prefix + each.name
            if isinstance(each, ast.ClassDef):
                yield from undocumented(each, f"{prefix}{each.name}.")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_public_names_have_docstrings(path):
    tree = ast.parse((ROOT / path).read_text())
    assert ast.get_docstring(tree) and list(undocumented(tree)) == []
