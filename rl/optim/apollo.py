"""APOLLO: the gradient itself, scaled row by row as Adam would scale a random projection of it.

P [r, min] with independent entries N(0, 1/r), drawn anew every `every` steps; with m >= n: g = G P^T, else g = P G:

    u = Adam(g);  s_j = ||u_j|| / (||g_j|| + 1e-8) along the longer side ("channel"), or one number of the matrix ("tensor")
    W <- W - lr sqrt(scale) limited(G s)      the limiter of `rl.optim.fira`

P is made from (seed, window, path) in every step and not stored; entries come from `kernels.noise_bits`. State of a matrix in
f32: 8 r max + 4 bytes. `apollo_mini` is r = 1 with one number a matrix and scale 128.

On the estimates of evolution: the direction is the raw estimate, averaged over nothing but the population, so momentum's
smoothing is missing: larger populations, or optax.trace in front.

Source: Zhu et al., APOLLO, arXiv 2412.05270 (written from the paper).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kernels import noise_bits
from rl.optim import groups, projection
from rl.optim.fira import gain, limited, unzipped
from rl.optim.frugal import linear_or_full

_AXES = {"channel": lambda right: -1 if right else -2, "tensor": lambda right: (-2, -1)}


class ApolloState(NamedTuple):
    """Attributes: steps made, i32; Adam's state of the projections; last limited norm of every matrix."""

    count: Array
    inner: Any
    norm: Any


def basis(path: str, shape: tuple[int, ...], rank: int, window: Array, seed: int) -> Array:
    """P^T of every matrix of a stack, f32 [*stack, size, rank], entries of variance 1 / rank, for `shape` [*stack, size]."""
    *lead, size = shape
    stack = jnp.arange(math.prod(lead), dtype=jnp.uint32).reshape(lead)
    key = [
        jnp.uint32(seed & 0xFFFFFFFF),
        jnp.uint32(0),
        jnp.uint32(groups.seed_word(path)),
        jnp.asarray(window, jnp.uint32),
    ]
    words = noise_bits.words(key, [stack, jnp.uint32(0), jnp.uint32(0)], size * rank)
    return noise_bits.gaussian(words).reshape(*lead, size, rank) / math.sqrt(rank)


def scale_by_apollo(
    rank: int,
    *,
    every: int = 200,
    scale: float = 1.0,
    kind: str = "channel",
    side: str = "short",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    seed: int = 0,
) -> optax.GradientTransformation:
    """sqrt(scale) limited(G s); every leaf must be a matrix with both sides at least `rank`."""
    groups.number("rank", rank, 1)
    groups.number("every", every, 1)
    axis_of, right_of = groups.choose("kind", kind, _AXES), projection.right_side(side)
    adam = optax.scale_by_adam(b1, b2, eps)

    def small(path, x):
        groups.check_rank(path, x, rank)
        *lead, m, n = x.shape
        return jnp.zeros((*lead, m, rank) if right_of(m, n) else (*lead, rank, n), x.dtype)

    def each(fn, tree):
        return jax.tree.unflatten(jax.tree.structure(tree), [fn(path, x) for path, x in groups.leaves(tree)])

    def init(params):
        norm = jax.tree.map(lambda x: jnp.zeros(x.shape[:-2], x.dtype), params)
        return ApolloState(jnp.zeros((), jnp.int32), adam.init(each(small, params)), norm)

    def project(window, path, gradient):
        *lead, m, n = gradient.shape
        right = right_of(m, n)
        p = basis(path, (*lead, n if right else m), rank, window, seed).astype(gradient.dtype)
        return projection.product(gradient, p) if right else projection.product(p.mT, gradient)

    def update(updates, old, params=None):
        seen = each(functools.partial(project, old.count // every), updates)
        step, inner = adam.update(seen, old.inner)
        scaled = lambda g, u, s, norm: limited(g * gain(u, s, axis_of(right_of(*g.shape[-2:]))), norm)
        out, norm = unzipped(jax.tree.map(scaled, updates, step, seen, old.norm), updates)
        out = jax.tree.map(lambda x: x * scale**0.5, out)
        return out, ApolloState(optax.safe_increment(old.count), inner, norm)

    return optax.GradientTransformation(init, update)


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    *,
    every: int = 200,
    scale: float = 1.0,
    kind: str = "channel",
    side: str = "short",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
    rules: groups.Rules = (),
    seed: int = 0,
) -> optax.GradientTransformation:
    """APOLLO on the weights of linear layers, AdamW on the others.

    Args:
        rank: r.
        every: steps between new projections.
        scale: its root multiplies the step.
        kind: "channel" (a factor per row or column of the longer side) or "tensor" (one).
        side: that is projected: "short", "long", "left", "right".
        mask: what decays, as of `optax.adamw`.
        rules: (pattern, group) by path: "full" (AdamW), "split" (APOLLO), "frozen".

    Raises:
        ValueError: a rank above a matrix's smaller side, a leaf in "split" that is no matrix, a rule that fits nothing.
    """
    split = scale_by_apollo(rank, every=every, scale=scale, kind=kind, side=side, b1=b1, b2=b2, eps=eps, seed=seed)
    parts = {"full": optax.scale_by_adam(b1, b2, eps), "split": split, "frozen": optax.set_to_zero()}
    return groups.grouped(
        learning_rate, parts, rules=rules, default=linear_or_full("split"), weight_decay=weight_decay, mask=mask
    )


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 1,
    *,
    every: int = 200,
    scale: float = 128.0,
    side: str = "short",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
    rules: groups.Rules = (),
    seed: int = 0,
) -> optax.GradientTransformation:
    """`apollo` of rank 1 with one factor a matrix and scale 128."""
    return apollo(
        learning_rate, rank, every=every, scale=scale, kind="tensor", side=side, b1=b1, b2=b2, eps=eps,
        weight_decay=weight_decay, mask=mask, rules=rules, seed=seed,
    )  # fmt: skip
