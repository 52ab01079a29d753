"""gymnax environments (extra `control`)."""

import difflib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl.envs.types import Continuous, Discrete, Env, EnvError, clip_action, like

_DOWNLOADS = ("MNISTBandit-bsuite",)  # its constructor fetches a data set


def make(name: str, max_steps: int | None = None) -> Env:
    """Adapts gymnax's `reset_env` and `step_env`, which never reset by themselves; see `rl.envs.make`."""
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise EnvError(
            f"unknown environment {name!r}.{hint} gymnax has: {', '.join(known)}; "
            "brax environments are called brax/NAME"
        )
    inner, params = _gymnax().make(name)
    observation = inner.observation_space(params)
    action = _action(name, inner.action_space(params))
    template = jax.eval_shape(lambda key: inner.reset_env(key, params)[1], jax.random.key(0))

    def reset(key: jax.Array) -> tuple[Any, jax.Array]:
        obs, state = inner.reset_env(key, params)
        return like(state, template), _flat(obs)

    def step(key: jax.Array, state: Any, taken: jax.Array) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        obs, state, reward, terminated, _ = inner.step_env(key, state, clip_action(taken, action), params)
        reward = jnp.asarray(reward, jnp.float32).reshape(())
        return like(state, template), _flat(obs), reward, jnp.asarray(terminated, bool).reshape(())

    limit = int(params.max_steps_in_episode) if max_steps is None else max_steps
    return Env(name, int(np.prod(observation.shape, dtype=int)), action, limit, reset, step)


def names() -> list[str]:
    """gymnax's environments, without those that need a download."""
    return [name for name in _gymnax().registered_envs if name not in _DOWNLOADS]


def _action(name: str, space: Any) -> Discrete | Continuous:
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    low, high = (
        np.broadcast_to(np.asarray(bound, np.float32), space.shape).ravel() for bound in (space.low, space.high)
    )
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise EnvError(f"continuous actions need finite bounds, but those of {name} are {low} and {high}")
    return Continuous(tuple(map(float, low)), tuple(map(float, high)))


def _flat(obs: jax.Array) -> jax.Array:
    return jnp.asarray(obs, jnp.float32).reshape(-1)


def _gymnax() -> Any:
    try:
        import gymnax
    except ImportError as error:
        raise EnvError(f"control environments need gymnax ({error}): pip install 'eggroll-jax[control]'") from error
    return gymnax
