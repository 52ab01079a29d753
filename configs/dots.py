"""Which prompts, and answers used again: uniform, DOTS, and DOTS with rollout replay, on a bandit of mixed difficulty.

    python -m experiments.train --config=configs/dots.py:dots --workdir=runs/dots

Six words of seven hold a letter whose words no completion answers: they teach nothing and cost as much as others.
"""

import ml_collections

from configs import bandit
from configs.base import pick
from rl import slots


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe; uniform selection by default."""
    return pick(variant, {"uniform": _base, "dots": _dots, "dots_rr": _dots_rr})


def _base(method: str = "grpo") -> ml_collections.ConfigDict:
    config = bandit.words(method)
    config.steps = 250
    config.task.options.forbidden = "efgh"
    config.selection, config.replay = slots.block("rl.data.selection", "uniform"), slots.block("rl.data.replay", "none")
    return config


def _dots(method: str = "grpo") -> ml_collections.ConfigDict:
    config = _base(method)
    config.selection = slots.block("rl.data.selection", "dots", references=64, period=4, temperature=0.1)
    return config


def _dots_rr() -> ml_collections.ConfigDict:
    config = _dots("dots_rr")
    config.replay = slots.block("rl.data.replay", "fifo")
    return config
