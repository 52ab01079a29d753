"""CartPole-v1."""

from configs.control_base import evolution, pick, ppo

ENV = "CartPole-v1"


def get_config(variant=""):
    """The recipe."""
    return pick(variant, {
        "eggroll": lambda: _ours(),
        "eggroll_independent": lambda: _ours(population="independent"),
        "eggroll_rank4": lambda: _ours(rank=4, full=("Dense_2/kernel",)),
        "openes": lambda: _ours(method="openes", population="independent"),
        "ppo": lambda: ppo(ENV, 40, hidden=(64, 64), learning_rate=1e-3, envs=32, steps=128, minibatches=16),
        "paper": lambda: evolution(ENV, 100, hidden=(256, 256, 256), stochastic=True, population="antithetic", members=2048, rank=4, full=("Dense_3/kernel",),
           optimizer="sgd", learning_rate=0.1, learning_rate_decay=0.9995, sigma=0.2, sigma_decay=0.999, episodes=1),
    })

def _ours(**es):
    return evolution(ENV, 40, hidden=(64, 64), **({"members": 256, "sigma": 0.2, "learning_rate": 0.05} | es))
