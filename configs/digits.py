"""Handwritten digits without backprop, and backprop on the same network, data order and optimizer beside it.

python -m experiments.pretrain --config=configs/digits.py --workdir=runs/digits
python -m experiments.pretrain --config=configs/digits.py:backprop --workdir=runs/digits_backprop
"""

import ml_collections

VARIANTS = ("eggroll", "backprop")


def get_config(variant: str = "eggroll") -> ml_collections.ConfigDict:
    """The recipe; `variant` is "eggroll" or "backprop"."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    config = ml_collections.ConfigDict(
        {
            "task": "digits",
            "method": variant,
            "seed": 0,
            "steps": 600,
            "batch": 64,
            "width": 64,
            "hidden_layers": 2,
            "learning_rate": 0.02,
            "save_every": 200,
            "evaluate_every": 50,
        }
    )
    if variant == "eggroll":
        config.population = {"design": "crossed", "members": 1024}
        config.rank = 1
        config.sigma = 0.05
        config.noise = "gaussian"
        config.shaping = "zscore"
    return config.lock()
