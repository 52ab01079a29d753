"""Cipher: a word is to be answered by its letters moved on in the alphabet. A language bandit whose optimum is known exactly.

One prompt, one answer, one reward. A prompt is a word of `low` to `high` letters, filled up with "." to `high` characters:
of 8 letters "ah.." is to be answered by "ed", four places on and round the end; what follows on that is not looked at. A
policy has to find out what becomes of each letter and where to look it up; no word tells it, only rewards do.

Optimum: `optimum(problems)`, 1 for every word that can be answered, and 0 for a word with a `forbidden` letter, which no
completion answers. Difficulty grows with length: an untrained policy that draws at random among the n letters, "." and the
end is right about a word of k letters with probability (n + 2)^-k. What short words teach, long ones need too.
"""

import random
import string
from collections.abc import Sequence
from typing import Any

from rl.tasks import _draw
from rl.tasks.types import Problem, Task, TaskError, Verdict

_FILL = "."


def make(letters: int = 8, length: tuple[int, int] = (1, 4), partial: float = 0.5, forbidden: str = "") -> Task:
    """Builds the task.

    Args:
      letters: size of the alphabet, 2 to 26, from "a" on; a letter becomes the one `letters // 2` places on.
      length: fewest and most letters of a word, within 1 to 8; every length is as frequent, as far as there are words.
      partial: how much of the value of a wrong answer the part `right` makes, in [0, 1):
        `value = 1 if exact else partial * parts["right"]`.
      forbidden: letters whose words no completion answers; some letter must be left.

    Returns:
      The `Task`.

    Raises:
      TaskError: an option out of range.
    """
    if isinstance(letters, bool) or not isinstance(letters, int) or not 2 <= letters <= 26:
        raise TaskError(f"letters must be an int from 2 to 26, not {letters!r}")
    low, high = length
    if not 1 <= low <= high <= 8:
        raise TaskError(f"length must be (low, high) within 1 to 8, not {(low, high)}")
    if not 0 <= partial < 1:
        raise TaskError(f"partial must be in [0, 1), where 1 is what an exact answer is worth, not {partial}")
    alphabet = string.ascii_lowercase[:letters]
    if set(forbidden) >= set(alphabet) or set(forbidden) - set(alphabet):
        raise TaskError(f"forbidden must be some of the letters {alphabet!r}, not all of them; got {forbidden!r}")

    def draw(rng: random.Random) -> tuple[str, Problem]:
        word = "".join(_draw.choice(rng, alphabet) for _ in range(_draw.between(rng, low, high)))
        text = None if set(word) & set(forbidden) else encipher(word, alphabet)
        return word, Problem(word, word.ljust(high, _FILL), {"text": text, "partial": float(partial)}, text or "")

    return Task(
        "cipher",
        lambda split, count, seed: _draw.generate("cipher", draw, split, count, seed),
        f"{__name__}:verify",
        alphabet + _FILL,
        answer_of,
    )


def encipher(word: str, alphabet: str) -> str:
    """Every letter moved half the alphabet on, round its end."""
    return "".join(alphabet[(alphabet.index(c) + len(alphabet) // 2) % len(alphabet)] for c in word)


def verify(completion: str, answer: dict[str, Any]) -> Verdict:
    """Compares a completion with the enciphered word, character by character, as far as the word goes.

    Args:
      completion: untrusted.
      answer: a problem's `answer`; its `text` is None where no completion is right.

    Returns:
      A `Verdict` with parts `exact`, and `right`: the share of characters that are right, in [0, 1].
    """
    text = answer["text"]
    if text is None:
        return Verdict(0.0, "ok", {"exact": 0.0, "right": 0.0})
    matches = sum(a == b for a, b in zip(completion, text, strict=False))
    parts = {"exact": float(matches == len(text)), "right": matches / len(text)}
    return Verdict(1.0 if parts["exact"] else answer["partial"] * parts["right"], "ok", parts)


def answer_of(completion: str) -> str | None:
    """The completion as it is; None where it is empty."""
    return completion or None


def optimum(problems: Sequence[Problem]) -> float:
    """Mean reward of a perfect policy: the share of problems that can be answered."""
    return sum(problem.answer["text"] is not None for problem in problems) / len(problems)
