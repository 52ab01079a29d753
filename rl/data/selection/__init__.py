"""Which problems a step trains on. One file, one method; see `rl.slots` for how the config names it.

Every method, with S answers to a prompt (G samples of one policy, or M members x G):

    default_config() -> ConfigDict
    init(config, pool: Pool) -> state
    apply(config, state, step: int, count: int) -> (state, Choice)
        The next `count` problems; `step` counts from 0. May be called again within a step (a refill): no problem of one
        round comes twice. Where `choice.reference` is not empty there are no rows yet: the method first wants answers of
        the policy that samples to these problems. The loop rolls them out, calls `update`, then `apply` again, which answers.
    update(config, state, judged: Judged) -> (state, metrics: dict[str, float])
        How the answers were judged: of the reference set, and of every step's training groups (`judged.reference` tells).

`choose` is that exchange, so a loop needs two calls a step:

    state, rows, metrics = selection.choose(slot, state, step, count, measure)
    ...                                   # completions, verdicts, the update of the parameters
    state, more = slot.update(state, Judged(step, rows, value, ok))

Selection needs no gradient, only how the answers to a prompt were judged, so it serves evolution as it serves policy
gradients: a prompt that every member solves, or none, tells members as little apart as it tells samples apart. What a
method calls samples are then the members' answers, and the spread over members is what makes a prompt useful.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rl.slots import Slot


class Pool(NamedTuple):
    """What a method may know of the problems before the first step.

    Attributes:
        size: Q, how many there are.
        seed: of every random choice.
        embed: () -> f32 [Q, H], one vector per prompt (`rl.data.embedding.embed`); called once, by methods that need it.
    """

    size: int
    seed: int
    embed: Callable[[], np.ndarray]


class Choice(NamedTuple):
    """What `apply` wants.

    Attributes:
        rows: i32 [count], indices of the pool to train on; empty where a reference set has to be measured first.
        reference: i32 [K], problems to measure first; mostly empty.
        samples: G, answers to each of them; 0 where there are none.
    """

    rows: np.ndarray
    reference: np.ndarray
    samples: int


class Judged(NamedTuple):
    """Verdicts on groups of answers.

    Attributes:
        step: counted from 0.
        rows: i32 [K], problems.
        value: [K, S], rewards, higher is better; 0 where not judged.
        ok: bool [K, S], whether an answer was judged at all.
        reference: whether these are the answers that a `Choice` asked for; else a step's training groups.
    """

    step: int
    rows: np.ndarray
    value: np.ndarray
    ok: np.ndarray
    reference: bool = False


EMPTY = np.zeros(0, np.int32)
Measure = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def choose(slot: Slot, state: Any, step: int, count: int, measure: Measure) -> tuple[Any, np.ndarray, dict[str, float]]:
    """The problems of a step, with a reference set measured on the way where the method wants one.

    Args:
        slot: a bound method of this folder.
        step: counted from 0.
        count: problems wanted, at least 1.
        measure: (rows i32 [K], samples G) -> (value [K, S], ok [K, S]), answers of the current policy, judged. Their
            randomness must be shared with no other completions of the run.

    Returns:
        (state, rows i32 [count], metrics of the measurement).

    Raises:
        ValueError: `count` below 1, or a method that chooses nothing.
    """
    if count < 1:
        raise ValueError(f"a step needs at least one problem; got count {count}")
    metrics: dict[str, float] = {}
    state, choice = slot.apply(state, step, count)
    if len(choice.reference):
        value, ok = measure(choice.reference, choice.samples)
        state, metrics = slot.update(state, Judged(step, choice.reference, value, ok, reference=True))
        state, choice = slot.apply(state, step, count)
    if len(choice.rows) != count:
        raise ValueError(
            f"a selection returns as many problems as asked for, {count}; {slot.name} returned {len(choice.rows)} in step "
            f"{step}"
        )
    return state, choice.rows, metrics
