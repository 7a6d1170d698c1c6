"""A function that opens files is of a kind that is mutated, or it is said here why not: new ones fail a test."""

import ast

from conftest import ROOT

from mutations.kinds import KINDS

FOLDERS = ("quant", "models", "evaluation", "bops", "autobuild", "stages")
# What opens a file, or makes something of one's content, by the name of what is called.
OPENS = {
    *("load_checkpoint", "load_pickle", "load_content", "load_array", "load_arrays", "from_json", "open", "read_text"),
    *("read_bytes", "safe_open", "load_file", "safe_load", "from_pretrained", "load_single_file_checkpoint", "is_zipfile"),
    *("mmap", "ZipFile", "frombuffer", "fromfile", "memmap", "from_single_file", "InceptionV3W", "read_rgb"),
}
OF_MODULES = {"torch.load", "np.load", "json.load", "json.loads", "csv.reader", "pickle.load", "pickle.loads", "yaml.load"}
# Openers of files that are of no kind, or that their callers have opened.
NOT_MUTATED = {
    **dict.fromkeys(
        (
            *("quant.leftovers._is_left", "quant.leftovers.temporary_folder", "quant.files._sync_folder"),
            *("quant.files.system_error", "stages.quantize_files._sync", "stages.run_lock._create"),
            *("stages.run.drop_output", "stages.run.settle_streams"),
        ),
        "opens to lock, to sync or to write, and reads nothing",
    ),
    "quant.compiled.load": "kernels of Numba, with a digest: see tests/quant/test_compiled.py",
    "stages.run_lock.locked": "shows who holds a folder, and makes nothing of it",
    "evaluation.fid.__init__": "TorchScript, which is a program: clean-fid's file is read as a whole, or refused",
    **dict.fromkeys(
        ("evaluation.contact_sheet._draw_cell", "evaluation.contact_sheet.contact_sheet", "autobuild.draw.few_colors"),
        "pictures that this run has drawn, or found to be whole",
    ),
    "stages.quantize._how": "JSON that it has made itself",
    "stages.quantize_flags.pair": "a word of the command line",
    **dict.fromkeys(
        (
            *("models.embedded.classifier.load_classifier", "models.embedded.text_encoders.load_text_encoder"),
            *("models.embedded.train.load_averaged", "models.embedded.train.resume", "models.embedded.train.shared_parts"),
        ),
        "comes with the program, or is of the recipe that made what does",
    ),
}


def openers(source, module):
    """Names "module.function" of the functions, methods without their class, in which something is opened."""
    found = set()

    def visit(node, function):
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.Call) and is_opening(child):
                found.add(f"{module}.{function}")
            visit(child, child.name if named else function)

    visit(ast.parse(source), "(module)")
    return found


def is_opening(call):
    """Whether a call is one of those that open files."""
    if isinstance(call.func, ast.Attribute):
        owner = getattr(call.func.value, "id", "")
        return call.func.attr in OPENS or f"{owner}.{call.func.attr}" in OF_MODULES
    return getattr(call.func, "id", "") in OPENS


def every_opener():
    found = set()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        found |= openers(path.read_text(), ".".join(path.relative_to(ROOT).with_suffix("").parts))
    return found


def test_every_reader_is_of_a_kind_that_is_mutated():
    known = {reader for kind in KINDS.values() for reader in kind.readers} | NOT_MUTATED.keys()
    assert sorted(every_opener() - known) == []


def test_readers_that_are_listed_are_there():
    known = {reader for kind in KINDS.values() for reader in kind.readers} | NOT_MUTATED.keys()
    assert sorted(known - every_opener()) == []


def test_a_new_reader_is_found():
    source = "class Kept:\n    def read(self, path):\n        with path.open() as file:\n            return file.read()"
    assert openers(source, "stages.new") == {"stages.new.read"}
    assert openers("def f(x):\n    return [np.load(each) for each in x]", "a") == {"a.f"}
    assert openers("def f(x):\n    return x.loads()", "a") == set()
