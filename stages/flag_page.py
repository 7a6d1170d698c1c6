"""Write docs/flags.md, the page of all flags, from the scripts' own parsers.

python -m stages.flag_page
"""

import argparse
import re
import runpy
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from models.families import FAMILIES
from quant.files import save_text
from stages.run import OneLineParser

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "flags.md"
STAGES = ("multiquantizer", "eval_random", "infer")  # in the order in which they are run
HEAD = """# Flags

Generated from the scripts' parsers by `python -m stages.flag_page`; a test compares this page with them. The column
"families" names the denoiser families for which a line holds; `<family>` stands for the family's name and `<model>` for its
own model, which [families.md](families.md) lists. Every script also prints its flags with `--help`.
"""


class ParserFound(BaseException):
    """Carries `parser` out of a script that was about to read its command line. Not an Exception: scripts report those."""

    def __init__(self, parser: argparse.ArgumentParser):
        super().__init__()
        self.parser = parser


class Row(NamedTuple):
    """A line of a table of flags."""

    dest: str
    flag: str
    meaning: str
    default: str


def parser_of(script: Path, words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of a script, which is run with the command line `words` until it would parse them, and no further."""

    def stop(parser, *_args, **_settings):
        raise ParserFound(parser)

    command_line = [script.name, *words]
    with mock.patch.object(OneLineParser, "parse_args", stop), mock.patch.object(sys, "argv", command_line):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except ParserFound as found:
            return found.parser
    raise RuntimeError(f"{script}: does not parse its command line by OneLineParser.parse_args")


def page() -> str:
    """The text of docs/flags.md."""
    sections = [HEAD, *(_stage_section(stage) for stage in STAGES)]
    of_stages = {f"{family}_{stage}.py" for family in FAMILIES for stage in STAGES}
    others = sorted(path for path in (ROOT / "scripts").glob("*.py") if path.name not in of_stages)
    return "\n".join([*sections, *map(_script_section, others)])


def _stage_section(stage: str) -> str:
    parsers = {family: parser_of(ROOT / "scripts" / f"{family}_{stage}.py") for family in FAMILIES}
    return _section(f"<family>_{stage}.py", parsers)


def _script_section(script: Path) -> str:
    """The flags of a script that is not one family's; those that take --family may have other flags for each."""
    first = parser_of(script, ["--family", next(iter(FAMILIES))])
    if "--family" not in first._option_string_actions:
        return _section(script.name, {"": first})
    return _section(script.name, {family: parser_of(script, ["--family", family]) for family in FAMILIES})


def _section(title: str, parsers: dict[str, argparse.ArgumentParser]) -> str:
    """A heading and a table of the flags of one script, or of one stage's scripts, by family."""
    families = {}  # {row: the families whose parser has it}
    for family, parser in parsers.items():
        for row in _rows(parser):
            alike = row._replace(meaning=_of_any(family, row.meaning), default=_of_any(family, row.default))
            families.setdefault(alike, []).append(family)
    order = {dest: number for number, dest in enumerate(dict.fromkeys(row.dest for row in families))}
    several = any(len(names) < len(parsers) for names in families.values())
    heads = ["flag", *(["families"] if several else []), "meaning", "default"]
    lines = [f"## `{title}`", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in sorted(families, key=lambda row: order[row.dest]):
        names = "all" if len(families[row]) == len(parsers) else ", ".join(families[row])
        cells = [row.flag, *([names] if several else []), row.meaning, row.default]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _of_any(family: str, text: str) -> str:
    """The text with placeholders for the names of a family and its model, so that lines of several families are alike."""
    if not family:
        return text
    text = text.replace(FAMILIES[family].model_id, "`<model>`")
    return re.sub(rf"(?<![A-Za-z0-9]){family}(?![A-Za-z0-9])", r"\<family>", text)


def _rows(parser: argparse.ArgumentParser) -> Iterator[Row]:
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        meaning = (action.help or "") % {**vars(action), "prog": parser.prog}
        default = "required" if action.required else "" if "default" in meaning else _default(action.default)
        yield Row(action.dest, _flag(action), _escaped(meaning), default)


def _flag(action: argparse.Action) -> str:
    """The names of a flag, and the words that it may take."""
    names = action.option_strings or [action.metavar or action.dest]
    words = f" `{' | '.join(map(str, action.choices))}`" if action.choices and action.metavar is None else ""
    return ", ".join(f"`{name}`" for name in names) + words.replace("|", "\\|")


def _default(value: object) -> str:
    if value is None or value is False or value in ("", [], argparse.SUPPRESS):
        return ""
    values: Iterable[object] = value if isinstance(value, list | tuple) else [value]
    return _escaped(" ".join(each.as_posix() if isinstance(each, Path) else str(each) for each in values))


def _escaped(text: str) -> str:
    """Text as a cell of a table in Markdown, what stands in backquotes as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = [part.replace("|", "\\|") if part.startswith("`") else re.sub(r"([|<*])", r"\\\1", part) for part in parts]
    return "".join(plain)


def main() -> None:
    """Write the page."""
    save_text(page(), PAGE)
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
