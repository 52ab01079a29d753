"""Short stories under constraints: evolution of a pretrained 260,032-parameter model on a checked reward.

    python -m experiments.train --config=configs/stories_eggroll.py --workdir=runs/stories

The model continues an opening such as "She had a red ball and a big dog."; half the reward is for taking up both nouns, a
quarter each for a finished last sentence and for 10 to 40 words. Needs `stories260K`, a checkpoint directory in Hugging Face's
layout, in the folder that EGGROLL_DATA names (default ../shared/data), or --config.model.path=DIRECTORY.

Mean reward of greedy answers to 512 held-out openings (their noun pairs never occur in training; the same for every seed), and
seconds of evolution on 2 CPU cores:

| seed | pretrained | evolved | gain            | seconds |
|------|------------|---------|-----------------|---------|
| 0    | 0.35       | 0.57    | 0.222 +- 0.018 | 108     |
| 1    | 0.35       | 0.56    | 0.210 +- 0.018 | 114     |
| 2    | 0.35       | 0.62    | 0.263 +- 0.019 | 113     |

What rises is above all how often the nouns are taken up; few stories end within 64 tokens.
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
