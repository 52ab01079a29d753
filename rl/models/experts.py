"""Mixture of experts: top-k routing without capacity limits, so no token is dropped and padding takes no one's place."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rl.models.dense import Dense


class Experts(nn.Module):
    """sum over the chosen experts e of g_e down_e(silu(gate_e x) * up_e x), g the softmax of the router.

    With `normalise`, g_e = I_e exp(s_e) / sum_j I_j exp(s_j) for router logits s and the indicator I of the chosen set: a
    softmax over the chosen logits alone, which stays finite however improbable a forced expert has become, and whose gradient
    is exactly 0 for the others. Else g is the softmax over all experts, which the others keep moving.

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
        """x [L, width], forced expert ids [L, k] or None -> ([L, width], ids [L, k] i32, most probable first).

        A token with a negative id (nothing recorded) is routed as if nothing were forced. One with an id beyond the experts,
        where `check_forced` could not see it, comes out NaN.
        """
        width, wide = x.shape[-1], jnp.promote_types(self.dtype, jnp.float32)
        logits = Dense(self.experts, False, wide, self.dtype, name="router")(x.astype(wide))
        ids = jax.lax.top_k(logits, self.chosen)[1]
        if forced is not None:
            ids = jnp.where(jnp.any(forced < 0, axis=-1, keepdims=True), ids, forced.astype(jnp.int32))
        pick = lambda scores: jnp.take_along_axis(scores, ids, axis=-1)
        weight = nn.softmax(pick(logits), axis=-1) if self.normalise else pick(nn.softmax(logits, axis=-1))
        mix = jnp.sum(jax.nn.one_hot(ids, self.experts, dtype=wide) * weight[..., None], axis=-2)  # [L, experts]
        if forced is not None:
            mix = jnp.where(jnp.all(ids < self.experts, axis=-1, keepdims=True), mix, jnp.nan)
        start = nn.initializers.lecun_normal(batch_axis=0)
        shape = (self.experts, width, self.hidden)
        gate = self.param("experts_gate", start, shape, self.dtype)
        up = self.param("experts_up", start, shape, self.dtype)
        down = self.param("experts_down", start, (self.experts, self.hidden, width), self.dtype)
        inner = nn.silu(jnp.einsum("ld,edf->elf", x, gate)) * jnp.einsum("ld,edf->elf", x, up)
        return jnp.einsum("elf,efd->ld", inner * mix.T[..., None].astype(x.dtype), down), ids


def check_forced(forced, experts: int, shape: tuple[int, ...]) -> None:
    """Refuses expert ids that cannot be forced; their range where they are concrete, so not under `jit` or `vmap`.

    Args:
        forced: integers [layers, L, k], -1 where nothing is forced.
        experts: how many there are.
        shape: the one they must have.

    Raises:
        ValueError: another shape, no integers, an id below -1 or beyond the experts.
    """
    if forced.shape != shape:
        raise ValueError(f"forced experts must be [layers, tokens, experts per token], {shape}; got {forced.shape}")
    if not jnp.issubdtype(forced.dtype, jnp.integer):
        raise ValueError(f"forced experts must be integer ids; got {forced.dtype}")
    if isinstance(forced, jax.core.Tracer):
        return
    ids = np.asarray(forced)
    outside = (ids < -1) | (ids >= experts)
    if outside.any():
        layer, token, _ = at = tuple(map(int, np.argwhere(outside)[0]))
        raise ValueError(
            f"forced experts must be ids 0 to {experts - 1}, or -1 where nothing is forced; got {ids[at]} in layer {layer} at "
            f"token {token} ({outside.sum()} such ids): were they recorded by another model?"
        )


def id_dtype(experts: int) -> np.dtype:
    """The smallest of i8, i16 and i32 that holds the ids of so many experts and -1."""
    return np.dtype(next(t for t in (np.int8, np.int16, np.int32) if experts - 1 <= np.iinfo(t).max))
