"""Draws that give the same problems on every Python version, and the split of generated problems."""

import hashlib
import random
from collections.abc import Callable, MutableSequence, Sequence
from typing import TypeVar

from rl.tasks.types import Problem, TaskError, check_request

T = TypeVar("T")
TEST_FRACTION = 0.1
_PATIENCE = 1000  # draws in a row without a new problem before the space counts as exhausted


def below(rng: random.Random, n: int) -> int:
    """Uniform in 0 .. n-1. Only `random()` is promised to stay the same across Python versions, hence not `randrange`."""
    return int(rng.random() * n)


def between(rng: random.Random, low: int, high: int) -> int:
    """Uniform in low .. high, both included."""
    return low + below(rng, high - low + 1)


def choice(rng: random.Random, items: Sequence[T]) -> T:
    """One of `items`, uniform."""
    return items[below(rng, len(items))]


def shuffle(rng: random.Random, items: MutableSequence[T]) -> None:
    """Fisher-Yates in place: each of the n! orders equally likely."""
    for i in range(len(items) - 1, 0, -1):
        j = below(rng, i + 1)
        items[i], items[j] = items[j], items[i]


def digest(text: str) -> str:
    """The first 16 hex digits of the SHA-256 of `text`."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def split_of(key: str, test_fraction: float = TEST_FRACTION) -> str:
    """ "test" for `test_fraction` of all keys, "train" for the others: a property of the key, not of a seed."""
    return "test" if int(digest(key), 16) < test_fraction * 16**16 else "train"


def generate(
    name: str, draw: Callable[[random.Random], tuple[str, Problem] | None], split: str, count: int, seed: int
) -> list[Problem]:
    """The first `count` different problems of a split.

    Args:
      name: the task, part of the seed.
      draw: `rng -> (key, problem)`, or None for a draw to throw away. The key decides the split: problems with equal
        keys are on the same side. Problems with equal ids count as one.
      split: "train" or "test".
      count: how many.
      seed: any int.

    Raises:
      TaskError: bad arguments, or the split has fewer than `count` problems.
    """
    check_request(split, count)
    rng = random.Random(f"{name}/{split}/{seed}")
    found: dict[str, Problem] = {}
    idle = 0
    while len(found) < count:
        drawn = draw(rng)
        if drawn is not None and drawn[1].id not in found and split_of(drawn[0]) == split:
            found[drawn[1].id] = drawn[1]
            idle = 0
        else:
            idle += 1
        if idle > _PATIENCE + 10 * len(found):
            raise TaskError(
                f"{name} found only {len(found)} different {split} problems with these options, not {count}: "
                "ask for fewer, or widen the ranges"
            )
    return list(found.values())
