"""Answers of the policy of k updates ago: how far behind may the sampler be? On the toy bandit of `configs/bandit.py`.

    python -m experiments.train --config=configs/staleness.py:vcpo_16 --workdir=runs/vcpo_16

Variants METHOD_K: a method, and k. An asynchronous system trains on such answers; here the loop keeps the last k policies.
With one update a step, `grpo` never clips and corrects nothing; `ppo` clips around the policy that sampled (AReaL's naive PPO).
"""

import ml_collections

from configs import bandit
from configs.base import pick

METHODS = ("grpo", "ppo", "decoupled_ppo", "minirl", "vcpo", "remix")
LAGS = (0, 1, 4, 16, 64)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe; GRPO on fresh answers by default."""
    variants = {f"{method}_{lag}": lambda m=method, k=lag: _stale(m, k) for method in METHODS for lag in LAGS}
    return pick(variant, variants)


def _stale(method: str, lag: int) -> ml_collections.ConfigDict:
    config = bandit.words(method, steps=300)
    config.gradient.staleness = lag
    if method == "remix":  # not before answers of the policies it mixes have come
        config.gradient.reincarnation = config.replay.until = 50 + 2 * lag
    return config
