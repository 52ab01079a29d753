"""Fira: GaLore, and the part of the gradient outside the subspace, scaled as Adam scales the part inside.

With g = G Q (or Q^T G), u = Adam(g) as in `rl.optim.galore`, and the residual R = G - lift(g):

    s_j = ||u_j|| / (||g_j|| + 1e-8)      along the longer side: rows of g [m, r], columns of g [r, n]
    R <- R s;  R <- R / (max(||R|| / (previous + 1e-8), 1.01) / 1.01)    the norm grows by 1 % a step at most
    W <- W - lr (scale lift(u) + R)

`previous` is the norm of the last limited R, one scalar a matrix; the first step is not limited. R is the orthogonal
complement of the subspace, as the paper defines it; the authors' code subtracts scale lift(g), which is that only for scale 1.
State of a matrix in f32: GaLore's and 4 bytes.

On the estimates of evolution: as for GaLore, but what lies outside the subspace is kept, so no direction is lost, and the
limiter tames generations that are mostly noise.

Source: Chen et al., Fira, arXiv 2410.01623.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from rl.optim import groups, projection
from rl.optim.frugal import linear_or_full

GROWTH = 1.01


class FiraState(NamedTuple):
    """Attributes: steps made, i32; bases; Adam's state of the projections; last limited norm of every matrix."""

    count: Array
    stored: dict[str, Array]
    inner: Any
    norm: Any


def limited(x: Array, previous: Array) -> tuple[Array, Array]:
    """Norm-growth limiter of every matrix of a stack: x [*stack, m, n] scaled down to 1.01 times the previous norm [*stack].

    Returns:
        (x, its norms). A previous norm of 0 limits nothing.
    """
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1)))
    over = jnp.where(previous > 0, jnp.maximum(norm / (previous + 1e-8), GROWTH) / GROWTH, 1)
    return x / over[..., None, None], norm / over


def unzipped(pairs, like):
    """A tree of pairs -> a pair of trees, in the structure of `like`."""
    flat = jax.tree.structure(like).flatten_up_to(pairs)
    return tuple(jax.tree.unflatten(jax.tree.structure(like), [pair[i] for pair in flat]) for i in range(2))


def gain(step: Array, seen: Array, axis: int | tuple[int, int]) -> Array:
    """||step|| / (||seen|| + 1e-8) along `axis`, kept."""
    norm = lambda x: jnp.sqrt(jnp.sum(x * x, axis, keepdims=True))
    return norm(step) / (norm(seen) + 1e-8)


def scale_by_fira(
    rank: int,
    *,
    every: int = 200,
    scale: float = 0.25,
    side: str = "short",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """scale lift(u) + limited R; every leaf must be a matrix with both sides at least `rank`."""
    groups.number("rank", rank, 1)
    groups.number("every", every, 1)
    basis, adam = projection.svd(lambda size: rank, side), optax.scale_by_adam(b1, b2, eps)
    right = projection.right_side(side)

    def init(params):
        norm = jax.tree.map(lambda x: jnp.zeros(x.shape[:-2], x.dtype), params)
        return FiraState(jnp.zeros((), jnp.int32), basis.init(params), adam.init(basis.zeros(params)), norm)

    def update(updates, old, params=None):
        window = old.count // every
        renew = lambda stored: basis.renew(stored, window, updates)
        stored = lax.cond(old.count % every == 0, renew, lambda stored: stored, old.stored)
        seen = basis.down(stored, updates)
        step, inner = adam.update(seen, old.inner)
        lift = lambda small: basis.join(stored, small, updates, seen, None)

        def rest(gradient, inside, step, seen, previous):
            axis = -1 if right(*gradient.shape[-2:]) else -2
            return limited((gradient - inside) * gain(step, seen, axis), previous)

        left, norm = unzipped(jax.tree.map(rest, updates, lift(seen), step, seen, old.norm), updates)
        out = jax.tree.map(lambda a, b: scale * a + b, lift(step), left)
        return out, FiraState(optax.safe_increment(old.count), stored, inner, norm)

    return optax.GradientTransformation(init, update)


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    every: int = 200,
    scale: float = 0.25,
    side: str = "short",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
    rules: groups.Rules = (),
) -> optax.GradientTransformation:
    """Fira on the weights of linear layers, AdamW on the others; arguments as `rl.optim.galore`."""
    parts = {
        "full": optax.scale_by_adam(b1, b2, eps),
        "split": scale_by_fira(rank, every=every, scale=scale, side=side, b1=b1, b2=b2, eps=eps),
        "frozen": optax.set_to_zero(),
    }
    return groups.grouped(
        learning_rate, parts, rules=rules, default=linear_or_full("split"), weight_decay=weight_decay, mask=mask
    )
