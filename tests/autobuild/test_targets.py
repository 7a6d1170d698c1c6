import numpy as np
import pytest

from autobuild.targets import evaluate
from errors import InputError

ROWS = [
    {"FID-GT-1k": 2.0, "avg_bits": 3.5, "bops": 1.0, "config": {}},
    {"FID-GT-1k": 5.0, "avg_bits": 4.0, "bops": 4.0, "config": {}, "ssim": None},
]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("-1*FID-GT-1k - 150*avg_bits", [-527.0, -605.0]),
        ("-FID-GT-1k", [-2.0, -5.0]),
        ("avg_bits-FID-GT-1k", [1.5, -1.0]),
        ("100 - FID-GT-1k**2 / (bops + 1)", [98.0, 95.0]),
        ("sqrt(bops) + log2(bops)", [1.0, 4.0]),
        ("maximum(avg_bits, 3.8)", [3.8, 4.0]),
        ("7", [7.0, 7.0]),
    ],
)
def test_values_by_hand(expression, expected):
    assert evaluate(expression, ROWS).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("expression", "value"),
    [("9**9**9", np.inf), ("1/0", np.inf), ("(0-8)**0.5", np.nan), ("0/0", np.nan), ("2**0.5", 2**0.5), ("1e999", np.inf)],
)
def test_all_is_computed_in_double_precision(expression, value):
    assert np.array_equal(evaluate(expression, ROWS), [value] * 2, equal_nan=True)


def test_rows_are_not_changed():
    for expression in ("minimum(avg_bits, bops)", "clip(bops, 1, 2)", "abs(-avg_bits)"):
        evaluate(expression, ROWS)
    assert evaluate("avg_bits + bops", ROWS).tolist() == [4.5, 8.0]


def test_what_is_missing_is_no_number():
    values = evaluate("ssim + bops", [*ROWS, {"ssim": 0.5, "bops": 1.0}])
    assert np.isnan(values[:2]).all() and values[2] == 1.5


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("-FID", "'FID' is not understood; the labels have FID-GT-1k, avg_bits, bops"),
        ("config", "'config' is not understood"),
        ("avg_bits +", "not an expression"),
        ("__import__('os').system('true')", "is not understood"),
        ("avg_bits.__class__", "is not understood"),
        ("[avg_bits]", "is not understood"),
        ("eval(avg_bits)", "is not understood"),
        ("log(avg_bits, 3, 4, 5)", "'log(avg_bits, 3, 4, 5)' is not understood"),
        ("log(avg_bits, bops)", "is not understood"),  # numpy would write the logarithms into the second
        ("minimum(avg_bits, 3, bops)", "is not understood"),
        ("clip(avg_bits, 1, 2, FID-GT-1k)", "'clip(avg_bits, 1, 2, FID-GT-1k)' is not understood"),
        ("clip(avg_bits, 1)", "clip of 3"),
        ("-" * 500 + "1", "is not understood"),
        ("(" * 250 + "1" + ")" * 250, "not an expression"),
        ("1+" * 1500 + "1", "longer than 2000 characters"),
        ("9" * 400, "is not understood"),
        ("1e5j", "is not understood"),
        ("avg_bits\0", "not an expression"),
        ("avg_bits if bops else 0", "is not understood"),
        ("", "not an expression"),
    ],
)
def test_what_is_not_understood_is_said(expression, message):
    with pytest.raises(InputError) as raised:
        evaluate(expression, ROWS)
    assert message in str(raised.value)
