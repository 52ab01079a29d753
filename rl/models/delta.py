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
    state: Array, r: Array, w: Array, k: Array, v: Array, kk: Array, b: Array, chunk: int
) -> tuple[Array, Array]:
    """Many tokens, exactly, with products inside chunks and a scan over them.

    Inside a chunk M_t = N_t diag(W_t), W_t the product of decays since its start, so
        N_t = N_0 + sum_{s <= t} u_s (b_s / W_s)^T + v_s (k_s / W_s)^T,   u_t = -N_{t-1} alpha_t,   alpha_t = W_{t-1} kk_t.
    The u solve a unit triangular system, (I + A) U = -(alpha N_0^T + B V), with A_ts = alpha_t . b_s / W_s and
    B_ts = alpha_t . k_s / W_s for s < t.

    Args:
        state: [H, S, S].
        r, w, k, v, kk, b: [L, H, S].
        chunk: tokens per chunk, at most `MAX_CHUNK`; changes no number beyond rounding.

    Returns:
        (state after the last token, o [L, H, S]).
    """
    length = len(r)
    chunk = min(chunk, length)
    padding = [(0, -length % chunk), (0, 0), (0, 0)]
    cut = lambda x, fill: jnp.pad(x, padding, constant_values=fill).reshape(-1, chunk, *x.shape[1:])
    pieces = (cut(r, 0), cut(w, 1), cut(k, 0), cut(v, 0), cut(kk, 0), cut(b, 0))  # padding: a decay of 1, nothing else
    state, o = jax.lax.scan(_chunk, state, pieces)
    return state, o.reshape(-1, *r.shape[1:])[:length]


def _chunk(state: Array, piece) -> tuple[Array, Array]:
    r, w, k, v, kk, b = piece
    after = jnp.cumprod(w, axis=0)
    before = jnp.concatenate([jnp.ones_like(w[:1]), after[:-1]])
    alpha, rho, beta, kappa = before * kk, after * r, b / after, k / after
    pairs = lambda x, y, diagonal: jnp.tril(jnp.einsum("thk,shk->hts", x, y), diagonal)
    target = jnp.einsum("hvk,thk->htv", state, alpha) + jnp.einsum("hts,shv->htv", pairs(alpha, kappa, -1), v)
    system = pairs(alpha, beta, -1)  # its unit diagonal is implied
    u = -jax.scipy.linalg.solve_triangular(system, target, lower=True, unit_diagonal=True)
    o = (
        jnp.einsum("hvk,thk->thv", state, rho)
        + jnp.einsum("hts,hsv->thv", pairs(rho, beta, 0), u)
        + jnp.einsum("hts,shv->thv", pairs(rho, kappa, 0), v)
    )
    grown = state + jnp.einsum("hsv,shk->hvk", u, beta) + jnp.einsum("shv,shk->hvk", v, kappa)
    return grown * after[-1][:, None], o
