"""Config of the toy run; the variant picks the pause between steps."""

import ml_collections


def get_config(variant: str = "quick") -> ml_collections.ConfigDict:
    pauses = {"quick": 0.0, "slow": 0.008}
    return ml_collections.ConfigDict(
        {
            "seed": 3,
            "steps": 100,
            "save_every": 4,
            "learning_rate": 0.05,
            "pause": pauses[variant],
            "layers": (3, 4),
            "optimizer": {"name": "adam", "b1": 0.9},
        }
    )
