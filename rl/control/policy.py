"""Stochastic policies: what a network's output means for a kind of action, as pure functions.

Discrete actions: the network gives logits. Continuous actions: it gives u, the mean is centre + half_range * tanh(u),
inside the bounds, and the action is Gaussian around it with standard deviation half_range * exp(log_std), one learned
`log_std` per dimension; the environment clips what falls outside, and densities are those of the unclipped Gaussian.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rl.envs import Continuous, Discrete
from rl.models.mlp import MLP


class Distribution(NamedTuple):
    """Parameters of an action distribution; batched by leading axes."""

    location: jax.Array  # logits [..., n], or the mean action [..., size]
    log_std: jax.Array | None = None  # [size], in units of half the action range; None: discrete or deterministic


class Policy(nn.Module):
    """A multi-layer perceptron from observations [..., observation] to a `Distribution`.

    Attributes:
      action: the kind of action.
      hidden: sizes of the hidden layers.
      stochastic: whether actions are drawn; gives a continuous policy its parameter `log_std`.
      output_scale: see `rl.models.mlp.MLP`.
      log_std_init: first value of `log_std`.
    """

    action: Discrete | Continuous
    hidden: tuple[int, ...] = (256, 256, 256)
    stochastic: bool = False
    output_scale: float | None = None
    log_std_init: float = -0.7

    @nn.compact
    def __call__(self, obs: jax.Array) -> Distribution:
        """The action distribution at obs."""
        outputs = self.action.n if isinstance(self.action, Discrete) else self.action.size
        x = MLP(outputs, self.hidden, output_scale=self.output_scale)(obs)
        if isinstance(self.action, Discrete):
            return Distribution(x)
        mean = self.action.centre + self.action.half_range * jnp.tanh(x)
        if not self.stochastic:
            return Distribution(mean)
        return Distribution(mean, self.param("log_std", nn.initializers.constant(self.log_std_init), (outputs,)))


def mode(action: Discrete | Continuous, distribution: Distribution) -> jax.Array:
    """The most likely action: argmax of the logits, i32 [...], or the mean, f32 [..., size]."""
    if isinstance(action, Discrete):
        return jnp.argmax(distribution.location, axis=-1).astype(jnp.int32)
    return distribution.location


def sample(action: Discrete | Continuous, distribution: Distribution, key: jax.Array) -> jax.Array:
    """Draws an action, shaped as in `mode`.

    Raises:
      ValueError: a continuous distribution without a standard deviation.
    """
    if isinstance(action, Discrete):
        return jax.random.categorical(key, distribution.location, axis=-1).astype(jnp.int32)
    noise = jax.random.normal(key, distribution.location.shape, jnp.float32)
    return distribution.location + _std(action, distribution) * noise


def log_prob(action: Discrete | Continuous, distribution: Distribution, taken: jax.Array) -> jax.Array:
    """Log-probability (discrete) or log-density (continuous, before clipping) of actions, f32 [...]."""
    if isinstance(action, Discrete):
        logp = jax.nn.log_softmax(distribution.location)
        return jnp.take_along_axis(logp, taken[..., None], axis=-1)[..., 0]
    std = _std(action, distribution)
    z = (taken - distribution.location) / std
    return -jnp.sum(0.5 * jnp.square(z) + jnp.log(std) + 0.5 * math.log(2 * math.pi), axis=-1)


def entropy(action: Discrete | Continuous, distribution: Distribution) -> jax.Array:
    """Entropy in nats, f32 [...]; differential for continuous actions."""
    if isinstance(action, Discrete):
        logp = jax.nn.log_softmax(distribution.location)
        return -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    per_dimension = jnp.log(_std(action, distribution)) + 0.5 * math.log(2 * math.pi * math.e)
    return jnp.broadcast_to(jnp.sum(per_dimension), distribution.location.shape[:-1])


def _std(action: Continuous, distribution: Distribution) -> jax.Array:
    if distribution.log_std is None:
        raise ValueError(
            "drawing continuous actions needs a standard deviation, but the policy has none: Policy(stochastic=True)"
        )
    return action.half_range * jnp.exp(distribution.log_std)
