"""Draws one token from logits, by inverting the cumulative distribution at one uniform number.

The token is a function of the distribution and the number alone, and the number of (key, request, position) alone: slots,
batch mix, chunk size, interruptions and speculation change nothing.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

_COLDEST = 1e-6  # far below it, dividing by the temperature leaves f32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What is sampled from: softmax(logits / temperature), cut to top_k, then top_p, then min_p, and renormalised.

    Attributes:
        temperature: 0 takes the most probable token, the first of equals.
        top_k: only the k most probable tokens (ties with the k-th stay); 0: all.
        top_p: only the most probable tokens that together reach this probability; 1: all.
        min_p: only tokens at least this fraction as probable as the most probable one; 0: all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if self.temperature != 0 and not _COLDEST <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be 0 (greedy) or finite and at least {_COLDEST}; got {self.temperature}"
            )
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be a whole number, at least 0 (all tokens); got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], where 1 keeps all tokens; got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], where 0 keeps all tokens; got {self.min_p}")

    @property
    def truncates(self) -> bool:
        """Whether some tokens can become impossible."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)


GREEDY = Sampling(temperature=0.0)


class Sample(NamedTuple):
    """One token per row.

    Attributes:
        token: i32.
        logp: f32, log-probability of the distribution that was sampled (0 where it is greedy).
        logp_full: f32, of softmax(logits), whatever the temperature and the cuts.
    """

    token: Array
    logp: Array
    logp_full: Array


def uniforms(key: Array, uid: Array, position: Array) -> Array:
    """f32 in (0, 1) for each (request, position of the token to draw): a function of these alone, shape of `position`."""
    one = lambda uid, position: jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, uid), position))
    uid, position = jnp.broadcast_arrays(uid, position)
    bits = jax.vmap(one)(uid.reshape(-1), position.reshape(-1)).reshape(position.shape)
    return ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


def sample(logits: Array, u: Array, sampling: Sampling) -> Sample:
    """Draws from logits [..., V] with one number in (0, 1) per row."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if sampling.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return Sample(token, jnp.zeros(token.shape, jnp.float32), _log_softmax_at(logits, token))
    plain = sampling.temperature == 1 and not sampling.truncates
    # The largest becomes 0 before the division: after it, rounding could leave every weight 0 at low temperatures.
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = scaled if plain else cut(scaled / sampling.temperature, sampling)
    weights = jnp.exp(scaled)
    token = invert(weights, u)
    logp = (_at(scaled, token) - jnp.log(jnp.sum(weights, axis=-1))).astype(jnp.float32)
    return Sample(token, logp, logp if plain else _log_softmax_at(logits, token))


def cut(scaled: Array, sampling: Sampling) -> Array:
    """Logits at the sampling temperature, -inf for tokens that the cuts leave out; the most probable one always stays."""
    if 0 < sampling.top_k < scaled.shape[-1]:
        smallest = jax.lax.top_k(scaled, sampling.top_k)[0][..., -1:]
        scaled = jnp.where(scaled < smallest, -jnp.inf, scaled)
    if sampling.top_p < 1:
        order = jnp.sort(scaled, axis=-1, descending=True)
        probability = jax.nn.softmax(order, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        smallest = jnp.min(jnp.where(before < sampling.top_p, order, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled < smallest, -jnp.inf, scaled)
    if sampling.min_p > 0:
        scaled = jnp.where(scaled < jnp.max(scaled, axis=-1, keepdims=True) + jnp.log(sampling.min_p), -jnp.inf, scaled)
    return scaled


def invert(weights: Array, u: Array) -> Array:
    """The first index of positive weight at which the running sum of weights [..., V] exceeds u times their sum."""
    # A parallel running sum need not grow where a weight is 0, hence the mask, and its end need not be its maximum.
    running = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0)
    total = jnp.max(running, axis=-1)
    target = u * (total * (1 - 2.0**-22))  # below the total, however it rounds
    return jnp.argmax(running > target[..., None], axis=-1).astype(jnp.int32)


def _log_softmax_at(logits: Array, token: Array) -> Array:
    return (_at(logits, token) - jax.nn.logsumexp(logits, axis=-1)).astype(jnp.float32)


def _at(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]
