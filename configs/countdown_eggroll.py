"""Countdown by evolution on verified reward, from a short supervised warm start; nothing is downloaded.

    python -m experiments.train --config=configs/countdown_eggroll.py --workdir=runs/countdown

The harder setting, reported as it is: of 2,048 held-out problems the warm start (8,192 solved ones, 500 steps) solves 39.11,
43.16 and 43.55 % with seeds 0, 1 and 2, and 60 generations of 256 members on 64 prompts solve 40.62, 44.73 and 46.14 %: paired
gains of 1.5 +- 1.1, 1.6 +- 1.3 and 2.6 +- 1.3 points in about 147 s on one CPU core. Policy gradients gain 4 to 7 in half of it
(`configs/countdown_grpo.py`). On a fixed batch reward climbs quickly; on fresh prompts most of it is what each prompt teaches
about itself. See `configs/arithmetic_eggroll.py` for a behaviour that all prompts share.
"""

import ml_collections

from configs.base import pick
from configs.language import language


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe; variants as in the table above."""
    return pick(variant, {"transformer": _transformer, "rwkv7": _rwkv7, "frugal": _frugal})


def use_frugal(config: ml_collections.ConfigDict) -> None:
    """FRUGAL in Adam's place: a quarter of the matrices has moments, 20 steps at a time, the others move by sign."""
    config.optimizer.name = "frugal"
    with config.optimizer.unlocked():
        config.optimizer.options = {"density": 0.25, "every": 20, "free_scale": 0.1}


def _transformer() -> ml_collections.ConfigDict:
    config = language(
        "countdown",
        task_options={"numbers": (3, 3), "operands": (1, 30), "target": (1, 99), "operations": "+-*"},
        budget=12,
        steps=60,
        es_changes={"members": 256, "sigma": 0.004},
        learning_rate=2e-4,
    )
    config.task.problems = 16384
    config.warm_start.update({"examples": 8192, "steps": 500})
    config.engine.update({"slots": 1024, "chunk": 8, "bucket": 12})
    config.eval_problems = 2048
    return config


def _frugal() -> ml_collections.ConfigDict:
    config = _transformer()
    use_frugal(config)
    return config


def _rwkv7() -> ml_collections.ConfigDict:
    config = _transformer()
    config.model.preset = "tiny-rwkv7"
    return config
