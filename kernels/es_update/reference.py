"""Plain-JAX estimate; see `kernels.es_update.api`."""

import jax.numpy as jnp
from jax import Array


def update(weights: Array, left, right) -> Array:
    """sum_gij weights * left_gi right_gj^T as two contractions."""
    left, right = (jnp.stack([g.array() for g in f], axis=2) if isinstance(f, tuple) else f for f in (left, right))
    if weights.shape[1:] == (1, 1):
        weighted = weights[..., None, None] * right
    else:
        weighted = jnp.einsum("gij,gjskn->giskn", weights, right)
    return jnp.einsum("giskm,giskn->smn", left, weighted)
