"""What a language task is: problems with prompts, and the name of a function that judges completions."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Status = Literal["ok", "timeout", "error", "unscorable"]
STATUSES: tuple[Status, ...] = ("ok", "timeout", "error", "unscorable")


class TaskError(ValueError):
    """A task, an option or a data file that breaks a stated rule."""


class Problem(NamedTuple):
    """One prompt.

    Attributes:
      id: stable name, unique in its split.
      prompt: the text a model continues.
      answer: what the verifier needs, a JSON value; never shown to the model.
      solution: a completion the verifier gives 1, where the task can make one; otherwise empty.
    """

    id: str
    prompt: str
    answer: Any
    solution: str = ""


class Verdict(NamedTuple):
    """What a verifier says about one completion.

    Attributes:
      value: the reward, finite, higher is better; 0 where `status` is not "ok".
      status: "ok"; "timeout" (the verifier overran its deadline); "error" (it raised or its process died);
        "unscorable" (it gave no finite number).
      parts: named parts of the value, such as `{"format": 1.0, "exact": 0.0}`.
    """

    value: float
    status: Status
    parts: dict[str, float]


class Task(NamedTuple):
    """A family of problems.

    Attributes:
      name: what `rl.tasks.make` was asked for.
      problems: `(split, count, seed) -> [Problem]` with split "train" or "test". Same arguments, same problems; the
        first problems of a longer list are those of a shorter one; no problem occurs twice in a list; the two splits
        have no problem in common, whatever the seeds.
      verify: `module:function` of `verify(completion, answer) -> Verdict`, which a process without jax can import.
      alphabet: the characters that prompts and solutions are made of, for a tokenizer of characters; None where the
        prompts are ordinary text.
      answer_of: `completion -> text`, the final answer in a completion, equal answers written alike, for majority votes; None
        where it gives none. Completions with one answer to a problem are worth 1 all or not at all. The field is None where
        completions have no final answer that could be counted.
    """

    name: str
    problems: Callable[[str, int, int], list[Problem]]
    verify: str
    alphabet: str | None
    answer_of: Callable[[str], str | None] | None = None


def check_request(split: str, count: int) -> None:
    """Raises `TaskError` unless `split` is "train" or "test" and `count` is at least 0."""
    if split not in ("train", "test"):
        raise TaskError(f'split must be "train" or "test", not {split!r}')
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise TaskError(f"count must be an int of at least 0, not {count!r}")
