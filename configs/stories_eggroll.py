"""Short stories under constraints: evolution of a pretrained 260,032-parameter model on a checked reward.

    python -m experiments.train --config=configs/stories_eggroll.py --workdir=runs/stories

The model continues an opening such as "She had a red ball and a big dog."; half the reward is for taking up both nouns, a
quarter each for a finished last sentence and for 10 to 40 words. Needs `stories260K`, a checkpoint directory in Hugging Face's
layout, in the folder that EGGROLL_DATA names (default ../shared/data), or --config.model.path=DIRECTORY.

TBD
"""

import os

import ml_collections

from configs.base import pick
from configs.language import language


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe."""
    return pick(variant, {"eggroll": _eggroll})


def _eggroll() -> ml_collections.ConfigDict:
    config = language(
        "stories",
        task_options={"words": 2, "length": (10, 40)},
        budget=64,
        steps=40,
        es_changes={"members": 64, "sigma": 0.01},
        learning_rate=1e-3,
    )
    config.model.path = os.path.join(os.environ.get("EGGROLL_DATA", "../shared/data"), "stories260K")
    config.score = "reward"
    config.prompts = 16
    config.task.problems = 2048
    config.eval_every = 10
    config.engine.update({"slots": 256, "chunk": 16, "bucket": 32, "view": 64})
    return config
