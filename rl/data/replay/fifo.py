"""Rollout replay of DOTS+RR (arXiv 2506.05316): part of every batch comes from a first-in-first-out buffer of groups.

A batch of B groups has ceil(sigma B) fresh ones; the others are drawn from the buffer uniformly and without replacement,
as far as it has them. Only informative groups are stored: those whose judged rewards differ, which is 0 < mean < 1 for
rewards of 0 and 1 (a group of equal rewards has no advantage, now or later). A problem has at most one group, its newest;
above the capacity the oldest leaves. Groups stay when they are drawn.

The replayed part needs an objective that corrects for the policy it was sampled from: see `rl.objectives.presets`.
Memory: 12 bytes per token, C G L of them.
"""

from typing import Any

import ml_collections
import numpy as np

from rl.data.replay import Drawn, Groups, Shape
from rl.data.replay._buffer import FREE, empty, generator, write


def default_config() -> ml_collections.ConfigDict:
    """`fresh`: sigma, the share of a batch that is new, in (0, 1]; `capacity`: C, groups."""
    return ml_collections.ConfigDict({"fresh": 0.5, "capacity": 256}).lock()


def init(config: ml_collections.ConfigDict, shape: Shape) -> dict[str, Any]:
    """An empty buffer; "next" counts what was ever stored.

    Raises:
        ValueError: a share or size out of range.
    """
    if not 0 < config.fresh <= 1:
        raise ValueError(f"fresh must be above 0 and at most 1 (no replay); got {config.fresh}")
    return empty(shape, config.capacity) | {"next": np.int64(0)}


def apply(config: ml_collections.ConfigDict, state: dict[str, Any], step: int, count: int) -> Drawn:
    """At most count - ceil(sigma count) stored groups."""
    full = np.flatnonzero(state["stamp"] != FREE)
    wanted = count - int(np.ceil(round(config.fresh * count, 6)))
    number = min(wanted, len(full))
    if not number:
        return Drawn(None, count)
    places = generator(state, step).choice(full, number, replace=False)
    return Drawn(state["groups"].take(places), count - number)


def update(config: ml_collections.ConfigDict, state: dict[str, Any], step: int, fresh: Groups):
    """Stores the informative groups, in order."""
    kept = np.flatnonzero(fresh.informative)
    stamp, problem, first = state["stamp"].copy(), state["groups"].problem.copy(), int(state["next"])
    content: dict[int, int] = {}  # place -> row of fresh, the last one written
    for i, row in enumerate(kept):
        same = np.flatnonzero(problem == fresh.problem[row])
        place = int(same[0] if same.size else np.argmin(stamp))  # a free place has the lowest stamp
        stamp[place], problem[place], content[place] = first + i, fresh.problem[row], int(row)
    places, rows = (np.fromiter(x, np.int64, len(content)) for x in (content.keys(), content.values()))
    groups = write(state["groups"], places, fresh.take(rows))
    state = state | {"groups": groups, "stamp": stamp, "next": np.int64(first + len(kept))}
    return state, {"replay_size": float((stamp != FREE).sum()), "replay_stored": float(len(kept))}
