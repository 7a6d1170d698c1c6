"""README and docs agree with the program: commands, links, files, flags, error lines and figures."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from errors import InputError
from stages import flag_page

FOLDERS = ("docs", "labels", "models/embedded", "multiquantizers", "predictors", "quant_configs", "dag_plots", ".github")
PAGES = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
CODE = ("stages", "models", "quant", "evaluation", "autobuild")
SOURCES = [ROOT / "errors.py", *(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))]
LONGEST_README = 10_000  # bytes
OTHER_COMMANDS = {"pip", "ray", "export", "source", "pre-commit"}  # which are not this project's
OWN_FOLDERS = "quant|models|evaluation|bops|autobuild|stages|scripts|benchmarks|tests|docs"
OWN_FILE = rf"(?:{OWN_FOLDERS})/[\w./-]+\.(?:py|md|json)"
NAMES = {path.relative_to(ROOT).as_posix(): path for path in PAGES}


def names(paths):
    return [path.relative_to(ROOT).as_posix() for path in paths]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """The command lines of a page's bash blocks, split into words, settings of the environment before them left out."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def module_file(name):
    return ROOT / f"{name.replace('.', '/')}.py"


def check_module(words):
    """A module that is run by `python -m`, whose flags are those that its text names."""
    text = module_file(words[0]).read_text()
    assert 'if __name__ == "__main__":' in text, words
    unknown = [word for word in words[1:] if word.startswith("--") and f'"{word}"' not in text]
    assert unknown == [], words


def check_command(words):
    program, *rest = words
    if program in OTHER_COMMANDS:
        return
    if program == "make":
        targets = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{re.sub('-.*', '-', target)}[^:\n]*:", targets, re.MULTILINE) for target in rest), words
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if "/" in word), words
    elif rest[0] == "-m":
        check_module(rest[1:])
    else:
        assert program == "python" and rest[0].startswith("scripts/"), words
        flag_page.parser_of(ROOT / rest[0], rest[1:]).parse_args(rest[1:])


@pytest.mark.parametrize("page", names(PAGES))
def test_commands_are_accepted_by_the_programs_that_they_name(page):
    for words in commands(NAMES[page].read_text()):
        check_command(words)


@pytest.mark.parametrize(
    "line",
    [
        "python scripts/dit_infer.py --prompt lion",
        "python scripts/build_config.py --avg_bits 4",
        "python scripts/no_such.py",
        "python -m benchmarks.low_bit --no_such",
        "python -m benchmarks.machine",
        "make no_such",
        "pytest tests/no_such.py",
        "perl x",
    ],
)
def test_a_wrong_command_is_found(line):
    (words,) = commands(f"```bash\n{line}\n```\n")
    with pytest.raises((AssertionError, InputError, OSError, SystemExit)):
        check_command(words)


@pytest.mark.parametrize("page", names(PAGES))
def test_modules_named_in_the_text_can_be_run(page):
    for command in re.findall(r"`[^`\n]*\bpython -m ([\w.]+(?: [^`]*)?)`", NAMES[page].read_text()):
        check_module(command.split())


@pytest.mark.parametrize("page", names(PAGES))
def test_links_and_files_exist(page):
    text = NAMES[page].read_text()
    missing = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link_exists(NAMES[page], link)]
    missing += [name for name in re.findall(rf"`({OWN_FILE})`", text) if not (ROOT / name).exists()]
    assert missing == []


def link_exists(page, link):
    if re.match(r"https?://", link):
        return True
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    return target.exists() and (not anchor or anchor in anchors(target.read_text()))


def anchors(text):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_found_from_the_readme():
    linked = set(re.findall(r"\]\(docs/(\w+\.md)", (ROOT / "README.md").read_text()))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= LONGEST_README


def test_one_version_stands_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    releases = re.findall(r"^## (\d+\.\d+\.\d+) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation["version"] == version == releases[0]
    assert citation["preferred-citation"]["title"] in (ROOT / "README.md").read_text()


def test_issue_templates_ask_for_the_command():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"):
        fields = {field.get("id"): field for field in yaml.safe_load(path.read_text())["body"]}
        assert "command" in fields["command"]["attributes"]["label"], path


def test_figures_in_the_readme_are_those_of_the_pages():
    """Of the table of results: every number with a decimal point, or of five digits and more, is on the page of its line."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if "`python -m benchmarks." in line[:-1]]
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and line.count(" | ") == 3]
    assert len(rows) >= 5
    for _, figure, _, page in rows:
        text = (ROOT / re.search(r"\]\((docs/\w+\.md)", page)[1]).read_text()
        for number in re.findall(r"\d[\d,]*\.\d+|\d[\d,]{4,}\d", figure):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", text), number


def test_the_page_of_flags_is_that_of_the_parsers():
    assert flag_page.PAGE.read_text() == flag_page.page(), "run: python -m stages.flag_page"


def test_the_page_of_errors_has_the_lines_that_the_program_prints():
    said = {text for path in SOURCES for text in literals(path)}
    lines = re.findall(r"^\| (`+)(.*?)\1 \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(lines) > 30
    parts = [part.strip(" ():") for _, line in lines for part in re.split(r"<[^<>]*>|;", line)]
    assert [part for part in parts if len(part) > 7 and not any(part in text for text in said)] == []


def literals(path):
    """The strings of a module's code, of those with values in them the pieces between."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_the_librarys_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = (each for each in blocks((ROOT / "docs" / "library.md").read_text(), "python") if "save_packed" in each)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "library.md", "exec"), {})
    told = re.search(r"# (\d+\.\d+):", example)[1]
    assert f"{float(capsys.readouterr().out):.3f}" == told and (tmp_path / "net_packed" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_readmes_own_model_is_quantized_and_loaded(tmp_path):
    """The command that the README gives for an embedded model, and the lines below it that load what it writes."""
    readme = (ROOT / "README.md").read_text()
    command = next(words for words in commands(readme) if "scripts/quantize.py" in words and "models/embedded" in str(words))
    command = [sys.executable, *(str(ROOT / word) if (ROOT / word).exists() else word for word in command[1:])]
    subprocess.run(command, cwd=tmp_path, check=True)
    code = blocks(readme, "python")[0] + 'assert pipe("a red seven", num_inference_steps=2).images[0].size == (64, 64)\n'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / Path(command[command.index("--output") + 1]) / "contact_sheet.png").exists()
