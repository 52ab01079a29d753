"""What the control recipes share: the keys of an evolution run and of a PPO run, and how a variant is picked.

Keys (`steps` are generations of evolution, or batches of PPO):

* `env`, `max_steps`: environment, and time limit of an episode (0: the environment's own);
* `eval_every`, `eval_episodes`: steps between evaluations of the mean parameters, and episodes in each;
* `policy`: hidden layer sizes, whether actions are drawn, whether observations are normalised;
* `es`: population design and size, `blocks` of it if crossed, rank, patterns of parameters that get `full`-rank noise
  (a matrix must not be smaller than the rank), sigma and learning rate with multiplicative decays per generation,
  optimizer, fitness shaping, `episodes` per member, `chunk` members at a time (0: all);
* `ppo`: see `rl.control.ppo.Settings`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

Variants = Mapping[str, Callable[[], ml_collections.ConfigDict]]


def pick(variant: str, variants: Variants) -> ml_collections.ConfigDict:
    """Builds the config of a variant; "" is the first.

    Raises:
      ValueError: no such variant; the message lists those that exist.
    """
    name = variant or next(iter(variants))
    if name not in variants:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(variants)}")
    return variants[name]().lock()


def evolution(
    env: str, generations: int, *, hidden: tuple[int, ...], method: str = "eggroll", stochastic: bool = False, **es: Any
) -> ml_collections.ConfigDict:
    """An evolution run; `es` keys as wanted, `method="openes"` for full-rank noise."""
    config = _common(env, method, generations, hidden, stochastic)
    config.es = ml_collections.ConfigDict(
        {
            "population": "crossed",
            "members": 256,
            "blocks": 1,
            "rank": 1,
            "full": (),
            "noise": "gaussian",
            "sigma": 0.1,
            "sigma_decay": 1.0,
            "optimizer": "adam",
            "learning_rate": 0.05,
            "learning_rate_decay": 1.0,
            "shaping": "zscore",
            "episodes": 1,
            "common_random_numbers": True,
            "chunk": 0,
        }
    )
    config.es.lock()
    config.es.update(es)
    return config


def ppo(env: str, batches: int, *, hidden: tuple[int, ...], **settings: Any) -> ml_collections.ConfigDict:
    """A PPO run, with settings as wanted."""
    config = _common(env, "ppo", batches, hidden, stochastic=True)
    config.ppo = ml_collections.ConfigDict(
        {
            "envs": 64,
            "steps": 128,
            "epochs": 4,
            "minibatches": 8,
            "learning_rate": 3e-4,
            "discount": 0.99,
            "gae": 0.95,
            "clip": 0.2,
            "entropy": 0.0,
            "value": 0.5,
            "max_grad_norm": 0.5,
        }
    )
    config.ppo.lock()
    config.ppo.update(settings)
    return config


def _common(env: str, method: str, steps: int, hidden: tuple[int, ...], stochastic: bool) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "method": method,
            "env": env,
            "max_steps": 0,
            "seed": 0,
            "steps": steps,
            "eval_every": 5,
            "eval_episodes": 64,
            "save_every": 20,
            "policy": {"hidden": hidden, "stochastic": stochastic, "normalize_observations": True},
        }
    )
