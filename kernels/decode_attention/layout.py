"""Slots in one row, as the kernels see them: which cache a slot reads is a number, so that a shared cache is never copied."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class Slots(NamedTuple):
    """S tokens, each with the cache it reads.

    Attributes:
        q: [S, G, R, D], the R query heads of each key-value head.
        k, v: [C, G, D, T].
        length: i32 [S], 0 to T.
        owner: i32 [S], the cache of each slot.
        lead: leading axes of the result, with S = their product.
    """

    q: Array
    k: Array
    v: Array
    length: Array
    owner: np.ndarray
    lead: tuple[int, ...]

    def heads(self, out: Array) -> Array:
        """[*lead, H, D] of out [S, G, >= R, D]."""
        groups, rows, size = self.q.shape[1:]
        return out[:, :, :rows].reshape(*self.lead, groups * rows, size)


def in_slots(q: Array, k: Array, v: Array, length: Array) -> Slots:
    """q [*lead, H, D], k and v [*lead, G, D, T], length [*lead]; any may have leading axes of size 1."""
    caches = np.broadcast_shapes(k.shape[:-3], v.shape[:-3])
    lead = np.broadcast_shapes(q.shape[:-2], caches, length.shape)
    (heads, size), (groups, _, room) = q.shape[-2:], k.shape[-3:]
    flat = lambda x, lead, *rest: jnp.broadcast_to(x, (*lead, *x.shape[len(lead) :])).reshape(-1, *rest)
    numbers = np.arange(np.prod(caches, dtype=np.int32), dtype=np.int32).reshape(caches)
    return Slots(
        flat(q, lead, groups, heads // groups, size),
        flat(k, caches, groups, size, room),
        flat(v, caches, groups, size, room),
        jnp.clip(flat(length, lead), 0, room),
        np.broadcast_to(numbers, lead).reshape(-1),
        lead,
    )
