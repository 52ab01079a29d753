"""No replay: every group is fresh, and used in one step."""

from typing import Any

import ml_collections

from rl.data.replay import Drawn, Groups, Shape


def default_config() -> ml_collections.ConfigDict:
    """No keys."""
    return ml_collections.ConfigDict().lock()


def init(config: ml_collections.ConfigDict, shape: Shape) -> dict[str, Any]:
    """Nothing to remember."""
    return {}


def apply(config: ml_collections.ConfigDict, state: dict[str, Any], step: int, count: int) -> Drawn:
    """All fresh."""
    return Drawn(None, count)


def update(config: ml_collections.ConfigDict, state: dict[str, Any], step: int, fresh: Groups):
    """Stores nothing."""
    return state, {}
