"""The state recurrence of RWKV-7, token by token and in chunks: decay, removal along one direction, addition of another.

Per head, with M [value channels, key channels] and vectors of that head:
    M <- M diag(w) - (M kk) b^T + v k^T,   o = M r.
Everything here is in the precision of its inputs; callers pass f32 (or f64).
"""

import jax
import jax.numpy as jnp
from jax import Array

MAX_CHUNK = (
    64  # decays are above exp(-exp(-0.5)) = 0.545; gradients hold 0.545^-128 = 5e33, the last that is still an f32
)


def step(state: Array, r: Array, w: Array, k: Array, v: Array, kk: Array, b: Array) -> tuple[Array, Array]:
    """One token. state [H, S, S], the others [H, S]. Returns (state, o [H, S])."""
    removed = jnp.einsum("hvk,hk->hv", state, kk)
    state = state * w[:, None] - removed[..., None] * b[:, None] + v[..., None] * k[:, None]
    return state, jnp.einsum("hvk,hk->hv", state, r)


def chunked(
    state: Array,
    r: Array,
    w: Array,
    k: Array,
    v: Array,
    kk: Array,
    b: Array,
    chunk: int,
    segments: Array | None = None,
) -> tuple[Array, Array]:
    """Many tokens, exactly, with products inside chunks and a scan over them.

    Inside a chunk M_t = N_t diag(W_t), W_t the product of decays since its start, so
        N_t = N_0 + sum_{s <= t} u_s (b_s / W_s)^T + v_s (k_s / W_s)^T,   u_t = -N_{t-1} alpha_t,   alpha_t = W_{t-1} kk_t.
    The u solve a unit triangular system, (I + A) U = -(alpha N_0^T + B V), with A_ts = alpha_t . b_s / W_s and
    B_ts = alpha_t . k_s / W_s for s < t. Each segment has a W of its own, only pairs inside it count, and N_0 if it is its.

    Args:
        state: [H, S, S].
        r, w, k, v, kk, b: [L, H, S].
        chunk: tokens per chunk, at most `MAX_CHUNK`; changes no number beyond rounding.
        segments: [L] i32, each a sequence of its own that starts from a state of 0 (`state` belongs to the first); None: one.

    Returns:
        (state after the last token, o [L, H, S]).
    """
    length = len(r)
    chunk = min(chunk, length)
    padding = [(0, -length % chunk), (0, 0), (0, 0)]
    cut = lambda x, fill: jnp.pad(x, padding, constant_values=fill).reshape(-1, chunk, *x.shape[1:])
    pieces = (cut(r, 0), cut(w, 1), cut(k, 0), cut(v, 0), cut(kk, 0), cut(b, 0))  # padding: a decay of 1, nothing else
    if segments is None:
        state, o = jax.lax.scan(lambda state, piece: _chunk(state, piece, None), state, pieces)
    else:
        ids = jnp.pad(segments, padding[0], mode="edge").reshape(-1, chunk)
        before = jnp.concatenate([segments[:1], ids[:-1, -1]])  # the segment of the state that enters each chunk
        state, o = jax.lax.scan(lambda state, piece: _chunk(state, *piece), state, (pieces, (ids, before)))
    return state, o.reshape(-1, *r.shape[1:])[:length]


def _chunk(state: Array, piece, segments) -> tuple[Array, Array]:
    """One chunk; segments: those of its tokens [chunk] and that of the state, or None."""
    r, w, k, v, kk, b = piece
    after = jnp.cumprod(w, axis=0)
    before = jnp.concatenate([jnp.ones_like(w[:1]), after[:-1]])
    pairs = lambda x, y, diagonal: jnp.tril(jnp.einsum("thk,shk->hts", x, y), diagonal)
    continues = ends = lambda x: x  # keeps what belongs to the state that enters, to the one that leaves
    left = state
    if segments is not None:
        ids, owner = segments
        first = jnp.concatenate([ids[:1] != owner, ids[1:] != ids[:-1]])[:, None, None]
        after = _restarting_product(w, first)
        before = jnp.where(first, 1, jnp.concatenate([jnp.ones_like(w[:1]), after[:-1]]))
        every, same = pairs, ids[:, None] == ids
        pairs = lambda x, y, diagonal: jnp.where(same, every(x, y, diagonal), 0)
        continues = lambda x: jnp.where((ids == owner)[:, None, None], x, 0)
        ends = lambda x: jnp.where((ids == ids[-1])[:, None, None], x, 0)
        left = jnp.where(ids[-1] == owner, state, 0)
    alpha, rho, beta, kappa = before * kk, after * r, b / after, k / after
    target = jnp.einsum("hvk,thk->htv", state, continues(alpha)) + jnp.einsum(
        "hts,shv->htv", pairs(alpha, kappa, -1), v
    )
    system = pairs(alpha, beta, -1)  # its unit diagonal is implied
    u = -jax.scipy.linalg.solve_triangular(system, target, lower=True, unit_diagonal=True)
    o = (
        jnp.einsum("hvk,thk->thv", state, continues(rho))
        + jnp.einsum("hts,hsv->thv", pairs(rho, beta, 0), u)
        + jnp.einsum("hts,shv->thv", pairs(rho, kappa, 0), v)
    )
    grown = left + jnp.einsum("hsv,shk->hvk", u, ends(beta)) + jnp.einsum("shv,shk->hvk", v, ends(kappa))
    return grown * after[-1][:, None], o


def _restarting_product(w: Array, first: Array) -> Array:
    """Running products of w [L, ...] over the first axis that start anew where `first`."""

    def join(left, right):
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] * right[1])

    return jax.lax.associative_scan(join, (jnp.broadcast_to(first, w.shape), w))[1]
