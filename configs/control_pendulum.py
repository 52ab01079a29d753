"""Pendulum-v1: swing up and balance, 200 steps; about -150 is the best possible on average.

    python -m experiments.control --config=configs/control_pendulum.py --workdir=runs/pendulum

| variant | what | mean return of seeds 0, 1, 2 | seconds |
|---|---|---|---|
| eggroll (default) | crossed population of 1,024, rank 1 | TBD | TBD |

Source: arXiv 2511.16652, section 6.2; the `paper` variants are its published settings.
"""

import ml_collections

from configs.base import evolution, pick, ppo

ENV = "Pendulum-v1"


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe; variants as in the table above."""
    return pick(
        variant,
        {
            "eggroll": _ours,
            "eggroll_independent": lambda: _ours(population="independent"),
            # The first layer has three inputs and the last one output, fewer than the rank.
            "eggroll_rank4": lambda: _ours(rank=4, full=("Dense_0/kernel", "Dense_2/kernel")),
            "openes": lambda: _ours(method="openes", population="independent"),
            "ppo": _ppo,
            "paper": lambda: _paper(
                rank=4, full=("Dense_0/kernel", "Dense_3/kernel"), stochastic=True, sigma_decay=0.995
            ),
            "paper_openes": lambda: _paper(method="openes", episodes=4, optimizer_name="adamw"),
            "paper_ppo": _paper_ppo,
        },
    )


def _ours(**changes) -> ml_collections.ConfigDict:
    settings = {"members": 1024, "episodes": 2, "sigma": 0.1, "learning_rate": 0.05, "decay": 0.98}
    return evolution(ENV, 100, hidden=(64, 64), **(settings | changes))


def _paper(**changes) -> ml_collections.ConfigDict:
    settings = {"population": "antithetic", "members": 4096, "sigma": 0.05}
    rate = {"learning_rate": 0.01, "decay": 0.995}  # of Adam, so whatever the scale of the gradient
    return evolution(ENV, 500, hidden=(256, 256, 256), **(settings | rate | changes))


def _ppo() -> ml_collections.ConfigDict:
    return ppo(
        ENV, 60, hidden=(64, 64), envs=32, steps=200, epochs=10, minibatches=10, learning_rate=1e-3, discount=0.9
    )  # fmt: skip


def _paper_ppo() -> ml_collections.ConfigDict:
    return ppo(
        ENV, 20, hidden=(256, 256, 256), envs=256, steps=256, epochs=16, minibatches=16, learning_rate=3e-4,
        discount=0.999, gae=0.95, clip=0.1, entropy=1e-3, value=1.0, max_grad_norm=1.0,
    )  # fmt: skip
