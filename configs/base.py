"""What the recipes share: blocks of keys with their defaults, and how a variant is picked.

`optimizer`: `name` of `experiments.build.OPTIMIZERS` and its `options`, `learning_rate`, and its `schedule` over the run's
steps: `constant`, `exponential` (multiplied by `decay` after every step), `cosine` (to zero at the last step) or
`warmup_cosine` (from zero in a straight line over the first `warmup` of the steps, a share of them, then cosine), however many
updates a step has.

`es`: `population` (crossed, antithetic, independent) of `members`, in `blocks` if crossed; `rank`; patterns of parameters
that get `full`-rank noise (a matrix must not be smaller than the rank) or stay `frozen`; `noise` (gaussian, rademacher);
`sigma`, multiplied by `sigma_decay` after every generation; fitness `shaping` (zscore, centred_rank, pair_sign); `chunk`
members at a time (0: all).

`mesh`: sizes of the axes of `rl.mesh`, `population`, `data`, `fsdp`, `tensor`, which multiply to the number of devices (-1:
what is left); all 1: one device.

Control runs also have:

* `env`, `max_steps`: environment, and time limit of an episode (0: the environment's own);
* `steps`: generations of evolution, or batches of PPO;
* `eval_every`, `eval_episodes`: steps between evaluations of the mean parameters, and episodes in each;
* `policy`: hidden layer sizes, whether actions are drawn, whether observations are normalised;
* `episodes` per member, and whether all members play the same ones (`common_random_numbers`);
* `ppo`: see `rl.control.ppo.Settings`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from rl.config import ConfigError

Variants = Mapping[str, Callable[[], ml_collections.ConfigDict]]


def pick(variant: str, variants: Variants) -> ml_collections.ConfigDict:
    """Builds the config of a variant; "" is the first.

    Raises:
      ConfigError: no such variant; the message lists those that exist.
    """
    name = variant or next(iter(variants))
    if name not in variants:
        raise ConfigError(f"unknown variant {variant!r}; known: {', '.join(variants)}")
    return variants[name]().lock()


def optimizer(**changes: Any) -> ml_collections.ConfigDict:
    """The `optimizer` block."""
    options = changes.pop("options", {})
    defaults = {"name": "adam", "learning_rate": 0.05, "schedule": "constant", "decay": 1.0, "warmup": 0.1}
    block = _block(defaults, changes)
    with block.unlocked():
        block.options = options
    return block


def es(**changes: Any) -> ml_collections.ConfigDict:
    """The `es` block."""
    defaults = {
        "population": "crossed",
        "members": 256,
        "blocks": 1,
        "rank": 1,
        "full": (),
        "frozen": (),
        "noise": "gaussian",
        "sigma": 0.1,
        "sigma_decay": 1.0,
        "shaping": "zscore",
        "chunk": 0,
    }
    return _block(defaults, changes)


def mesh() -> ml_collections.ConfigDict:
    """The `mesh` block."""
    return _block({"population": 1, "data": 1, "fsdp": 1, "tensor": 1}, {})


def evolution(
    env: str,
    generations: int,
    *,
    hidden: tuple[int, ...],
    learning_rate: float,
    decay: float = 1.0,
    optimizer_name: str = "adam",
    method: str = "eggroll",
    stochastic: bool = False,
    episodes: int = 1,
    **es_changes: Any,
) -> ml_collections.ConfigDict:
    """A control run by evolution; `method="openes"` for full-rank noise."""
    config = _control(env, method, generations, hidden, stochastic)
    config.es = es(**es_changes)
    config.optimizer = optimizer(name=optimizer_name, learning_rate=learning_rate, schedule="exponential", decay=decay)
    config.episodes, config.common_random_numbers = episodes, True
    return config


def ppo(env: str, batches: int, *, hidden: tuple[int, ...], **settings: Any) -> ml_collections.ConfigDict:
    """A control run by PPO, with settings as wanted."""
    config = _control(env, "ppo", batches, hidden, stochastic=True)
    defaults = {
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
    config.ppo = _block(defaults, settings)
    return config


def _block(defaults: dict[str, Any], changes: dict[str, Any]) -> ml_collections.ConfigDict:
    block = ml_collections.ConfigDict(defaults).lock()
    block.update(changes)
    return block


def _control(env: str, method: str, steps: int, hidden: tuple[int, ...], stochastic: bool) -> ml_collections.ConfigDict:
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
            "mesh": mesh(),
            "policy": {"hidden": hidden, "stochastic": stochastic, "normalize_observations": True},
        }
    )
