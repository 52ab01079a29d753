"""The parser against values worked out by hand, against Python's own arithmetic, and against hostile text."""

import ast
import contextlib
import operator
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.tasks._expression import Expression, ExpressionError, parse

APPLY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def twin(node):
    """Walks Python's syntax tree in exact rationals: precedence and associativity are Python's, not ours."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    return APPLY[type(node.op)](twin(node.left), twin(node.right))


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7", 7, (7,)),
        ("9-5-2", 2, (9, 5, 2)),
        ("9-(5-2)", 6, (9, 5, 2)),
        ("24/4/2", 3, (24, 4, 2)),
        ("24/(4/2)", 12, (24, 4, 2)),
        ("2+3*4", 14, (2, 3, 4)),
        ("(2+3)*4", 20, (2, 3, 4)),
        ("8/(3-8/3)", 24, (8, 3, 8, 3)),  # only rationals get this right: 3 - 8/3 = 1/3
        ("1/3+1/3+1/3", 1, (1, 3, 1, 3, 1, 3)),
        (" ( ( 2 ) ) \n", 2, (2,)),
        ("6\u00d77\u00f72\u22121", 20, (6, 7, 2, 1)),
        ("0*5", 0, (0, 5)),
        ("1/0", None, (1, 0)),
        ("5*(2/(3-3))", None, (5, 2, 3, 3)),
    ],
)
def test_values(text, value, numbers):
    assert parse(text) == Expression(None if value is None else Fraction(value), numbers)


def test_a_leading_minus_only_where_it_is_asked_for():
    assert parse("-3+5", signed=True) == Expression(Fraction(2), (3, 5))
    assert parse("-2*3+1", signed=True).value == -5
    for text, signed in (("-3+5", False), ("2+-3", True), ("--3", True), ("(-3)", True), ("-", True)):
        with pytest.raises(ExpressionError):
            parse(text, signed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a number, found 'the end'"),
        ("2+", "expected a number, found 'the end'"),
        ("*2", r"expected a number, found '\*'"),
        ("2 3", "unexpected '3'"),
        ("(2", r"expected '\)', found 'the end'"),
        ("2)", r"unexpected '\)'"),
        ("2(3)", r"unexpected '\('"),
        ("()", r"expected a number, found '\)'"),
        ("2**3", r"expected a number, found '\*'"),
        ("2.5", r"unexpected '\.'"),
        ("1e9", "unexpected 'e'"),
        ("2+x", "unexpected 'x'"),
        ("__import__('os')", "unexpected '_'"),
        ("\u0663", "unexpected"),  # a digit to str.isdigit, not to us
        ("\u00b2", "unexpected"),
        ("007", "no leading zero"),
        ("1234567890", "1 to 9 digits"),
        ("(" * 17 + "1" + ")" * 17, "16 nested brackets"),
        ("1" + "+1" * 32, "64 tokens"),
        ("1" + " " * 200, "200 characters"),
    ],
)
def test_what_is_no_expression(text, message):
    with pytest.raises(ExpressionError, match=message):
        parse(text)


def test_the_limits_themselves_are_allowed():
    assert parse("(" * 16 + "1" + ")" * 16).value == 1
    assert parse("1" + "+1" * 31 + " " * 137).value == 32
    assert parse("999999999").value == 999_999_999


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner, st.booleans()).map(
        lambda t: f"({t[0]}{t[1]}{t[2]})" if t[3] else f"{t[0]}{t[1]}{t[2]}"
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(expressions)
def test_equals_python_arithmetic(text):
    try:
        expected = twin(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        expected = None
    assert parse(text).value == expected


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet="0123456789+-*/() =", max_size=300)), st.booleans())
def test_any_text_is_an_expression_or_an_expression_error(text, signed):
    try:
        parse(text, signed)
    except ExpressionError:
        return


@pytest.mark.parametrize(
    "text",
    ["9" * 10**6, "(" * 10**6, "9*" * 10**6, "999999999*" * 19 + "1", "1/" * 31 + "1", "1/999999999/" * 16 + "3", " " * 10**6],
)  # fmt: skip
def test_hostile_text_takes_no_time(text):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with contextlib.suppress(ExpressionError):
            parse(text)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01
