"""Breakout-MinAtar: a game on a 10 x 10 grid, a point per brick.

    python -m experiments.control --config=configs/control_minatar.py --workdir=runs/breakout

Return of the mean parameters over 64 fresh episodes for `--config.seed=0`, 1 and 2; seconds of training, compilation
included, on 2 CPU cores (AMD EPYC):

| variant           | what                                | returns          | env steps    | seconds  |
|-------------------|-------------------------------------|------------------|--------------|----------|
| eggroll (default) | crossed population of 1,024, rank 1 | 6.5, 6.6, 7.5    | 16 M to 32 M | 23 to 38 |
| ppo               | with backprop                       | 11.7, 28.6, 15.8 | 0.82 M       | 38 to 52 |

Episodes differ in nothing but the side the ball starts from, so the mean parameters have two outcomes, and evolution's
curve stands still and then jumps. PPO is well ahead here, in a twentieth of the steps; its seconds are those of a busy
machine.
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
