"""Control environments behind one small functional interface: `make("CartPole-v1")`, `make("brax/ant")`."""

from rl.envs.types import Continuous, Discrete, Env, EnvError

__all__ = ["Continuous", "Discrete", "Env", "EnvError", "make", "names"]


def make(name: str, max_steps: int | None = None) -> Env:
    """Builds an environment by name.

    Args:
      name: a gymnax name such as `CartPole-v1` or `Breakout-MinAtar`, or `brax/` and a brax name such as `brax/ant`.
      max_steps: time limit of an episode; None takes the environment's own.

    Returns:
      An `Env`.

    Raises:
      EnvError: an unknown name (the message lists what exists), a time limit below 1, or a missing package.
    """
    if max_steps is not None and max_steps < 1:
        raise EnvError(f"max_steps must be at least 1, not {max_steps}")
    if name.startswith("brax/"):
        from rl.envs import brax_adapter

        return brax_adapter.make(name, max_steps)
    from rl.envs import gymnax_adapter

    return gymnax_adapter.make(name, max_steps)


def names() -> list[str]:
    """The names `make` knows; those of brax only where it is installed."""
    from rl.envs import brax_adapter, gymnax_adapter

    return gymnax_adapter.names() + brax_adapter.names()
