"""What a control environment is: two pure functions and a few static facts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


class EnvError(ValueError):
    """An environment that does not exist or cannot be used as asked."""


@dataclasses.dataclass(frozen=True)
class Discrete:
    """Actions 0 .. n-1, an i32 scalar."""

    n: int


@dataclasses.dataclass(frozen=True)
class Continuous:
    """Actions in a box, f32 [size]; `low` and `high` have one finite number per dimension."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def size(self) -> int:
        """Number of dimensions."""
        return len(self.low)

    @property
    def centre(self) -> jax.Array:
        """Middle of the box, f32 [size]."""
        return (jnp.asarray(self.high, jnp.float32) + jnp.asarray(self.low, jnp.float32)) / 2

    @property
    def half_range(self) -> jax.Array:
        """Half the width of the box, f32 [size]."""
        return (jnp.asarray(self.high, jnp.float32) - jnp.asarray(self.low, jnp.float32)) / 2


@dataclasses.dataclass(frozen=True)
class Env:
    """One unbatched environment; `jax.vmap` makes many. Stepping never resets.

    Attributes:
      name: what `rl.envs.make` was asked for.
      observation_size: length of the observation, which is flat f32 [observation_size].
      action: the kind of action.
      max_steps: time limit. Reaching it truncates an episode: whoever steps counts; `step` does not report it.
      reset: `key -> (state, observation)`.
      step: `(key, state, action) -> (state, observation, reward f32 [], terminated bool [])`; continuous actions are
        clipped to their bounds. The state has the structure, shapes and dtypes of `reset`'s, so it fits a loop's carry.
        Where the dynamics are deterministic the key is unused and compiles to nothing.
    """

    name: str
    observation_size: int
    action: Discrete | Continuous
    max_steps: int
    reset: Callable[[jax.Array], tuple[Any, jax.Array]]
    step: Callable[[jax.Array, Any, jax.Array], tuple[Any, jax.Array, jax.Array, jax.Array]]


def clip_action(action: jax.Array, kind: Discrete | Continuous) -> jax.Array:
    """A continuous action inside its bounds; discrete ones unchanged."""
    if isinstance(kind, Discrete):
        return action
    return jnp.clip(action, jnp.asarray(kind.low, jnp.float32), jnp.asarray(kind.high, jnp.float32))


def like(tree: Any, template: Any) -> Any:
    """Strongly typed arrays with the dtypes of `template`."""
    return jax.tree.map(lambda x, t: jnp.asarray(x, t.dtype), tree, template)
