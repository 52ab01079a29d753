"""Countdown: combine the given numbers with + - * / to reach a target.

Prompts are short enough for a small model of characters, "7 3 25=46:", or plain English that asks for the answer
between `<answer>` tags. Every problem has a solution with whole, non-negative intermediate results.
"""

import collections
import functools
import random
from fractions import Fraction
from typing import Any, NamedTuple

from rl.tasks import _draw
from rl.tasks._expression import Expression, ExpressionError, parse, plain
from rl.tasks.types import Problem, Task, TaskError, Verdict

OPERATIONS = "+-*/"
# Parts of the value of a wrong answer; an exact one is worth 1.
PARTIAL = {"format": 0.1, "numbers": 0.2, "close": 0.2}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


class _Node(NamedTuple):
    """A value, its text, and the precedence of the text's outermost operation (3: a number)."""

    value: int
    text: str
    precedence: int


class _Read(NamedTuple):
    """A completion's expression, as text and parsed, and what "= number" after it claims, if anything."""

    text: str
    expression: Expression
    claims: tuple[Fraction | None, ...]


def make(
    numbers: tuple[int, int] = (3, 4),
    operands: tuple[int, int] = (1, 25),
    target: tuple[int, int] = (1, 100),
    operations: str = OPERATIONS,
    uses: str = "all",
    style: str = "compact",
    shuffle: bool = True,
    partial: dict[str, float] | None = None,
) -> Task:
    """Builds the task.

    Args:
      numbers: fewest and most numbers of a problem, within 1 to 8.
      operands: smallest and largest number, within 1 to 10^6.
      target: smallest and largest target, within 0 to 10^9.
      operations: those that solutions may need, some of "+-*/". A completion may use all four.
      uses: "all" (each number exactly once) or "some" (each at most once, at least one of them).
      style: "compact" ("7 3 25=46:") or "english" (a request that wants `<answer>` tags).
      shuffle: whether the numbers come in random order; if not, in descending order.
      partial: weights of the parts "format", "numbers" and "close" in the value of an answer that is not exact:
        `value = 1 if exact else sum_k partial[k] * parts[k]`. None: 0.1, 0.2, 0.2; {}: only exact answers count.

    Returns:
      The `Task`. `answer` is a dict with the numbers, the target and the options of `verify`.

    Raises:
      TaskError: an option out of range.
    """
    for name, (low, high), limit in (
        ("numbers", numbers, (1, 8)),
        ("operands", operands, (1, 10**6)),
        ("target", target, (0, 10**9)),
    ):
        if not limit[0] <= low <= high <= limit[1]:
            raise TaskError(f"{name} must be (low, high) within {limit[0]} to {limit[1]}, not {(low, high)}")
    if not operations or set(operations) - set(OPERATIONS):
        raise TaskError(f"operations must be some of {OPERATIONS!r}, not {operations!r}")
    for name, value, allowed in (("uses", uses, ("all", "some")), ("style", style, ("compact", "english"))):
        if value not in allowed:
            raise TaskError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    options = {"uses": uses, "tags": style == "english", "partial": _weights(PARTIAL if partial is None else partial)}

    def draw(rng: random.Random) -> tuple[str, Problem] | None:
        size = _draw.between(rng, *numbers)
        drawn = sorted((_draw.between(rng, *operands) for _ in range(size)), reverse=True)
        solved = _combine(rng, drawn, operations)
        if shuffle:
            _draw.shuffle(rng, drawn)
        if solved is None or not target[0] <= solved.value <= target[1]:
            return None
        # The order of the numbers is not part of the key: two orders of one problem never end up in both splits.
        key = f"{','.join(map(str, sorted(drawn)))}={solved.value}"
        answer = {"numbers": drawn, "target": solved.value, **options}
        solution = f" <answer>{solved.text}</answer>" if style == "english" else solved.text
        return key, Problem(key, _prompt(drawn, solved.value, uses, style), answer, solution)

    return Task(
        "countdown",
        lambda split, count, seed: _draw.generate("countdown", draw, split, count, seed),
        f"{__name__}:verify",
        "0123456789+-*/()=: " if style == "compact" else None,
        functools.partial(answer_of, tags=options["tags"]),
    )


