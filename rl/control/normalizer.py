"""Running mean and variance of observations, as a pure pytree that lives in the train state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_EPSILON = 1e-8  # added to the variance: a constant observation becomes 0
_CLIP = 10.0  # bound of what the policy sees, in standard deviations


class Normalizer(NamedTuple):
    """Statistics of all observations so far; variance = m2 / count."""

    count: jax.Array  # f32 []
    mean: jax.Array  # f32 [observation]
    m2: jax.Array  # f32 [observation], sum of squared deviations from the mean


class Moments(NamedTuple):
    """Sums over observations standardised by a `Normalizer` (or not, without one)."""

    count: jax.Array  # f32 [...]
    sum: jax.Array  # f32 [..., observation]
    sum_squares: jax.Array  # f32 [..., observation]


def init(size: int) -> Normalizer:
    """A normalizer that changes nothing until it is updated."""
    return Normalizer(jnp.zeros((), jnp.float32), jnp.zeros(size, jnp.float32), jnp.zeros(size, jnp.float32))


def standardise(normalizer: Normalizer, obs: jax.Array) -> jax.Array:
    """(obs - mean) / sqrt(variance + 1e-8), unclipped; [..., observation]."""
    return (obs - normalizer.mean) / _std(normalizer)


def clip(standardised: jax.Array) -> jax.Array:
    """What a policy gets to see: standardised observations within 10 standard deviations."""
    return jnp.clip(standardised, -_CLIP, _CLIP)


def update(normalizer: Normalizer, moments: Moments) -> Normalizer:
    """Adds observations given by their standardised moments.

    With n, mean, M2 of the old observations, k, mean', M2' of the new ones and d = mean' - mean (Chan, Golub, LeVeque):

        n <- n + k      mean <- mean + d k / (n + k)      M2 <- M2 + M2' + d^2 n k / (n + k)

    The new moments come standardised by the old statistics, so their sums of squares do not cancel in f32, however far
    the mean is from zero.

    Args:
      normalizer: the statistics with which `moments` were standardised.
      moments: sums over new observations, with any leading axes (such as members and episodes). Entries whose sums
        are not finite are left out: the episode they come from has a return that is not finite either, and is counted
        there.
    """
    lead = tuple(range(moments.count.ndim))
    finite = jnp.all(jnp.isfinite(moments.sum) & jnp.isfinite(moments.sum_squares), axis=-1)
    k = jnp.sum(jnp.where(finite, moments.count, 0.0))
    total, squares = (jnp.sum(jnp.where(finite[..., None], x, 0.0), axis=lead) for x in moments[1:])
    mean_z = total / jnp.maximum(k, 1.0)
    std = _std(normalizer)
    shift = mean_z * std
    m2_new = jnp.maximum(squares - k * jnp.square(mean_z), 0.0) * jnp.square(std)
    count = normalizer.count + k
    share = k / jnp.maximum(count, 1.0)
    mean = normalizer.mean + shift * share
    return Normalizer(count, mean, normalizer.m2 + m2_new + jnp.square(shift) * normalizer.count * share)


def _std(normalizer: Normalizer) -> jax.Array:
    variance = normalizer.m2 / jnp.maximum(normalizer.count, 1.0)
    return jnp.sqrt(jnp.where(normalizer.count > 0, variance, 1.0) + _EPSILON)
