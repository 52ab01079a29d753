"""What callers import."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels import dispatch
from kernels.token_logprob import gradient, reference

_KERNELS = ("pallas_tpu", "pallas_gpu")


def log_prob(
    hidden: Array,
    head: Array | Callable[[Array], Array],
    ids: Array,
    *,
    temperature: float | Array = 1.0,
    block: int = 128,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """log p(ids_i) and the entropy of p = softmax(hidden_i W / temperature), for every row i.

    With z the scaled logits: log p(v) = z_v - log sum_u exp z_u, and entropy -sum_u p(u) log p(u), in nats. Rows are taken
    `block` at a time, one product with the head each, so that memory is block * V where the plain form needs L * V; the
    gradient makes each block's logits again (one more product) instead of keeping them. A kernel takes tiles of the vocabulary
    too: no array of logits exists (on a GPU the gradient has 2^26 of them at a time).

    Under `vmap` over sequences that share the head a kernel is called once, with the rows of all, and so is its gradient: that
    of the head is summed inside the call, and no array [sequences, D, V] exists. Gradients per sequence, `vmap` of `grad`, are
    one such array and as many calls, like everything over several heads. Derivatives through a kernel are reverse-mode alone.

    Args:
        hidden: [L, D].
        head: [D, V] (a tied head is its embedding transposed), or any function of rows [n, D] -> logits [n, V], which always
            runs as the reference; the gradient reaches what it closes over. Logits of -inf are tokens that cannot be drawn.
        ids: [L] integers; an id outside 0 .. V - 1 has log-probability NaN.
        temperature: > 0, one number; may be traced.
        block: rows per product of the reference. Under `vmap` over n sequences a product has n * block rows.
        implementation: see `kernels.use`.

    Returns:
        (log-probabilities [L], entropies [L]), f32 (f64 for f64 logits). Products accumulate in that type; the head's gradient
        is summed over blocks in the head's own type, one rounding a block for bf16.

    Raises:
        ValueError: shapes that do not fit, ids that are not integers, a block below 1, a temperature that is not positive,
            a named kernel that cannot serve.
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
    ids = ids.astype(jnp.promote_types(ids.dtype, jnp.int32))  # V may be more than a narrow type holds
    if block < 1:
        raise ValueError(f"block must be at least 1 row; got {block}")
    if jnp.ndim(temperature):
        raise ValueError(
            f"temperature is one number; got shape {jnp.shape(temperature)}: map over temperatures with vmap"
        )
    if isinstance(temperature, (int, float, np.number)) and not temperature > 0:
        raise ValueError(
            f"temperature must be positive; got {temperature} (a greedy choice has no distribution to score)"
        )
    chosen = _choose(hidden, head, implementation)
    if chosen == "reference":
        return reference.log_prob(hidden, head, ids, temperature, block)
    tokens = jnp.where((ids >= 0) & (ids < head.shape[1]), ids, -1).astype(jnp.int32)
    scale = 1 / jnp.asarray(temperature, jnp.float32)
    return gradient.log_prob(dispatch.module("token_logprob", chosen), hidden, head, tokens, scale)


def serves(width: int, vocab: int, dtype: jnp.dtype, implementation: str | None = None) -> bool:
    """Whether `log_prob` with a matrix as head would run a kernel: for callers whose head may be a function or its matrix."""
    shape = jax.ShapeDtypeStruct
    return _choose(shape((1, width), dtype), shape((width, vocab), dtype), implementation) != "reference"


def _choose(hidden: Array, head: Array | Callable, implementation: str | None) -> str:
    shape = f"hidden [*, {hidden.shape[1]}] {hidden.dtype.name}"
    shape += ", a function as head" if callable(head) else f", head {list(head.shape)} {head.dtype.name}"

    def unserved(name) -> str:
        kernel = dispatch.module("token_logprob", name)
        if callable(head):
            return "the head is a function: give its matrix"
        if hidden.dtype != head.dtype or hidden.dtype not in map(jnp.dtype, kernel.DTYPES):
            return f"hidden and head must be of one type, {' or '.join(jnp.dtype(d).name for d in kernel.DTYPES)}"
        return kernel.unserved(*head.shape, hidden.dtype)

    limits = {name: functools.partial(unserved, name) for name in _KERNELS}
    return dispatch.choose("token_logprob", shape, limits, implementation)
