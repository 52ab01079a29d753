"""The sum over members as a kernel needs it: one contraction, out = sum_c L_c^T (f_c R_c), over c = (block, row, rank)."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels.noise_bits import Generated

KEY, IDENTITY, ELEMENT = slice(0, 4), slice(4, 5), slice(5, 6)  # columns of an address


class Terms(NamedTuple):
    """The C terms of the contraction.

    Attributes:
        weight: f32 [*B, C, 1], f: the weight of a member that shares no factor, else 1.
        left: f32 [*B, C, m], or the address of each row, u32 [*B, C, 6]: key, identity, the row's first element.
        right: likewise, of n columns; stored, and with the weights in it, where members share factors.
    """

    weight: Array
    left: Array
    right: Array


def terms(weights: Array, left: Array | Generated, right: Array | Generated, multiple: int) -> Terms:
    """Lays the sum out, with terms of weight 0 up to a multiple.

    Members of a crossed block share factors: their right ones are drawn, few as they are, and summed over the block's columns
    first. That is the smaller of the two contractions by far.

    Args:
        weights: [*B, G, P, Q].
        left: [*B, G, P, r, m], or addresses: ids [*B, G, P], key [*B, 4].
        right: [*B, G, Q, r, n], or addresses.
        multiple: of the number of terms. Axes of B have size 1 where an operand is the same for all.
    """
    rank, (rows, columns) = left.shape[-2], weights.shape[-2:]
    weight = jnp.repeat(weights.reshape(*weights.shape[:-3], -1), rank, axis=-1)[..., None]
    if rows * columns > 1:
        stored = drawn(right) if isinstance(right, Generated) else right
        right = jnp.einsum("...gij,...gjkn->...gikn", weights, stored, precision="highest")
        weight = jnp.ones((*[1] * (weights.ndim - 3), weights.shape[-3] * rows * rank, 1), weights.dtype)
    fill = -weight.shape[-2] % multiple
    padded = lambda x: jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, fill), (0, 0)])
    return Terms(padded(weight), padded(_rows(left)), padded(_rows(right)))


def drawn(factor: Generated) -> Array:
    """The factors of an address with leading axes on key and ids."""
    lead = np.broadcast_shapes(factor.key.shape[:-1], factor.ids.shape[:-2])
    key = jnp.moveaxis(factor.key, -1, 0)[..., None, None]
    ids = jnp.broadcast_to(factor.ids, (*lead, *factor.ids.shape[-2:]))
    return dataclasses.replace(factor, key=key, ids=ids).array()


def _rows(factor: Array | Generated) -> Array:
    if not isinstance(factor, Generated):
        return factor.reshape(*factor.shape[:-4], -1, factor.shape[-1])
    *lead, blocks, members = factor.ids.shape
    lead, each = np.broadcast_shapes(factor.key.shape[:-1], lead), (blocks, members, factor.rank)
    first = jnp.arange(factor.rank, dtype=jnp.uint32) * np.uint32(factor.size)
    words = [*jnp.moveaxis(factor.key, -1, 0)[..., None, None, None], factor.ids[..., None], first]
    return jnp.stack([jnp.broadcast_to(w, (*lead, *each)).reshape(*lead, -1) for w in words], axis=-1)
