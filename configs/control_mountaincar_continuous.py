"""MountainCarContinuous-v0: gather momentum to climb out of a valley; solved at a mean return of 90.

    python -m experiments.control --config=configs/control_mountaincar_continuous.py --workdir=runs/mountaincar

Return of the mean parameters over 64 fresh episodes for `--config.seed=0`, 1 and 2; seconds of training, compilation
included, on 2 CPU cores (AMD EPYC):
94.1, 94.1, 93.9 after about 2.5 M environment steps in 5 s each.

The reward is 100 at the goal and minus the energy spent on the way: noise in the parameters, which lasts for an
episode, explores where noise in the actions does not.
"""

import ml_collections

from configs.base import evolution, pick

ENV = "MountainCarContinuous-v0"


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe, with the one variant eggroll."""
    return pick(variant, {"eggroll": _ours})


def _ours() -> ml_collections.ConfigDict:
    return evolution(ENV, 60, hidden=(64, 64), members=256, sigma=0.5, sigma_decay=0.97, learning_rate=0.1, decay=0.97)
