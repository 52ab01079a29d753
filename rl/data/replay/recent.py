"""The mixture of recent policies of ReMix (arXiv 2507.06892): part of every batch comes from the last N iterations.

In iteration k a group is fresh with probability 1 - p, and with probability p one that an iteration k - i sampled,
i in 1..N, drawn uniformly among all stored and without replacement within a batch. The number replayed is p B rounded up or
down at random so that its mean is p B exactly (where p B is a whole number, it is that). All groups are stored, for N
iterations. From iteration `until` on (policy reincarnation) the buffer is empty and everything fresh; 0: never.

The paper's code is not public; its distribution over i is not stated, uniform is our choice.
Memory: 12 bytes per token, N B G L of them.
"""

from typing import Any

import ml_collections
import numpy as np

from rl.data.replay import Drawn, Groups, Shape
from rl.data.replay._buffer import FREE, empty, generator, write


def default_config() -> ml_collections.ConfigDict:
    """`replayed`: p in [0, 1); `window`: N iterations; `until`: iteration of the reincarnation, 0: none."""
    return ml_collections.ConfigDict({"replayed": 0.4, "window": 2, "until": 0}).lock()


def init(config: ml_collections.ConfigDict, shape: Shape) -> dict[str, Any]:
    """An empty buffer of N B groups, stamped with the iteration that sampled them.

    Raises:
        ValueError: a share, window or size out of range.
    """
    if not 0 <= config.replayed < 1:
        raise ValueError(f"replayed must be at least 0 (no replay) and below 1; got {config.replayed}")
    if config.replayed * shape.groups > shape.groups - 1:
        raise ValueError(
            f"replayed must leave a fresh group in a batch of B, be at most 1 - 1/B; got {config.replayed} and B = "
            f"{shape.groups} groups"
        )
    if config.window < 1 or config.until < 0:
        raise ValueError(f"window must be at least 1 and until at least 0; got {config.window} and {config.until}")
    return empty(shape, config.window * shape.groups)


def apply(config: ml_collections.ConfigDict, state: dict[str, Any], step: int, count: int) -> Drawn:
    """About p count groups, none older than N iterations."""
    if _over(config, step):
        return Drawn(None, count)
    age = step - state["stamp"]
    full = np.flatnonzero((state["stamp"] != FREE) & (age >= 1) & (age <= config.window))
    random = generator(state, step)
    number = min(int(np.floor(round(config.replayed * count, 6) + random.random())), len(full))
    if not number:
        return Drawn(None, count)
    return Drawn(state["groups"].take(random.choice(full, number, replace=False)), count - number)


def update(config: ml_collections.ConfigDict, state: dict[str, Any], step: int, fresh: Groups):
    """Stores all groups; forgets those that no later step may draw.

    Raises:
        ValueError: more groups than B in the iterations of a window.
    """
    groups, stamp = state["groups"], state["stamp"].copy()
    if _over(config, step + 1):
        stamp[:] = FREE
        return state | {"stamp": stamp}, {"replay_size": 0.0}
    stamp[stamp <= step - config.window] = FREE
    free = np.flatnonzero(stamp == FREE)
    if fresh.size > len(free):
        raise ValueError(f"the buffer has room for {len(free)} more groups, B per iteration; got {fresh.size}")
    places = free[: fresh.size]
    stamp[places] = step
    return state | {"groups": write(groups, places, fresh), "stamp": stamp}, {
        "replay_size": float((stamp != FREE).sum())
    }


def _over(config: ml_collections.ConfigDict, step: int) -> bool:
    return 0 < config.until <= step
