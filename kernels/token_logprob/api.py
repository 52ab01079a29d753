"""What callers import."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from kernels.token_logprob import reference


def log_prob(
    hidden: Array,
    head: Array | Callable[[Array], Array],
    ids: Array,
    *,
    temperature: float | Array = 1.0,
    block: int = 128,
) -> tuple[Array, Array]:
    """log p(ids_i) and the entropy of p = softmax(hidden_i W / temperature), for every row i.

    With z the scaled logits: log p(v) = z_v - log sum_u exp z_u, and entropy -sum_u p(u) log p(u), in nats. Rows are taken
    `block` at a time, one product with the head each, so that memory is block * V where the plain form needs L * V; the
    gradient makes each block's logits again (one more product) instead of keeping them.

    Args:
        hidden: [L, D].
        head: [D, V] (a tied head is its embedding transposed), or any function of rows [n, D] -> logits [n, V]; the gradient
            reaches what it closes over. Logits of -inf are tokens that cannot be drawn.
        ids: [L] integers; an id outside 0 .. V - 1 has log-probability NaN.
        temperature: > 0, one number; may be traced.
        block: rows per product. Under `vmap` over n sequences a product has n * block rows.

    Returns:
        (log-probabilities [L], entropies [L]), f32 (f64 for f64 logits). Products accumulate in that type; the head's gradient
        is summed over blocks in the head's own type, one rounding a block for bf16.

    Raises:
        ValueError: shapes that do not fit, ids that are not integers, a block below 1, a temperature that is not positive.
    """
    matrix = not callable(head)
    if hidden.ndim != 2 or ids.shape != hidden.shape[:1] or (matrix and head.shape[:-1] != hidden.shape[1:]):
        last = f" and head {head.shape}" if matrix else ""
        raise ValueError(
            f"log_prob needs hidden [L, D], ids [L] and a head [D, V] or a function; got hidden {hidden.shape}, ids "
            f"{ids.shape}{last}"
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be integers; got {ids.dtype}")
    if block < 1:
        raise ValueError(f"block must be at least 1 row; got {block}")
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(
            f"temperature must be positive; got {temperature} (a greedy choice has no distribution to score)"
        )
    return reference.log_prob(hidden, head, ids, temperature, block)
