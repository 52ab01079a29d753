"""Countdown by evolution on verified reward, from a short supervised warm start; nothing is downloaded.

    python -m experiments.train --config=configs/countdown_eggroll.py --workdir=runs/countdown

TBD
"""

import ml_collections

from configs.base import pick
from configs.language import language


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe; variants as in the table above."""
    return pick(variant, {"transformer": _transformer, "rwkv7": _rwkv7})


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


def _rwkv7() -> ml_collections.ConfigDict:
    config = _transformer()
    config.model.preset = "tiny-rwkv7"
    return config
