"""What a predictor learns: an expression over the numbers of labelled rows, such as `-1*FID-GT-1k - 150*avg_bits`."""

import ast
import operator
import re

import numpy as np

from errors import InputError, first_line

FUNCTIONS = {
    name: getattr(np, name)
    for name in ("abs", "exp", "log", "log2", "log10", "sqrt", "square", "tanh", "minimum", "maximum", "clip")
}
OPERATORS = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos},
}


def evaluate(expression, rows):
    """The expression's value for each row [N], a float64 array; InputError says what of it is not understood.

    It may hold the rows' numeric keys as they are written, numbers, + - * / ** and parentheses, and the functions
    of numpy in FUNCTIONS. Where a key is missing from a row, or its value is none, the result is NaN.
    """
    keys = sorted({key for row in rows for key, value in row.items() if _is_number(value)}, key=len, reverse=True)
    # Keys hold characters that mean something else in an expression: each is given a name without.
    names = {f"key_{place}": key for place, key in enumerate(keys)}
    text = expression
    if keys:
        places = {key: name for name, key in names.items()}
        pattern = "|".join(rf"(?<![\w.]){re.escape(key)}(?!\w)" for key in keys)
        text = re.sub(pattern, lambda match: places[match.group()], expression)
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as reason:
        raise InputError(f"--target {expression!r}: not an expression ({first_line(reason)})") from None
    columns = {name: np.array([_value(row.get(key)) for row in rows]) for name, key in names.items()}
    with np.errstate(all="ignore"):
        values = _walk(tree, columns, expression, keys)
    return np.broadcast_to(np.asarray(values, dtype=np.float64), len(rows)).copy()


def _walk(node, columns, expression, keys):
    def walk(each):
        return _walk(each, columns, expression, keys)

    if isinstance(node, ast.Constant) and _is_number(node.value):
        return float(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](walk(node.operand))
    if isinstance(node, ast.Name) and node.id in columns:
        return columns[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS and not node.keywords:
        try:
            return FUNCTIONS[node.func.id](*map(walk, node.args))
        except (TypeError, ValueError) as reason:
            raise InputError(f"--target {expression!r}: {node.func.id} ({first_line(reason)})") from None
    said = ast.unparse(node)
    raise InputError(
        f"--target {expression!r}: {said!r} is not understood; the labels have {', '.join(sorted(keys))}; "
        f"functions are {', '.join(FUNCTIONS)}"
    )


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value(value):
    return float(value) if _is_number(value) else np.nan
