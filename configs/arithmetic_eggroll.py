"""Arithmetic within a token budget: evolution teaches a small language model when to stop showing its work.

    python -m experiments.train --config=configs/arithmetic_eggroll.py --workdir=runs/arithmetic

The warm start learns chains such as "7+3-9+4=" from 16,384 solved ones, of which 60 % work the value out (":10-9+4=1+4=5") and
40 % just say it ("5"). The reward is 1 for the right value within 8 tokens, which most of the worked answers exceed. EGGROLL
perturbs all 94,108 parameters of a transformer (or of an RWKV-7), 256 members in one crossed grid of 16 x 16, and every member
answers the same 32 problems greedily.

Held-out problems solved, in % of 1,024 (the same for every seed; +- is the 95 % interval of the paired difference), and seconds
of evolution on 2 CPU cores, compilation included; the warm start takes another 30 s:

| seed | warm start | evolved | gain         | seconds |
|------|------------|---------|--------------|---------|
| 0    | 22.27      | 62.01   | 39.7 +- 3.5  | 59      |
| 1    | 20.51      | 59.18   | 38.7 +- 3.6  | 62      |
| 2    | 21.19      | 59.08   | 37.9 +- 3.5  | 60      |

What is learned is when to answer at once; the arithmetic itself is as good as the warm start made it.
"""

import ml_collections

from configs.base import pick
from configs.language import language


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe; variants as in the table above."""
    return pick(variant, {"transformer": _transformer, "rwkv7": _rwkv7})


def _transformer() -> ml_collections.ConfigDict:
    config = language(
        "arithmetic",
        task_options={"length": (2, 4), "operands": (1, 9), "operations": "+-", "steps": 0.6},
        budget=8,
        steps=60,
        es_changes={"members": 256, "sigma": 0.005},
        learning_rate=5e-4,
    )
    config.task.problems = 16384
    config.warm_start.update({"examples": 16384, "steps": 1000})
    config.update({"prompts": 32, "eval_problems": 1024, "eval_every": 5})
    config.engine.update({"slots": 1024, "chunk": 8, "bucket": 12})
    return config


def _rwkv7() -> ml_collections.ConfigDict:
    config = _transformer()
    config.model.preset = "tiny-rwkv7"
    return config
