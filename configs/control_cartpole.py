"""CartPole-v1."""

from configs.control_base import evolution, pick, ppo


def get_config(variant=""):
    """The recipe."""
    return pick(
        variant,
        {
            "ours": lambda: evolution("CartPole-v1", 40, hidden=(32, 32, 32), sigma=0.2, learning_rate=0.05),
            "ppo": lambda: ppo("CartPole-v1", 20, hidden=(64, 64)),
        },
    )
