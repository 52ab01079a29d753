"""Breakout-MinAtar: a game on a 10 x 10 grid, a point per brick.

    python -m experiments.control --config=configs/control_minatar.py --workdir=runs/breakout

TBD
"""

import ml_collections

from configs.base import evolution, pick, ppo

ENV = "Breakout-MinAtar"


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe: eggroll (default) or ppo."""
    return pick(variant, {"eggroll": _ours, "ppo": _ppo})


def _ours() -> ml_collections.ConfigDict:
    return evolution(ENV, 200, hidden=(64, 64), members=1024, episodes=2, sigma=0.05, learning_rate=0.02)


def _ppo() -> ml_collections.ConfigDict:
    return ppo(ENV, 100, hidden=(64, 64), envs=64, steps=128, minibatches=16, learning_rate=1e-3)
