"""Every problem once per epoch, in an order of the epoch's own: the default, and the baseline of every other method.

Epoch e is a permutation drawn from (seed, e); a step takes the next problems of it, across the border of two epochs if it
must. The state is the number of problems taken so far, so that steps of different size also leave none out.
"""

import functools
from typing import Any

import ml_collections
import numpy as np

from rl.data.selection import EMPTY, Choice, Judged, Pool


def default_config() -> ml_collections.ConfigDict:
    """No keys."""
    return ml_collections.ConfigDict().lock()


def init(config: ml_collections.ConfigDict, pool: Pool) -> dict[str, Any]:
    """{"place": problems taken, "size", "seed"}."""
    if pool.size < 1:
        raise ValueError(f"a pool needs at least one problem; got {pool.size}")
    return {"place": np.int64(0), "size": np.int64(pool.size), "seed": np.int64(pool.seed)}


def apply(config: ml_collections.ConfigDict, state: dict[str, Any], step: int, count: int):
    """The next `count` problems of the epoch."""
    seed, size, place = int(state["seed"]), int(state["size"]), int(state["place"])
    rows = [_order(seed, at // size, size)[at % size] for at in range(place, place + count)]
    return state | {"place": np.int64(place + count)}, Choice(np.array(rows, np.int32), EMPTY, 0)


def update(config: ml_collections.ConfigDict, state: dict[str, Any], judged: Judged):
    """Learns nothing."""
    return state, {}


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)
