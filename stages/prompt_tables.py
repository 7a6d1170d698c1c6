"""Prompts in tables: the column of the first line's name that says so."""

import csv
import re

COLUMNS = ("prompt", "prompts", "caption", "captions", "text")  # the first of them that is there, in any case
NONE_NAMED = f"none of them named {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"


def column_of(names):
    """The one of `names` under which prompts stand; None if there is none."""
    known = {str(name).strip().lower(): name for name in reversed(list(names))}
    return next((known[column] for column in COLUMNS if column in known), None)


def from_csv(text, _count=None):
    """The prompts in a table whose columns are separated by commas, semicolons or tabs."""
    return _prompts(text, ",;\t")


def from_tsv(text, _count=None):
    """The same of tabs, commas or semicolons."""
    return _prompts(text, "\t,;")


def is_header(line, delimiter):
    """Whether a line of text reads like the first one of a table with a column of prompts."""
    names = line.split(delimiter)
    return column_of(names) is not None and all(re.fullmatch(r"\w[\w ]*", name.strip('"')) for name in names)


def _prompts(text, delimiters):
    lines = text.strip("\n").split("\n")
    headers = {each: _header(lines, each) for each in delimiters}
    delimiter = next((each for each in delimiters if column_of(headers[each])), None)
    if delimiter is None:
        raise ValueError(f"its columns, by the first line, are {told(headers[delimiters[0]])}, {NONE_NAMED}")
    column = column_of(headers[delimiter])
    place = headers[delimiter].index(column)
    prompts = [row[place] for row in _rows(lines, delimiter)[1:] if row[place].strip()]
    if not prompts:
        raise ValueError(f"its column {column} is empty")
    return prompts


def _header(lines, delimiter):
    try:
        return next(csv.reader(lines, delimiter=delimiter))
    except csv.Error:  # a line longer than any header
        return []


def _rows(lines, delimiter):
    """The rows that are not blank, header first; ValueError for one that is not as wide as the header."""
    try:
        return _read(lines, delimiter)
    except ValueError:
        if delimiter != "\t":
            raise
    return _read(lines, delimiter, quoting=csv.QUOTE_NONE)  # quotation marks that belong to the prompts


def _read(lines, delimiter, **quoting):
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True, **quoting)
    rows = []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append(row)
                if len(row) != len(rows[0]):
                    raise ValueError(
                        f"line {reader.line_num} has {len(row)} cells where the first line has {len(rows[0])}; "
                        "a prompt that holds the separator or a line break stands in quotation marks"
                    )
    except csv.Error as reason:
        raise ValueError(f"line {reader.line_num} is not one of a table ({reason})") from None
    return rows


def told(names, most=10, letters=40):
    """Names in a line, cut to what can be read."""
    names = [name if len(name) <= letters else f"{name[:letters]}..." for name in map(str, names)]
    return ", ".join(names[:most] + ["..."] * (len(names) > most)) or "none"
