"""Plain-JAX attention of one token; see `kernels.decode_attention.api`."""

import jax
import jax.numpy as jnp
from jax import Array

_UNROLLED = (
    32  # head sizes up to this are summed term by term: XLA's batched products of so small matrices are slow on a CPU
)


def attend(q: Array, k: Array, v: Array, length: Array | int) -> Array:
    """[H, D] of q [H, D], k and v [G, D, T]."""
    (heads, size), (groups, _, room) = q.shape, k.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q = q.reshape(groups, heads // groups, size)
    seen = jnp.arange(room) < length
    v = jnp.where(seen, v, 0)
    normalised = lambda scores: jax.nn.softmax(jnp.where(seen, scores * size**-0.5, jnp.finfo(wide).min), axis=-1)
    if size <= _UNROLLED:
        scores = sum(q[:, :, d, None].astype(wide) * k[:, None, d].astype(wide) for d in range(size))
        out = jnp.sum(normalised(scores).astype(v.dtype)[:, :, None] * v[:, None], axis=-1)
    else:
        scores = jnp.einsum("grd,gdt->grt", q, k, preferred_element_type=wide)
        out = jnp.einsum("grt,gdt->grd", normalised(scores).astype(v.dtype), v)
    return out.reshape(heads, size)
