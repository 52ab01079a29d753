"""Short stories under constraints: continue an opening so that given words occur, the last sentence is finished and the
length stays within bounds.

Made for models of the TinyStories family. The opening names the words ("She had a red ball and a big dog."), so a model can
tell which ones it has to take up again; the nouns are those that the 260,032-parameter model takes up neither always nor
never (in 25 to 50 % of sampled continuations of 96 tokens where they are named first).
"""

import random
import re
from typing import Any

from rl.tasks import _draw
from rl.tasks.types import Problem, Task, TaskError, Verdict

WEIGHTS = {"words": 0.5, "end": 0.25, "length": 0.25}
NOUNS = (
    "ball", "bird", "boat", "book", "box", "bunny", "cake", "car", "cat", "dog", "fish", "hat", "rock", "toy", "tree",
    "truck",
)  # fmt: skip
ADJECTIVES = ("big", "blue", "little", "new", "red")
_NAMES = (
    ("Lily", "girl", "She"), ("Mia", "girl", "She"), ("Sue", "girl", "She"), ("Anna", "girl", "She"),
    ("Tim", "boy", "He"), ("Tom", "boy", "He"), ("Ben", "boy", "He"), ("Max", "boy", "He"),
)  # fmt: skip
_MAX_CHARACTERS = 20_000
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?", re.ASCII)
_ENDS = (".", "!", "?", '."', '!"', '?"')


def make(words: int = 2, length: tuple[int, int] = (10, 40), weights: dict[str, float] | None = None) -> Task:
    """Builds the task.

    Args:
      words: how many words the completion has to contain, 1 to 4; as whole words, in any case.
      length: fewest and most words in a completion.
      weights: `value = sum_k weights[k] * parts[k]` over the parts "words", "end" and "length"; they sum to 1. None:
        0.5, 0.25, 0.25.

    Returns:
      The `Task`; completions end where the model ends the story or runs out of tokens.

    Raises:
      TaskError: an option out of range.
    """
    if not 1 <= words <= 4:
        raise TaskError(f"words must be within 1 to 4, not {words}")
    if not 1 <= length[0] <= length[1]:
        raise TaskError(f"length must be (fewest, most) with 1 <= fewest <= most, not {tuple(length)}")
    weights = dict(WEIGHTS if weights is None else weights)
    if weights.keys() != WEIGHTS.keys() or min(weights.values()) < 0 or abs(sum(weights.values()) - 1) > 1e-9:
        raise TaskError(f"weights must give {', '.join(WEIGHTS)} at least 0 each, with sum 1, not {weights}")

    def draw(rng: random.Random) -> tuple[str, Problem]:
        nouns = list(NOUNS)
        _draw.shuffle(rng, nouns)
        chosen = nouns[:words]
        name, kind, pronoun = _draw.choice(rng, _NAMES)
        things = [f"a {_draw.choice(rng, ADJECTIVES)} {noun}" for noun in chosen]
        listed = " and ".join([", ".join(things[:-1]), things[-1]] if words > 1 else things)
        opening = f"Once upon a time, there was a little {kind} named {name}. {pronoun} had {listed}."
        answer = {"words": chosen, "length": list(length), "weights": weights}
        # Split by the words: those of a test problem never occur together in training.
        return " ".join(sorted(chosen)), Problem(_draw.digest(opening), opening, answer)

    return Task(
        "stories",
        lambda split, count, seed: _draw.generate("stories", draw, split, count, seed),
        f"{__name__}:verify",
        None,
    )


def verify(completion: str, answer: dict[str, Any]) -> Verdict:
    """Checks the constraints; the opening is not part of the completion.

    Args:
      completion: untrusted; one of more than 20,000 characters is worth 0.
      answer: a problem's `answer`.

    Returns:
      A `Verdict` whose value, in [0, 1], is the weighted sum of its parts: `words` (how many of the words occur, in
      [0, 1]), `end` (1 if it ends in ".", "!" or "?", perhaps with a closing quote) and `length` (1 if the number of
      words is within bounds).
    """
    parts = dict.fromkeys(WEIGHTS, 0.0)
    if len(completion) <= _MAX_CHARACTERS:
        found = _WORD.findall(completion.lower())
        present = set(found)
        parts["words"] = sum(word in present for word in answer["words"]) / len(answer["words"])
        parts["end"] = float(completion.rstrip().endswith(_ENDS))
        parts["length"] = float(answer["length"][0] <= len(found) <= answer["length"][1])
    return Verdict(sum(answer["weights"][name] * part for name, part in parts.items()), "ok", parts)
