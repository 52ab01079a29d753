"""Pendulum-v1."""

from configs.control_base import evolution, pick, ppo

ENV = "Pendulum-v1"


def get_config(variant=""):
    """The recipe."""
    return pick(variant, {
        "eggroll": lambda: _ours(),
        "eggroll_independent": lambda: _ours(population="independent"),
        "eggroll_rank4": lambda: _ours(rank=4, full=("Dense_0/kernel", "Dense_2/kernel")),
        "openes": lambda: _ours(method="openes", population="independent"),
        "ppo": lambda: ppo(ENV, 60, hidden=(64, 64), learning_rate=1e-3, envs=32, steps=200, minibatches=10, epochs=10, discount=0.9),
        "paper": lambda: evolution(ENV, 100, hidden=(256, 256, 256), stochastic=True, population="antithetic", members=4096, rank=4, full=("Dense_0/kernel", "Dense_3/kernel"),
           optimizer="adam", learning_rate=0.01, learning_rate_decay=0.995, sigma=0.05, sigma_decay=0.995, episodes=1),
    })

def _ours(**es):
    return evolution(ENV, 100, hidden=(64, 64), **({"members": 1024, "sigma": 0.1, "learning_rate": 0.02} | es))
