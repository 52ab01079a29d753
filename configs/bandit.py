"""A toy language bandit whose optimum is known, for every method: words enciphered letter by letter (`rl.tasks.cipher`).

    python -m experiments.train --config=configs/bandit.py --workdir=runs/bandit
    python -m experiments.train --config=configs/bandit.py:minirl --workdir=runs/minirl

No warm start: a policy of random weights finds out from rewards alone what becomes of each letter and where to look it up.
Every method of `rl.objectives.presets` is a variant, and `eggroll`. The optimum is 100 % of words that were never trained on.
"""

import ml_collections

from configs.base import pick
from configs.language import language, policy_gradient
from rl import slots
from rl.objectives.presets import PRESETS

TASK = {"letters": 8, "length": (1, 3)}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe; GRPO by default."""
    return pick(variant, {name: lambda name=name: words(name) for name in ("grpo", *PRESETS, "eggroll")})


def words(method: str, steps: int = 150, learning_rate: float = 3e-3) -> ml_collections.ConfigDict:
    """A method on the bandit, still to be locked."""
    if method == "eggroll":
        return _sized(_eggroll(steps))
    config = _sized(
        policy_gradient(
            "cipher", method, task_options=TASK, budget=3, steps=steps, samples=8, learning_rate=learning_rate
        )
    )
    config.prompts, config.gradient.tokens = 64, 4096
    config.gradient.objective.kl = 0.0
    _SPECIAL.get(method, lambda config: None)(config)
    return config


def _sized(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    config.model.preset = "micro-transformer"
    config.task.problems, config.eval_problems, config.eval_every = 500, 48, 10
    config.engine.update({"slots": 512, "chunk": 3, "bucket": 4, "view": 0})
    return config


def _eggroll(steps: int) -> ml_collections.ConfigDict:
    config = language(
        "cipher",
        task_options=TASK,
        budget=3,
        steps=steps,
        es_changes={"members": 256, "sigma": 0.03},
        learning_rate=0.01,
    )
    config.prompts = 32
    return config


def _dapo(config: ml_collections.ConfigDict) -> None:
    config.refills, config.gradient.informative_only = 3, True


def _vcpo(config: ml_collections.ConfigDict) -> None:
    config.gradient.step_scale, config.gradient.norms = 1.0, "logits"


def _remix(config: ml_collections.ConfigDict) -> None:
    config.gradient.objective.kl = 1e-3
    config.gradient.update({"epochs": 2, "kl_convex": True, "reincarnation": 50})
    config.replay = slots.block("rl.data.replay", "recent", until=50)


def _dots_rr(config: ml_collections.ConfigDict) -> None:
    config.selection = slots.block("rl.data.selection", "dots", references=64)
    config.replay = slots.block("rl.data.replay", "fifo")


_SPECIAL = {"dapo": _dapo, "vcpo": _vcpo, "remix": _remix, "dots_rr": _dots_rr}
