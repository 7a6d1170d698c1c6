"""What a predictor learns: an expression over the numbers of labelled rows, such as `-1*FID-GT-1k - 150*avg_bits`."""

import ast
import operator
import re
import warnings

import numpy as np

from errors import InputError, first_line, shown
from quant.checked_files import is_number

FUNCTIONS = {name: 1 for name in ("abs", "exp", "log", "log2", "log10", "sqrt", "square", "tanh")} | {
    **{"minimum": 2, "maximum": 2, "clip": 3},  # and how many arguments each takes: numpy's own would take one to write to
}
OPERATORS = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos},
}
LONGEST, DEEPEST = 2000, 100  # characters of an expression, and operations in one another


def evaluate(expression, rows):
    """The expression's value for each row [N], a float64 array; InputError says what of it is not understood.

    It may hold the rows' numeric keys as they are written, numbers, + - * / ** and parentheses, and the functions
    of numpy in FUNCTIONS. All is computed in double precision: what has no value, or no finite one, is NaN or infinite.
    Where a key is missing from a row, or its value is none, the result is NaN.
    """
    keys = sorted({key for row in rows for key, value in row.items() if is_number(value)}, key=len, reverse=True)
    # Keys hold characters that mean something else in an expression: each is given a name without.
    names = {f"__label_{place}": key for place, key in enumerate(keys)}
    tree = _parsed(expression, names)
    columns = {name: np.array([_value(row.get(key)) for row in rows]) for name, key in names.items()}
    with np.errstate(all="ignore"):
        values = _walk(tree, columns, DEEPEST)
    if isinstance(values, ast.AST):
        raise InputError(
            f"--target {shown(expression)}: {_said(values, names)} is not understood; the labels have "
            f"{', '.join(sorted(keys))}; functions are "
            f"{', '.join(f'{name} of {count}' for name, count in FUNCTIONS.items())}"
        )
    return np.broadcast_to(np.asarray(values, dtype=np.float64), len(rows)).copy()


def _parsed(expression, names):
    """The expression as a tree in which keys stand under their `names` {name: key}."""
    text = expression
    if names:
        places = {key: name for name, key in names.items()}
        pattern = "|".join(rf"(?<![\w.]){re.escape(key)}(?!\w)" for key in places)
        text = re.sub(pattern, lambda match: places[match.group()], expression)
    try:
        if len(expression) > LONGEST:
            raise ValueError(f"longer than {LONGEST} characters")
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as reason:
        raise InputError(f"--target {shown(expression)}: not an expression ({first_line(reason)})") from None


def _walk(node, columns, deepest):
    """The value of a tree, a float64 array or number; the part of it that is not understood where there is one."""
    if deepest == 0:
        return node
    if isinstance(node, ast.Constant) and is_number(node.value):
        return np.float64(node.value)
    if isinstance(node, ast.Name) and node.id in columns:
        return columns[node.id]
    function, parts = _operation(node)
    values = [_walk(part, columns, deepest - 1) for part in parts]
    unknown = next((value for value in values if isinstance(value, ast.AST)), None)
    return unknown or (node if function is None else function(*values))


def _operation(node):
    """(function, parts of the tree that are its arguments); (None, ()) if it is no operation that is known."""
    if isinstance(node, ast.BinOp):
        return OPERATORS.get(type(node.op)), (node.left, node.right)
    if isinstance(node, ast.UnaryOp):
        return OPERATORS.get(type(node.op)), (node.operand,)
    is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords
    if is_call and FUNCTIONS.get(node.func.id) == len(node.args):
        return getattr(np, node.func.id), node.args
    return None, ()


def _said(node, names):
    """A part of the tree as it was written."""
    try:
        text = ast.unparse(node)
    except RecursionError:
        return "what is so deep in parentheses"
    return shown(re.sub(r"__label_\d+", lambda match: names.get(match.group(), match.group()), text))


def _value(value):
    return float(value) if is_number(value) else np.nan
