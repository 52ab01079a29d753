"""Mixture of experts: top-k routing without capacity limits, so no token is dropped and padding takes no one's place."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Experts(nn.Module):
    """sum over the chosen experts e of g_e down_e(silu(gate_e x) * up_e x), g the softmax of the router.

    Every expert runs on every token and the others get weight 0: the products stay plain contractions of unbatched weights,
    which is what a population of perturbed members needs, at experts / k times the arithmetic of a sorted dispatch.

    Attributes:
        experts, chosen: how many there are and how many a token uses.
        hidden: size of each expert.
        normalise: whether the chosen experts' weights are rescaled to sum to 1.
        dtype: of parameters and products; routing is in f32 or wider.
    """

    experts: int
    chosen: int
    hidden: int
    normalise: bool
    dtype: str

    @nn.compact
    def __call__(self, x, forced=None):
        """x [L, width], forced expert ids [L, k] or None -> ([L, width], ids [L, k] i32, most probable first)."""
        width, wide = x.shape[-1], jnp.promote_types(self.dtype, jnp.float32)
        router = nn.Dense(self.experts, False, wide, self.dtype, name="router")
        probability = nn.softmax(router(x.astype(wide)), axis=-1)
        ids = jax.lax.top_k(probability, self.chosen)[1] if forced is None else forced
        weight = jnp.take_along_axis(probability, ids, axis=-1)
        if self.normalise:
            weight = weight / jnp.sum(weight, axis=-1, keepdims=True)
        mix = jnp.sum(jax.nn.one_hot(ids, self.experts, dtype=wide) * weight[..., None], axis=-2)  # [L, experts]
        start = nn.initializers.lecun_normal(batch_axis=0)
        shape = (self.experts, width, self.hidden)
        gate = self.param("experts_gate", start, shape, self.dtype)
        up = self.param("experts_up", start, shape, self.dtype)
        down = self.param("experts_down", start, (self.experts, self.hidden, width), self.dtype)
        inner = nn.silu(jnp.einsum("ld,edf->elf", x, gate)) * jnp.einsum("ld,edf->elf", x, up)
        return jnp.einsum("elf,efd->ld", inner * mix.T[..., None].astype(x.dtype), down), ids
