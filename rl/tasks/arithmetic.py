"""Arithmetic chains: "7+3*4-5=" is to be continued by its value, with or without the steps on the way.

A completion with steps does one operation at a time, "7+12-5=19-5=14"; a ":" may stand in front of it.
"""

import random
from fractions import Fraction
from typing import Any

from rl.tasks import _draw
from rl.tasks._expression import MAX_CHARACTERS, ExpressionError, parse
from rl.tasks.types import Problem, Task, TaskError, Verdict

OPERATIONS = "+-*"
_MAX_SEGMENTS = 16
_WORKING = ":"  # in front of steps


def make(
    length: tuple[int, int] = (2, 4),
    operands: tuple[int, int] = (1, 9),
    operations: str = "+-",
    steps: float = 1.0,
    steps_weight: float = 0.0,
) -> Task:
    """Builds the task.

    Args:
      length: fewest and most operations in a chain, within 1 to 12.
      operands: smallest and largest number, within 0 to 999.
      operations: some of "+-*", with the usual precedence.
      steps: share of the solutions that show the steps, in [0, 1]; the others are the value alone. Where both kinds occur,
        those with steps begin with ":", so that a model can choose to work the value out.
      steps_weight: how much of the value of a wrong answer the part `steps` makes, in [0, 1):
        `value = 1 if exact else steps_weight * parts["steps"]`.

    Returns:
      The `Task`.

    Raises:
      TaskError: an option out of range.
    """
    for name, (low, high), limit in (("length", length, (1, 12)), ("operands", operands, (0, 999))):
        if not limit[0] <= low <= high <= limit[1]:
            raise TaskError(f"{name} must be (low, high) within {limit[0]} to {limit[1]}, not {(low, high)}")
    if not operations or set(operations) - set(OPERATIONS):
        raise TaskError(f"operations must be some of {OPERATIONS!r}, not {operations!r}")
    if not 0 <= steps_weight < 1:
        raise TaskError(f"steps_weight must be in [0, 1), where 1 is what an exact answer is worth, not {steps_weight}")
    if not 0 <= steps <= 1:
        raise TaskError(f"steps must be a share in [0, 1], not {steps}")

    def draw(rng: random.Random) -> tuple[str, Problem] | None:
        count = _draw.between(rng, *length)
        numbers = [_draw.between(rng, *operands) for _ in range(count + 1)]
        signs = [_draw.choice(rng, operations) for _ in range(count)]
        shown = steps == 1 or (steps > 0 and rng.random() < steps)
        lines = _steps(numbers, signs)
        if max(map(len, "=".join(lines).split("="))) > MAX_CHARACTERS or abs(int(lines[-1])) >= 10**9:
            return None
        text, solution = lines[0], "=".join(lines[1:]) if shown else lines[-1]
        if shown and steps < 1:
            solution = _WORKING + solution
        answer = {"value": int(lines[-1]), "steps_weight": float(steps_weight)}
        return text, Problem(text, f"{text}=", answer, solution)

    return Task(
        "arithmetic",
        lambda split, count, seed: _draw.generate("arithmetic", draw, split, count, seed),
        f"{__name__}:verify",
        f"0123456789+-*={_WORKING}",
        answer_of,
    )


def verify(completion: str, answer: dict[str, Any]) -> Verdict:
    """Checks the number after the last "=" of a completion, or the completion if it has none.

    Args:
      completion: untrusted; at most 16 segments between equals signs, each within the limits of `rl.tasks._expression`.
      answer: a problem's `answer`.

    Returns:
      A `Verdict` with parts `format` (the last segment is an integer), `exact` (it is the right one) and `steps` (how
      many of the segments have the right value, in [0, 1]).
    """
    parts = {"format": 0.0, "exact": 0.0, "steps": 0.0}
    segments = _segments(completion)
    if len(segments) <= _MAX_SEGMENTS:
        values = [_value(segment) for segment in segments]
        right = [value == answer["value"] for value in values]
        parts["format"] = float(_is_integer(segments[-1]) and values[-1] is not None)
        parts["exact"] = float(right[-1] and parts["format"] == 1.0)
        parts["steps"] = sum(right) / len(right)
    return Verdict(1.0 if parts["exact"] else answer["steps_weight"] * parts["steps"], "ok", parts)


def answer_of(completion: str) -> str | None:
    """The integer after the last "=" of a completion, or the completion if it has none; None where that is no integer."""
    segments = _segments(completion)
    value = _value(segments[-1])
    known = len(segments) <= _MAX_SEGMENTS and _is_integer(segments[-1]) and value is not None
    return str(value) if known else None


def _segments(completion: str) -> list[str]:
    return completion.removeprefix(_WORKING).split("=", _MAX_SEGMENTS)


def _value(segment: str) -> Fraction | None:
    try:
        return parse(segment, signed=True).value
    except ExpressionError:
        return None


def _is_integer(segment: str) -> bool:
    digits = segment.strip().removeprefix("-")
    return digits.isascii() and digits.isdigit()


def _steps(numbers: list[int], signs: list[str]) -> list[str]:
    """The chain, and the chain after each operation: products first, left to right."""
    numbers, signs = list(numbers), list(signs)
    lines = [_chain(numbers, signs)]
    while signs:
        at = signs.index("*") if "*" in signs else 0
        left, right = numbers[at], numbers.pop(at + 1)
        sign = signs.pop(at)
        numbers[at] = left * right if sign == "*" else left + right if sign == "+" else left - right
        lines.append(_chain(numbers, signs))
    return lines


def _chain(numbers: list[int], signs: list[str]) -> str:
    return str(numbers[0]) + "".join(f"{sign}{number}" for sign, number in zip(signs, numbers[1:], strict=True))
