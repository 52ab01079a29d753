"""Causal grouped-query attention of one sequence, over itself or over a cache of keys and values."""

import itertools

import jax
import jax.numpy as jnp
from jax import Array

from kernels import decode_attention

_CPU_BLOCK, _BLOCK = 64, 512  # queries whose scores exist at one time


def store(cache: Array, rows: Array, index: Array | None, positions: Array, filled: Array) -> Array:
    """Writes rows [L, kv_heads, head_dim] into a cache [..., kv_heads, head_dim, T] at their positions.

    Padding and what lies beyond the cache is dropped.
    """
    at = jnp.where(positions < filled, positions, cache.shape[-1])
    place = (slice(None), slice(None), at)
    if index is None:
        return cache.at[place].set(rows.astype(cache.dtype).transpose(1, 2, 0), mode="drop")
    return cache.at[(index, *place)].set(rows.astype(cache.dtype), mode="drop")


def attend(q: Array, k: Array, v: Array, positions: Array, filled: Array | int) -> Array:
    """softmax(q k^T / sqrt(d)) v over keys 0 .. position, scores and softmax in f32 or wider.

    Args:
        q: [L, heads, d], head h reads key-value head h // (heads / kv_heads).
        k, v: [kv_heads, d, T]; entries from `filled` on are never read: they may be NaN.
        positions: [L] of the queries.

    Returns:
        [L, heads, d].
    """
    if len(q) == 1:
        return decode_attention.attend(q[0], k, v, jnp.minimum(positions[0] + 1, filled))[None]
    v = jnp.where(jnp.arange(v.shape[-1]) < filled, v, 0)
    return _attend(q, k, v, jnp.zeros_like(positions), jnp.minimum(positions, filled - 1))[0]


def attend_whole(q: Array, k: Array, v: Array, filled: Array | int, first: Array | None = None) -> Array:
    """`attend` of a sequence to itself, in blocks of queries: none meets the keys after its block.

    That is half the arithmetic. Gradients make the scores again, block by block, from one number per query (as in
    FlashAttention, arXiv 2205.14135) instead of keeping L^2 of them: on a CPU everything stays in cache.

    Args:
        q: [L, heads, d].
        k, v: [kv_heads, d, L]; values from `filled` on are never read: they may be NaN.
        filled: tokens of the sequence.
        first: [L], the first key each query sees, that of its segment in a packed row; None: 0.

    Returns:
        [L, heads, d].
    """
    length = len(q)
    places = jnp.arange(length)
    v = jnp.where(places < filled, v, 0)
    first, last = jnp.zeros_like(places) if first is None else first, jnp.minimum(places, filled - 1)
    blocks = -(-length // (_CPU_BLOCK if jax.default_backend() == "cpu" else _BLOCK))
    edges = [length * i // blocks for i in range(blocks + 1)]
    parts = [_block(q[a:b], k[..., :b], v[..., :b], first[a:b], last[a:b]) for a, b in itertools.pairwise(edges)]
    return parts[0] if blocks == 1 else jnp.concatenate(parts)


@jax.custom_vjp
def _block(q: Array, k: Array, v: Array, first: Array, last: Array) -> Array:
    """Attention of some queries to keys first .. last, [L] each."""
    return _attend(q, k, v, first, last)[0]


def _attend(q: Array, k: Array, v: Array, first: Array, last: Array) -> tuple[Array, Array, Array]:
    """(out [L, heads, d]; out [kv_heads, r, L, d] and log sum exp of the scores [kv_heads, r, L, 1], f32 or wider)."""
    scores = _scores(q, k, first, last)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("grlt,gdt->grld", weights.astype(v.dtype), v, preferred_element_type=scores.dtype) / total
    return _joined(out).astype(v.dtype), out, top + jnp.log(total)


def _forward(q: Array, k: Array, v: Array, first: Array, last: Array):
    joined, out, log_total = _attend(q, k, v, first, last)
    return joined, (q, k, v, first, last, out, log_total)


def _backward(kept, gradient: Array):
    """With weights W and dW = g v^T, the gradient of the scores is W (dW - sum_t W dW), and the sum is that of g times out."""
    q, k, v, first, last, out, log_total = kept
    weights = jnp.exp(_scores(q, k, first, last) - log_total)
    wide = weights.dtype
    gradient = _grouped(gradient, len(k))
    product = lambda form, x, y: jnp.einsum(form, x, y, preferred_element_type=wide)
    moved = product("grld,gdt->grlt", gradient, v)
    shared = jnp.sum(gradient.astype(wide) * out, axis=-1, keepdims=True)
    scores = (weights * (moved - shared)).astype(q.dtype)
    size = q.shape[-1] ** -0.5
    return (
        (_joined(product("grlt,gdt->grld", scores, k)) * size).astype(q.dtype),
        (product("grlt,grld->gdt", scores, _grouped(q, len(k))) * size).astype(k.dtype),
        product("grlt,grld->gdt", weights.astype(v.dtype), gradient).astype(v.dtype),
        None,
        None,
    )


_block.defvjp(_forward, _backward)


def _scores(q: Array, k: Array, first: Array, last: Array) -> Array:
    """q k^T / sqrt(d) [kv_heads, r, L, T] in f32 or wider, the lowest number outside first .. last."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("grld,gdt->grlt", _grouped(q, len(k)), k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    keys = jnp.arange(k.shape[-1])
    return jnp.where((keys <= last[:, None]) & (keys >= first[:, None]), scores, jnp.finfo(wide).min)


def _grouped(x: Array, groups: int) -> Array:
    """[L, heads, d] -> [groups, heads / groups, L, d]."""
    length, heads, size = x.shape
    return x.reshape(length, groups, heads // groups, size).transpose(1, 2, 0, 3)


def _joined(x: Array) -> Array:
    """The inverse of `_grouped`."""
    groups, each, length, size = x.shape
    return x.transpose(2, 0, 1, 3).reshape(length, groups * each, size)
