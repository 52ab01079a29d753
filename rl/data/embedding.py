"""One vector per prompt: the mean of a language model's hidden states over the prompt's tokens."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rl.models.language import LanguageModel, Params
from rl.types import pad


def embed(model: LanguageModel, params: Params, ids: Sequence[Sequence[int]], *, block: int = 256) -> np.ndarray:
    """Mean-pooled hidden states e = (1/L) sum_t h_t of every prompt, after the model's final norm.

    Compiled once: all blocks have `block` rows of the longest prompt's length.

    Args:
        model: see `rl.models.presets.make`.
        params: such as those of the warm start; the vectors stay as they are while training goes on.
        ids: tokens of each prompt, at least one.
        block: prompts at a time.

    Returns:
        f32 [Q, width].

    Raises:
        ValueError: no prompts, one without tokens, an id outside the vocabulary, or a block below 1.
    """
    if not len(ids) or not all(map(len, ids)) or block < 1:
        empty = sum(not len(tokens) for tokens in ids)
        raise ValueError(
            f"embed needs prompts of at least one token and a block of at least 1; got {len(ids)} prompts, {empty} without "
            f"tokens, block {block}"
        )
    table, lengths = pad(ids)
    if table.min() < 0 or table.max() >= model.config.vocab:
        raise ValueError(
            f"ids must be between 0 and {model.config.vocab - 1}, the model's vocabulary; got {table.min()} to {table.max()}"
        )
    block = min(block, len(ids))
    rows = np.minimum(np.arange(-(-len(ids) // block) * block), len(ids) - 1).reshape(-1, block)
    parts = [np.asarray(_pooled(model, params, table[some], lengths[some])) for some in rows]
    return np.concatenate(parts)[: len(ids)]


@functools.partial(jax.jit, static_argnums=0)
def _pooled(model: LanguageModel, params: Params, ids: Array, lengths: Array) -> Array:
    def one(ids, length):
        real = (jnp.arange(len(ids)) < length)[:, None]
        hidden, _ = model.forward(params, ids, None, 0, length)
        # hidden rows of padding may hold anything: chosen away, not multiplied by 0
        return jnp.sum(jnp.where(real, hidden.astype(jnp.float32), 0), axis=0) / length

    return jax.vmap(one)(ids, lengths)
