"""Arithmetic on exact rationals from untrusted text: +, -, *, /, brackets and non-negative integers.

    sum     = product (("+" | "-") product)*
    product = atom (("*" | "/") atom)*
    atom    = integer | "(" sum ")"

Integers have no leading zeros and no sign. Everything about an expression is bounded, so hostile text costs nothing.
"""

from fractions import Fraction
from typing import NamedTuple

MAX_CHARACTERS = 200
MAX_TOKENS = 64
MAX_DEPTH = 16
MAX_DIGITS = 9

_DIGITS = frozenset("0123456789")
_SAME = str.maketrans({"\u00d7": "*", "\u00f7": "/", "\u2212": "-"})  # how people type these signs


class ExpressionError(ValueError):
    """Text that is not an expression, or one beyond the limits."""


class Expression(NamedTuple):
    """A parsed expression: its exact value (None after a division by zero) and the integers in it, left to right."""

    value: Fraction | None
    numbers: tuple[int, ...]


def parse(text: str, signed: bool = False) -> Expression:
    """Parses and evaluates one expression.

    Args:
      text: untrusted.
      signed: whether the expression may start with a minus sign, as in "-3+5".

    Returns:
      The `Expression`; with `signed`, `numbers` holds magnitudes.

    Raises:
      ExpressionError: not in the grammar, or more than 200 characters, 64 tokens, 16 nested brackets or 9 digits.
    """
    tokens = _tokenise(text)
    negative = signed and tokens[0] == "-"
    value, end = _sum(tokens, int(negative), 0, negative)
    if tokens[end] != "":
        raise ExpressionError(f"unexpected {tokens[end]!r}")
    return Expression(value, tuple(int(token) for token in tokens if token[:1] in _DIGITS and token))


def plain(text: str) -> str:
    """An expression without spaces, each sign typed in one way."""
    return "".join(text.translate(_SAME).split())


def _tokenise(text: str) -> list[str]:
    """Operators, brackets and integers; an empty token marks the end."""
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"more than {MAX_CHARACTERS} characters")
    text = text.translate(_SAME)
    tokens: list[str] = []
    i = 0
    while i < len(text):
        character = text[i]
        start = i
        i += 1
        if character in " \t\n\r":
            continue
        if character in _DIGITS:
            while i < len(text) and text[i] in _DIGITS:
                i += 1
            _check_integer(text[start:i])
        elif character not in "+-*/()":
            raise ExpressionError(f"unexpected {character!r}")
        tokens.append(text[start:i])
    if len(tokens) > MAX_TOKENS:
        raise ExpressionError(f"more than {MAX_TOKENS} tokens")
    return [*tokens, ""]


def _check_integer(digits: str) -> None:
    if len(digits) > MAX_DIGITS or (digits[0] == "0" and len(digits) > 1):
        raise ExpressionError(f"integers have 1 to {MAX_DIGITS} digits and no leading zero")


def _sum(tokens: list[str], at: int, depth: int, negative: bool = False) -> tuple[Fraction | None, int]:
    total, at = _product(tokens, at, depth)
    if negative and total is not None:
        total = -total
    while tokens[at] in ("+", "-"):
        sign = 1 if tokens[at] == "+" else -1
        term, at = _product(tokens, at + 1, depth)
        total = None if total is None or term is None else total + sign * term
    return total, at


def _product(tokens: list[str], at: int, depth: int) -> tuple[Fraction | None, int]:
    total, at = _atom(tokens, at, depth)
    while tokens[at] in ("*", "/"):
        divide = tokens[at] == "/"
        factor, at = _atom(tokens, at + 1, depth)
        if total is None or factor is None or (divide and factor == 0):
            total = None
        else:
            total = total / factor if divide else total * factor
    return total, at


def _atom(tokens: list[str], at: int, depth: int) -> tuple[Fraction | None, int]:
    token = tokens[at]
    if token == "(":
        if depth == MAX_DEPTH:
            raise ExpressionError(f"more than {MAX_DEPTH} nested brackets")
        value, at = _sum(tokens, at + 1, depth + 1)
        if tokens[at] != ")":
            raise ExpressionError(f"expected ')', found {tokens[at] or 'the end'!r}")
        return value, at + 1
    if token[:1] not in _DIGITS or not token:
        raise ExpressionError(f"expected a number, found {token or 'the end'!r}")
    return Fraction(int(token)), at + 1
