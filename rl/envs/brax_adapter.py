"""brax environments (extra `brax`), named `brax/ant` and so on."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl.envs.types import Continuous, Env, EnvError, clip_action, like

_MAX_STEPS = 1000  # brax's usual episode length; its environments have none of their own
_PREFIX = "brax/"


def make(name: str, max_steps: int | None = None) -> Env:
    """Adapts a brax environment without its episode and auto-reset wrappers; see `rl.envs.make`."""
    known = names()
    if not known:
        raise EnvError(f"{name} needs brax, which is not installed: pip install 'eggroll-jax[brax]'")
    if name not in known:
        raise EnvError(f"unknown environment {name!r}; brax has: {', '.join(known)}")
    from brax import envs

    inner = envs.get_environment(name.removeprefix(_PREFIX))
    bounds = np.asarray(inner.sys.actuator.ctrl_range, np.float32)
    action = Continuous(tuple(map(float, bounds[:, 0])), tuple(map(float, bounds[:, 1])))
    template = jax.eval_shape(inner.reset, jax.random.key(0))

    def reset(key: jax.Array) -> tuple[Any, jax.Array]:
        state = like(inner.reset(key), template)
        return state, jnp.asarray(state.obs, jnp.float32)

    def step(key: jax.Array, state: Any, taken: jax.Array) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        del key  # brax keeps what randomness it needs in its state
        state = like(inner.step(state, clip_action(taken, action)), template)
        return state, jnp.asarray(state.obs, jnp.float32), jnp.asarray(state.reward, jnp.float32), state.done > 0.5

    return Env(name, template.obs.shape[-1], action, max_steps or _MAX_STEPS, reset, step)


def names() -> list[str]:
    """brax's environments with their prefix; none where brax is not installed."""
    if importlib.util.find_spec("brax") is None:
        return []
    from brax.envs import _envs

    return [f"{_PREFIX}{name}" for name in _envs]
