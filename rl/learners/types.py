"""What the training loop asks of a method, whether it evolves or differentiates."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from rl.data.replay import Groups
from rl.models.language import Params
from rl.types import Rollouts, Scored


class Answers(NamedTuple):
    """Judged completions: M members x P prompts x G samples, row (m P + p) G + g; M is 1 where a single policy answers.

    Attributes:
        problem: i32 [P], index of each prompt in the pool of training problems.
        texts: [M P G].
        rollouts, scored: M P G rows.
    """

    problem: np.ndarray
    texts: Sequence[str]
    rollouts: Rollouts
    scored: Scored

    def by_member(self, x: np.ndarray, members: int) -> np.ndarray:
        """[M P G, ...] -> [M, P, G, ...]."""
        return x.reshape(members, len(self.problem), -1, *x.shape[1:])

    def take(self, prompts: np.ndarray) -> Self:
        """Some prompts of a single policy's, in this order, with all their samples."""
        samples = len(self.texts) // len(self.problem)
        rows = (np.asarray(prompts)[:, None] * samples + np.arange(samples)).reshape(-1)
        texts = [self.texts[row] for row in rows]
        return Answers(self.problem[prompts], texts, self.rollouts.take(rows), self.scored.take(rows))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Several rounds of a single policy's."""
        return cls(
            np.concatenate([part.problem for part in parts]), [text for part in parts for text in part.texts],
            Rollouts.join([part.rollouts for part in parts]), Scored.join([part.scored for part in parts]),
        )  # fmt: skip


class Learner(NamedTuple):
    """A method as functions of its own state, a pytree of arrays that is all a checkpoint needs.

    Attributes:
        members: of the population that answers every prompt; 0 where one policy does.
        common: whether members share the randomness of each (prompt, sample).
        init: params -> state.
        weights: state -> (what the engine decodes with, its version: updates made before it, a whole number or i32).
        mean: state -> parameters, what is evaluated.
        learn: (state, answers, replayed groups or None) -> (state, metrics as scalars); where `update` is given, they include
            `fitness`, f32 [members], which is no scalar and all that it needs to make the step again.
        plan: state or its shapes -> bytes by name: memory the method needs, before it takes it.
        compile: (state or its shapes, completions of a step) -> the compiled update, whose `memory_analysis` says what it takes
            beside its arguments, the last of which is what it learns from.
        record_experts: whether the engine has to record which experts it used (routing replay).
        update: (state, fitness) -> state, or None where a step cannot be made again from so little.
    """

    members: int
    common: bool
    init: Callable[[Params], Any]
    weights: Callable[[Any], tuple[Any, int | jax.Array]]
    mean: Callable[[Any], Params]
    learn: Callable[[Any, Answers, Groups | None], tuple[Any, dict[str, Any]]]
    plan: Callable[[Any], dict[str, int]]
    compile: Callable[[Any, int], jax.stages.Compiled]
    record_experts: bool = False
    update: Callable[[Any, Any], Any] | None = None


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