def verify(completion: str, answer: dict[str, Any]) -> Verdict:
    """Checks an expression in exact rational arithmetic.

    The completion is the expression, or has it between the last `<answer>` and `</answer>` (which the style "english"
    requires); "= target" may follow it. Anything beyond the limits of `rl.tasks._expression` has no format.

    Args:
      completion: untrusted.
      answer: a problem's `answer`.

    Returns:
      A `Verdict` with parts, each in [0, 1]: `format` (it is an expression), `numbers` (how many of the numbers are
      those it may use: `|used & given| / max(|used|, |given|)` as multisets, without `|given|` for uses "some"),
      `close` (`1 / (1 + |value - target|)` where the numbers are right, otherwise 0) and `exact`.
    """
    parts = {"format": 0.0, "numbers": 0.0, "close": 0.0, "exact": 0.0}
    found = _read(completion, answer["tags"])
    if found is not None and all(claim == answer["target"] for claim in found.claims):
        expression = found.expression
        used, given = collections.Counter(expression.numbers), collections.Counter(answer["numbers"])
        most = max(used.total(), given.total() if answer["uses"] == "all" else 0)
        parts["format"] = 1.0
        parts["numbers"] = (used & given).total() / most
        if parts["numbers"] == 1.0 and expression.value is not None:
            parts["close"] = float(1 / (1 + abs(expression.value - answer["target"])))
            parts["exact"] = float(expression.value == answer["target"])
    partial = sum(weight * parts[name] for name, weight in answer["partial"].items())
    return Verdict(1.0 if parts["exact"] else partial, "ok", parts)


def answer_of(completion: str, tags: bool = False) -> str | None:
    """The expression in a completion, without spaces; None where there is none, or "= number" after it is not its value.

    Expressions that are written differently are different answers, also where one is as right as the other.
    """
    found = _read(completion, tags)
    honest = found is not None and all(claim == found.expression.value for claim in found.claims)
    return plain(found.text) if honest else None


def _read(completion: str, tags: bool) -> _Read | None:
    text = completion
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        text = completion[start + len("<answer>") : end]
    elif tags:
        return None
    left, equals, right = text.partition("=")
    try:
        return _Read(left, parse(left), (parse(right).value,) if equals else ())
    except ExpressionError:
        return None


def _combine(rng: random.Random, numbers: list[int], operations: str) -> _Node | None:
    """Merges random pairs until one value is left; None if a division would not be whole, or zero gets in the way."""
    nodes = [_Node(number, str(number), 3) for number in numbers]
    while len(nodes) > 1:
        _draw.shuffle(rng, nodes)
        # The larger value first: differences are not negative, and a product has one way to be written.
        large, small = sorted((nodes.pop(), nodes.pop()), key=lambda node: (node.value, node.text), reverse=True)
        operation = _draw.choice(rng, operations)
        value = _apply(large.value, operation, small.value)
        if value is None:
            return None
        rank = _PRECEDENCE[operation]
        left = large.text if large.precedence >= rank else f"({large.text})"
        # On the right, - and / also need brackets around their own rank: 9-(5-2).
        tight = rank + (operation in "-/")
        right = small.text if small.precedence >= tight else f"({small.text})"
        nodes.append(_Node(value, f"{left}{operation}{right}", rank))
    return nodes[0]


def _apply(large: int, operation: str, small: int) -> int | None:
    if operation in "*/" and small <= 1:
        return None  # multiplying or dividing by 1 or 0 is no use of a number
    if operation == "+":
        return large + small
    if operation == "-":
        return large - small
    if operation == "*":
        return large * small
    quotient = Fraction(large, small)
    return quotient.numerator if quotient.denominator == 1 else None


def _prompt(numbers: list[int], target: int, uses: str, style: str) -> str:
    listed = " ".join(map(str, numbers))
    if style == "compact":
        return f"{listed}={target}:"
    often = "exactly once" if uses == "all" else "at most once"
    return (
        f"Combine the numbers {', '.join(map(str, numbers))} with +, -, *, / and brackets so that the result is "
        f"{target}. Use each number {often}. Think step by step, then give the expression alone between <answer> and "
        "</answer>, such as <answer>(1+2)*3</answer>.\n"
    )


def _weights(partial: dict[str, float]) -> dict[str, float]:
    unknown = sorted(partial.keys() - PARTIAL.keys())
    if unknown:
        raise TaskError(f"partial has no part {', '.join(map(repr, unknown))}. The parts are: {', '.join(PARTIAL)}")
    if not all(weight >= 0 for weight in partial.values()) or sum(partial.values()) >= 1:
        raise TaskError(f"weights of parts must be at least 0 and sum to less than 1, what exact is worth: {partial}")
    return {name: float(weight) for name, weight in partial.items()}
