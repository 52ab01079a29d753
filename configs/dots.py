"""Which prompts, and answers used again: uniform, DOTS, and DOTS with rollout replay, on a bandit of mixed difficulty.

    python -m experiments.train --config=configs/dots.py:dots --workdir=runs/dots

Half of the words hold a letter whose words no completion answers: they teach nothing and cost as much. Rewards are 0 or 1.
"""

import ml_collections

from configs import bandit
from configs.base import pick
from rl import slots


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe; uniform selection by default."""
    return pick(variant, {"uniform": _base, "dots": _dots, "dots_rr": _dots_rr})


def _base(method: str = "grpo") -> ml_collections.ConfigDict:
    config = bandit.words(method, steps=300)
    config.task.options = config.task.options.copy_and_resolve_references()
    config.task.options.update({"forbidden": "gh", "partial": 0.0})
    config.selection, config.replay = slots.block("rl.data.selection", "uniform"), slots.block("rl.data.replay", "none")
    return config


def _dots() -> ml_collections.ConfigDict:
    config = _base()
    config.selection = slots.block("rl.data.selection", "dots", references=32)
    return config


def _dots_rr() -> ml_collections.ConfigDict:
    config = _base("dots_rr")
    config.selection = slots.block("rl.data.selection", "dots", references=32)
    config.replay = slots.block("rl.data.replay", "fifo")
    return config
