"""Which earlier groups of answers a step trains on again. One file, one method; see `rl.slots` for how the config names it.

A batch is B groups; a group is the G answers to one prompt with their rewards, and is never torn apart, because advantages
are relative to it. Every method:

    default_config() -> ConfigDict
    init(config, shape: Shape) -> state
    apply(config, state, step: int, count: int) -> Drawn
        Before anything is sampled: which stored groups make up part of this step's batch of `count` groups, and how many
        fresh ones the loop has to add (`drawn.fresh`); `step` counts from 0. Reads only.
    update(config, state, step: int, fresh: Groups) -> (state, metrics: dict[str, float])
        After the verdicts: the step's fresh groups (not those drawn) may enter the buffer.

    drawn = slot.apply(state, step, count)
    state_of_selection, rows, _ = selection.choose(..., drawn.fresh, ...)
    fresh = Groups.make(rows, rollouts, scored)
    batch = join(fresh, drawn.groups)     # the update; advantages from the stored rewards, logp is the behaviour policy
    state, metrics = slot.update(state, step, fresh)

Replay is for policy gradients only. There, an old answer is evidence about the present policy as soon as it is weighted by
the ratio of the two policies' probabilities, which the stored log-probs of the policy that sampled it give. In evolution a
reward is evidence about the *perturbation* that produced the answer: its direction in parameter space around the mean of
its generation. The answers of an old generation say nothing about this one's perturbations, and there is no ratio to
correct by, as the answer's probability under a member enters the estimate nowhere. So evolution always uses `none`.
"""

from typing import NamedTuple, Self

import numpy as np

from rl.types import Rollouts, Scored


class Shape(NamedTuple):
    """Sizes that do not change during a run.

    Attributes:
        groups: B, groups of a batch.
        samples: G, answers of a group.
        longest: L, most tokens of an answer.
        seed: of every random choice.
    """

    groups: int
    samples: int
    longest: int
    seed: int


class Groups(NamedTuple):
    """Judged answers, host only; P groups of G answers of at most L tokens, padded with 0.

    Attributes:
        problem: i32 [P], index in the pool of training problems, whose prompts are therefore not stored.
        tokens: i32 [P, G, L].
        length: i32 [P, G], tokens of an answer; the mask is `arange(L) < length`.
        logp: f32 [P, G, L], of each token under the distribution that sampled it (the behaviour policy).
        version: i32 [P, G, L], of the policy that wrote each token.
        value: f32 [P, G], reward; 0 where not judged.
        ok: bool [P, G], whether an answer was judged.
    """

    problem: np.ndarray
    tokens: np.ndarray
    length: np.ndarray
    logp: np.ndarray
    version: np.ndarray
    value: np.ndarray
    ok: np.ndarray

    @property
    def size(self) -> int:
        """P."""
        return len(self.problem)

    @property
    def mask(self) -> np.ndarray:
        """bool [P, G, L], where there are tokens."""
        return np.arange(self.tokens.shape[2]) < self.length[..., None]

    @property
    def informative(self) -> np.ndarray:
        """bool [P], whether the judged rewards of a group differ: 0 < mean < 1 where rewards are 0 or 1."""
        high = np.where(self.ok, self.value, -np.inf).max(axis=1, initial=-np.inf)
        low = np.where(self.ok, self.value, np.inf).min(axis=1, initial=np.inf)
        return high > low

    def take(self, rows: np.ndarray) -> Self:
        """Some groups, in the order given."""
        return type(self)(*(x[rows] for x in self))

    @classmethod
    def make(cls, problem: np.ndarray, rollouts: Rollouts, scored: Scored) -> Self:
        """Groups of a step's answers; row p G + g of the rollouts is sample g of prompt p.

        Raises:
            ValueError: rows that are no whole number of groups, verdicts of other rows, or log-probs that are not finite.
        """
        groups, rows = len(problem), len(rollouts)
        if not groups or rows % groups or len(scored.value) != rows:
            raise ValueError(
                f"groups need the same number of answers to each of {groups} problems, with one verdict each; got {rows} "
                f"answers, {len(scored.value)} verdicts"
            )
        split = lambda x, dtype: np.asarray(x, dtype).reshape(groups, rows // groups, *np.shape(x)[1:])
        made = cls(
            np.asarray(problem, np.int32), split(rollouts.tokens, np.int32), split(rollouts.length, np.int32),
            split(rollouts.logp, np.float32), split(rollouts.version, np.int32),
            split(np.where(scored.ok, scored.value, 0), np.float32), split(scored.ok, bool),
        )  # fmt: skip
        made.check()
        return made

    def check(self) -> None:
        """Raises ValueError where arrays do not fit together, or a log-prob or reward is not a finite number."""
        shape = self.tokens.shape
        for name, x in self._asdict().items():
            wanted = shape[: {"problem": 1, "length": 2, "value": 2, "ok": 2}.get(name, 3)]
            if x.shape != wanted:
                raise ValueError(f"{name} must have shape {wanted}, as tokens {shape} say; got {x.shape}")
        for name, bad in (("logp", self.mask & ~np.isfinite(self.logp)), ("value", self.ok & ~np.isfinite(self.value))):
            if bad.any():
                raise ValueError(
                    f"{name} of answers must be finite; {bad.sum()} are not, first of problem "
                    f"{self.problem[np.argwhere(bad)[0][0]]}: leave such groups out"
                )


class Drawn(NamedTuple):
    """What `apply` takes from the buffer.

    Attributes:
        groups: stored ones, or None.
        fresh: how many groups are left for the loop to sample.
    """

    groups: Groups | None
    fresh: int


def join(fresh: Groups, drawn: Groups | None) -> Groups:
    """One batch, fresh groups first; tokens padded to the longer of both.

    Raises:
        ValueError: groups of different numbers of samples.
    """
    if drawn is None:
        return fresh
    if fresh.tokens.shape[1] != drawn.tokens.shape[1]:
        raise ValueError(
            f"groups of one batch have equally many samples; got {fresh.tokens.shape[1]} and {drawn.tokens.shape[1]}"
        )
    longest = max(fresh.tokens.shape[2], drawn.tokens.shape[2])
    return Groups(*(np.concatenate(pair) for pair in zip(widen(fresh, longest), widen(drawn, longest), strict=True)))


def widen(groups: Groups, longest: int) -> Groups:
    """Room for `longest` tokens.

    Raises:
        ValueError: there are more.
    """
    extra = longest - groups.tokens.shape[2]
    if extra < 0 and groups.length.max(initial=0) > longest:
        raise ValueError(f"answers must have at most {longest} tokens; got {groups.length.max()}")
    fit = lambda x: x[..., :longest] if extra < 0 else np.pad(x, ((0, 0), (0, 0), (0, extra)))
    return groups._replace(tokens=fit(groups.tokens), logp=fit(groups.logp), version=fit(groups.version))
