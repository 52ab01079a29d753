"""Ternary fitness of pairs, and how it travels: two bits a pair, one a member."""

import jax.numpy as jnp
from jax import Array


def signs(scores: Array) -> Array:
    """Which member of a pair is better: sign(s_+ - s_-), int8 [...], of scores int32 [..., 2] on the same data."""
    plus, minus = scores[..., 0], scores[..., 1]
    return (plus > minus).astype(jnp.int8) - (plus < minus).astype(jnp.int8)  # a difference could overflow


def pack(trits: Array) -> Array:
    """int8 [n] in {-1, 0, 1} -> u8 [ceil(n / 4)], four in a byte, the first in the lowest bits."""
    quads = jnp.pad(trits, (0, -trits.shape[0] % 4)).reshape(-1, 4)
    return jnp.sum((quads + 1).astype(jnp.uint8) << jnp.arange(0, 8, 2, dtype=jnp.uint8), -1, dtype=jnp.uint8)


def unpack(packed: Array, count: int) -> Array:
    """The inverse of `pack`: u8 [..., ceil(count / 4)] -> int8 [..., count]."""
    quads = packed[..., None] >> jnp.arange(0, 8, 2, dtype=jnp.uint8) & jnp.uint8(3)
    return (quads.astype(jnp.int8) - 1).reshape(*packed.shape[:-1], -1)[..., :count]
