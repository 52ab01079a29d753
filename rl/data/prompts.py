"""Problems with their token ids, and the requests that ask a policy or a population for their completions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rl.models.tokenizer import Tokenizer
from rl.tasks.types import Problem, TaskError
from rl.types import Requests, pad


class Prompts(NamedTuple):
    """Problems with their token ids, host only.

    Attributes:
        problems: see `rl.tasks.types.Problem`.
        ids: tokens of each prompt, at least one.
    """

    problems: list[Problem]
    ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.problems)

    def take(self, rows: Sequence[int]) -> "Prompts":
        """Some of them, in this order."""
        return Prompts([self.problems[i] for i in rows], [self.ids[i] for i in rows])

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.ids))


def encode(problems: Sequence[Problem], tokenizer: Tokenizer) -> Prompts:
    """Token ids of every prompt.

    Raises:
        TaskError: no problems, or a prompt without tokens.
    """
    ids = [tokenizer.encode(problem.prompt) for problem in problems]
    empty = [problem.id for problem, tokens in zip(problems, ids, strict=True) if not tokens]
    if not ids or empty:
        raise TaskError(f"every prompt needs at least one token; {len(ids)} prompts, without tokens: {empty[:8]}")
    return Prompts(list(problems), ids)


def population_requests(
    prompts: Prompts, members: int, samples: int, budget: int, first: int, *, common: bool = True
) -> Requests:
    """Every member answers every prompt `samples` times; row (m E + e) G + g is sample g of member m on prompt e.

    Args:
        members: M; 0 for the unperturbed mean alone (member -1, M = 1).
        samples: G per member and prompt.
        budget: most tokens of an answer.
        first: uids count from it; a run never uses one twice if it goes on from the last one each time.
        common: whether members share the randomness of (prompt, sample), so that they differ by their weights alone.
    """
    rows, count = len(prompts) * samples, max(members, 1)
    prompt, length = pad(prompts.ids)
    each = lambda x: np.tile(np.repeat(x, samples, axis=0), (count,) + (1,) * (x.ndim - 1))
    of_row = np.tile(np.arange(rows), count) if common else np.arange(rows * count)
    uid = (first + of_row) % 2**32
    member = np.repeat(np.arange(members, dtype=np.int32), rows) if members else np.full(rows, -1, np.int32)
    return Requests(each(prompt), each(length), np.full(rows * count, budget, np.int32), uid.astype(np.uint32), member)


def split_solution(tokenizer: Tokenizer, prompt: str, solution: str) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of the solution that continues it, without what a tokenizer puts in front of every text.

    Encoded together; where a token spans the border it belongs to the solution.
    """
    alone, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + solution)
    shared = next(
        (i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), min(len(alone), len(whole))
    )
    return whole[:shared], whole[shared:]


def completion_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], stop: Sequence[int]) -> str:
    """The text that `tokens` add to a prompt, without the stop token at their end."""
    tokens = list(tokens)
    if tokens and tokens[-1] in stop:
        tokens.pop()
    # Decoded together with the prompt: by itself, a first token loses its leading space in some tokenizers.
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens)
