"""brax/ant: run forward on four legs, 1,000 steps. Made for an accelerator.

    pip install '.[control,brax,plot]'
    python -m experiments.control --config=configs/control_ant.py --workdir=runs/ant

The whole recipe is up to 200 M environment steps and no score of it has been measured yet: 2 CPU cores (AMD EPYC) do less
than 1,000 a second, after 45 s of compilation. That all parts work shows in 60 s there with

    python -m experiments.control --config=configs/control_ant.py --workdir=runs/ant_smoke \\
        --config.es.members=64 --config.max_steps=200 --config.steps=10 --config.eval_episodes=8

(mean return 16, standard deviation 23, of 8 episodes with seed 0; 10 small generations learn next to nothing).

The `paper`, `paper_openes` and `paper_ppo` variants are the published settings, 3 x 256 units and drawn actions; the
number of steps is ours (published: 5e8 environment steps).

Source: arXiv 2511.16652, section 6.2 and appendix N.4.
"""

import ml_collections

from configs.base import evolution, pick, ppo

ENV = "brax/ant"


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe: eggroll (default), paper, paper_openes or paper_ppo."""
    return pick(
        variant,
        {
            "eggroll": _ours,
            "paper": lambda: _paper(members=2048, decay=0.9995),
            "paper_openes": lambda: _paper(method="openes", members=512, episodes=8, learning_rate=0.1, decay=0.995),
            "paper_ppo": _paper_ppo,
        },
    )


def _ours() -> ml_collections.ConfigDict:
    return evolution(ENV, 200, hidden=(64, 64), members=1024, sigma=0.05, learning_rate=0.02)


def _paper(**changes) -> ml_collections.ConfigDict:
    settings = {"population": "antithetic", "sigma": 0.05, "sigma_decay": 0.9995, "learning_rate": 0.01}
    return evolution(ENV, 500, hidden=(256, 256, 256), stochastic=True, **(settings | changes))


def _paper_ppo() -> ml_collections.ConfigDict:
    return ppo(
        ENV, 2000, hidden=(256, 256, 256), envs=64, steps=128, epochs=8, minibatches=32, learning_rate=3e-4,
        discount=0.995, gae=0.95, clip=0.2, entropy=0.0, value=1.0, max_grad_norm=0.5,
    )  # fmt: skip
