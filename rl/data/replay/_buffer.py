"""A buffer of groups as arrays of fixed shape, which the replay methods share."""

from typing import Any

import numpy as np

from rl.data.replay import Groups, Shape, widen

FREE = -1  # the stamp of an empty place


def empty(shape: Shape, capacity: int) -> dict[str, Any]:
    """{"groups": Groups of C, "stamp": i64 [C] when each was stored, "seed"}.

    Raises:
        ValueError: a size below 1.
    """
    for name, value in (*shape._asdict().items(), ("capacity", capacity)):
        if name != "seed" and value < 1:
            raise ValueError(f"{name} of a replay buffer must be at least 1; got {value}")
    lead = (capacity, shape.samples)
    zeros = lambda dtype, *more: np.zeros((*lead, *more), dtype)
    tokens = shape.longest
    groups = Groups(
        np.full(capacity, FREE, np.int32), zeros(np.int32, tokens), zeros(np.int32), zeros(np.float32, tokens),
        zeros(np.int32, tokens), zeros(np.float32), zeros(bool),
    )  # fmt: skip
    return {"groups": groups, "stamp": np.full(capacity, FREE, np.int64), "seed": np.int64(shape.seed)}


def write(stored: Groups, places: np.ndarray, fresh: Groups) -> Groups:
    """A copy with `fresh` at these places.

    Raises:
        ValueError: groups of another number of samples, or more tokens than there is room for.
    """
    fresh.check()
    if fresh.tokens.shape[1] != stored.tokens.shape[1]:
        raise ValueError(
            f"a buffer holds groups of {stored.tokens.shape[1]} samples; got groups of {fresh.tokens.shape[1]}"
        )
    written = Groups(*(x.copy() for x in stored))
    for old, new in zip(written, widen(fresh, stored.tokens.shape[2]), strict=True):
        old[places] = new
    return written


def generator(state: dict[str, Any], step: int) -> np.random.Generator:
    """The randomness of a step's draw."""
    return np.random.Generator(np.random.PCG64([int(state["seed"]), step]))
