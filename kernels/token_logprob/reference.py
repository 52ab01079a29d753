"""Plain-JAX log-probabilities in blocks of rows; see `kernels.token_logprob.api`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax


def log_prob(
    hidden: Array, head: Array | Callable[[Array], Array], ids: Array, temperature: float | Array, block: int
) -> tuple[Array, Array]:
    """A loop over blocks of equal size; rows of zeros fill the last one and are cut off again."""
    length = len(ids)
    blocks = max(1, -(-length // block))
    rows = -(-length // blocks)  # the fewest that give as many blocks: 129 rows are 65 + 65, not 128 + 128
    fill = blocks * rows - length
    parts = jnp.pad(hidden, ((0, fill), (0, 0))).reshape(blocks, rows, hidden.shape[1])
    tokens = jnp.pad(ids, (0, fill)).reshape(blocks, rows)
    logits = _wide_gradient(head if callable(head) else lambda part: _product(part, head), parts[0])

    # prevent_cse guards against a compiler that merges the second product with the first: none can, across two loops
    @lambda f: jax.checkpoint(f, prevent_cse=False)
    def one(block):
        part, tokens = block
        return of_logits(logits(part) / temperature, tokens)

    return jax.tree.map(lambda x: x.reshape(-1)[:length], lax.map(one, (parts, tokens)))


def of_logits(logits: Array, ids: Array) -> tuple[Array, Array]:
    """(log-probabilities [n], entropies [n]) from logits [n, V], in f32 at least."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    shifted = logits - lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(shifted)
    total = weights.sum(-1)
    mean = (weights * jnp.where(weights > 0, shifted, 0)).sum(-1) / total  # 0 * -inf is 0 here
    chosen = jnp.where(ids < 0, logits.shape[-1], ids)  # a negative index would count from the end
    picked = jnp.take_along_axis(shifted, chosen[:, None], -1, mode="fill", fill_value=jnp.nan)[:, 0]
    return picked - jnp.log(total), jnp.log(total) - mean


def _product(rows: Array, matrix: Array) -> Array:
    wide = jnp.promote_types(jnp.result_type(rows, matrix), jnp.float32)
    return jnp.matmul(rows, matrix, preferred_element_type=wide)


def _wide_gradient(head: Callable[[Array], Array], part: Array) -> Callable[[Array], Array]:
    """The same function of a block like `part`; what it closes over has its gradient summed over the loop in f32 at least.

    The two casts cancel in the compiled program: no f32 copy of a bf16 head exists.
    """
    pure, values = jax.closure_convert(head, part)
    wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in values]
    return lambda part: pure(part, *(w.astype(x.dtype) for w, x in zip(wide, values, strict=True)))
