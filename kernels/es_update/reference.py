"""Plain-JAX estimate; see `kernels.es_update.api`."""

import jax.numpy as jnp
from jax import Array


def update(weights: Array, left: Array, right: Array) -> Array:
    """sum_gij weights * left_gi right_gj^T as two contractions."""
    if weights.shape[1:] == (1, 1):
        weighted = weights[..., None, None] * right
    else:
        weighted = jnp.einsum("gij,gjskn->giskn", weights, right)
    return jnp.einsum("giskm,giskn->smn", left, weighted)
