"""LDAdam: Adam in a subspace that follows the gradient at every step, its moments moved along, what is left out fed back.

For a matrix with its shorter side first, G [a, b], basis Q [a, r], moments M, V [r, b], step t, G <- G + E:

    B = rho Q Mhat + (1 - rho) G;   Q' = qr(B B^T Q)          one step of block power iteration
    C = Q'^T Q;   M <- C M;   V <- |(1 - b2^(t-1)) (C^2 (Vhat - Mhat^2) + (C Mhat)^2)|     C^2 element by element
    W <- W - lr Q' Adam(Q'^T G)  with these moments
    E = G - Q' Q'^T G + b1 / (1 - b1) (Q M_old - Q' C M_old)

Hats are bias-corrected values of the last step. The first basis is random, from the seed and the path. State of a matrix in
f32: 4 (r min + 2 r max) bytes, and with error feedback 4 m n more, as much as one of Adam's moments.

On the estimates of evolution: the subspace follows every generation's noise; error feedback adds the noise left out to the next
estimate. Use a large `rho`, or GaLore's slow bases.

Source: Robert et al., LDAdam, arXiv 2410.16103.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rl.optim import groups, projection
from rl.optim.frugal import linear_or_full
from rl.optim.projection import product


class LDAdamState(NamedTuple):
    """Attributes: steps made, i32; per leaf the basis, both moments, and the error, or None without feedback."""

    count: Array
    basis: Any
    mu: Any
    nu: Any
    error: Any


def scale_by_ldadam(
    rank: int,
    *,
    b1: float = 0.908,
    b2: float = 0.99,
    eps: float = 1e-8,
    rho: float = 0.908,
    error_feedback: bool = True,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Q' Adam(Q'^T G); every leaf must be a matrix with both sides at least `rank`."""
    groups.number("rank", rank, 1)
    right_of = projection.right_side("short")

    def sizes(path, x):
        groups.check_rank(path, x, rank)
        *lead, m, n = x.shape
        return lead, min(m, n), max(m, n)

    def init(params):
        def first(path, x):
            lead, short, _ = sizes(path, x)
            key = jax.random.fold_in(jax.random.key(seed), groups.seed_word(path))
            return jnp.linalg.qr(jax.random.normal(key, (*lead, short, rank), x.dtype))[0]

        def moment(path, x):
            lead, _, long = sizes(path, x)
            return jnp.zeros((*lead, rank, long), x.dtype)

        each = lambda fn: jax.tree.unflatten(jax.tree.structure(params), [fn(*leaf) for leaf in groups.leaves(params)])
        error = jax.tree.map(jnp.zeros_like, params) if error_feedback else None
        return LDAdamState(jnp.zeros((), jnp.int32), each(first), each(moment), each(moment), error)

    def one(t, gradient, basis, mu, nu, error):
        right = right_of(*gradient.shape)
        total = gradient if error is None else gradient + error
        total = total.T if right else total
        last1, last2 = 1 - b1 ** (t - 1), 1 - b2 ** (t - 1)  # of the last step; 0 in the first, when moments are 0
        mean, square = mu / jnp.where(t > 1, last1, 1), nu / jnp.where(t > 1, last2, 1)
        lifted = product(basis, mu)
        mixed = rho * lifted / jnp.where(t > 1, last1, 1) + (1 - rho) * total
        new = jnp.linalg.qr(product(mixed, product(mixed.T, basis)))[0]
        change = product(new.T, basis)
        moved = product(change, mu)
        nu = jnp.abs(last2 * (product(change**2, square - mean**2) + product(change, mean) ** 2))
        low = product(new.T, total)
        left = None
        if error is not None:
            ratio = b1 / (1 - b1)
            left = total + ratio * lifted - product(new, low + ratio * moved)
            left = left.T if right else left
        mu, nu = b1 * moved + (1 - b1) * low, b2 * nu + (1 - b2) * low**2
        out = product(new, (mu / (1 - b1**t)) / (jnp.sqrt(nu / (1 - b2**t)) + eps))
        return out.T if right else out, new, mu, nu, left

    def update(updates, old, params=None):
        count = optax.safe_increment(old.count)
        flat, kind = jax.tree.flatten(updates)
        errors = [None] * len(flat) if old.error is None else jax.tree.leaves(old.error)
        made = []
        for x, *state in zip(flat, *map(jax.tree.leaves, (old.basis, old.mu, old.nu)), errors, strict=True):
            t = jnp.asarray(count, x.dtype)
            made.append(groups.over_stack(lambda *parts, t=t: one(t, *parts), x.ndim - 2)(x, *state))
        parts = [jax.tree.unflatten(kind, part) for part in zip(*made, strict=True)] if made else [updates] * 5
        out, basis, mu, nu, error = parts
        return out, LDAdamState(count, basis, mu, nu, None if old.error is None else error)

    return optax.GradientTransformation(init, update)


def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 16,
    *,
    b1: float = 0.908,
    b2: float = 0.99,
    eps: float = 1e-8,
    rho: float = 0.908,
    error_feedback: bool = True,
    weight_decay: float = 0.0,
    mask: Any = None,
    rules: groups.Rules = (),
    seed: int = 0,
) -> optax.GradientTransformation:
    """LDAdam on the weights of linear layers, AdamW on the others.

    Args:
        rank: r.
        rho: weight of the moment, against the gradient, in what the subspace follows.
        error_feedback: whether what a step leaves out is added to the next gradient.
        mask: what decays, as of `optax.adamw`.
        rules: (pattern, group) by path: "full" (AdamW), "split" (LDAdam), "frozen".

    Raises:
        ValueError: a rank above a matrix's smaller side, a leaf in "split" that is no matrix, a rule that fits nothing.
    """
    split = scale_by_ldadam(rank, b1=b1, b2=b2, eps=eps, rho=rho, error_feedback=error_feedback, seed=seed)
    parts = {"full": optax.scale_by_adam(b1, b2, eps), "split": split, "frozen": optax.set_to_zero()}
    return groups.grouped(
        learning_rate, parts, rules=rules, default=linear_or_full("split"), weight_decay=weight_decay, mask=mask
    )
