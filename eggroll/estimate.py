"""Shaped fitness -> gradient-shaped pytree, without ever forming a perturbation.

The one scale convention of this package is the textbook's: with N members and fitness to be maximised,
g = (1/(N sigma)) sum_n f_n E_n estimates the gradient of E[f(W + sigma E)]. `Estimate.gradient` is -g, what a descent
optimizer expects. `eggroll.scale` converts learning rates to and from the other conventions in use.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from eggroll import noise
from eggroll.noise import Leaf
from eggroll.population import Population
from kernels import es_update


@functools.partial(jax.tree_util.register_dataclass, data_fields=("gradient", "step_scale", "metrics"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Estimate:
    """What backprop and evolution both hand to the optimizer.

    Attributes:
        gradient: pytree of the parameters' shapes, in descent sign, f32 or wider.
        step_scale: f32 scalar that multiplies the optimizer's step (1 unless the estimator asks for less).
        metrics: name -> (sum, denominator), so that parts measured on several batches or devices add up exactly.
    """

    gradient: Any
    step_scale: Array
    metrics: dict[str, tuple[Array, Array]]


def master_copy(params):
    """f32 copies of bf16 and f16 leaves, else None: steps smaller than a half-precision ulp survive in them."""
    half = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
    return jax.tree.map(lambda x: x.astype(jnp.float32) if half(x) else None, params)


def masters(params, master):
    """The parameters an optimizer steps: the f32 copy where there is one."""
    return jax.tree.map(lambda m, p: p if m is None else m, master, params, is_leaf=_is_none)


def step(optimizer: optax.GradientTransformation, params, master, opt_state, estimate: Estimate, frozen=None):
    """Hands an estimate to an optimizer and steps, whoever made it.

    Args:
        params: in the model's own types.
        master: from `master_copy`.
        opt_state: `optimizer.init(masters(params, master))`, later what this returned.
        frozen: tree of bools, leaves that stay as they are; None: none.

    Returns:
        (params, master, opt_state, updates): the updates are what was added, step scale included.
    """
    wide = masters(params, master)
    updates, opt_state = optimizer.update(estimate.gradient, opt_state, wide)
    updates = jax.tree.map(lambda u: u * estimate.step_scale.astype(u.dtype), updates)
    frozen = jax.tree.map(lambda _: False, params) if frozen is None else frozen
    wide = jax.tree.map(lambda f, m, u: m if f else m + u.astype(m.dtype), frozen, wide, updates)
    params = jax.tree.map(lambda p, m: m.astype(p.dtype), params, wide)
    master = jax.tree.map(lambda kept, m: None if kept is None else m, master, wide, is_leaf=_is_none)
    return params, master, opt_state, updates


def direction_weights(fitness: Array, population: Population) -> Array:
    """Weight of each direction in the estimate: [N] -> [G, P, Q].

    The two members of a pair share a direction with opposite signs, so its weight is f+ - f-. Inside a crossed block only the
    interaction of rows and columns correlates with a_i b_j^T, so row and column means are removed, and P/(P-1) Q/(Q-1) keeps
    the estimate unbiased.
    """
    grid = population.grid(fitness)
    weights = grid[..., 0] - grid[..., 1] if population.signs == 2 else grid[..., 0]
    if population.rows > 1 and population.columns > 1:
        weights = weights - weights.mean(axis=1, keepdims=True)
        weights = weights - weights.mean(axis=2, keepdims=True)
        weights = weights * (population.rows / (population.rows - 1) * population.columns / (population.columns - 1))
    return weights


def _wide(leaf: Leaf) -> jnp.dtype:
    return jnp.promote_types(leaf.dtype, jnp.float32)


def _leaf_sum(leaf: Leaf, weights: Array, row: Array | tuple, column: Array | tuple | None) -> Array:
    """sum_gij weights_gij E_gij of a leaf (without 1/sqrt(r)), of factors or their addresses: its shape, f32 or wider."""
    dtype = _wide(leaf)
    weights = weights.astype(dtype)
    if leaf.low_rank and isinstance(row, tuple):
        return noise.fold(leaf, es_update.update(weights, row, column))
    row = row.astype(dtype)
    if leaf.low_rank:
        return noise.fold(leaf, es_update.update(weights, row, column.astype(dtype)))
    if column is None:
        return jnp.tensordot(weights[..., 0], row, axes=2)
    return jnp.sum(row * jnp.einsum("gpq,gq...->gp...", weights, column.astype(dtype)), axis=(0, 1))


def gradients(
    plan: Sequence[Leaf],
    population: Population,
    fitness: Array,
    key: Sequence[Array],
    sigma: Array,
    *,
    rank: int,
    kind: str,
    chunk: int | None = None,
    part: Callable[[Array], tuple[Array, Array, Array]] | None = None,
    total: Callable[[list[Array]], list[Array]] = lambda sums: sums,
) -> list[Array | None]:
    """The textbook estimate of every leaf, in ascent sign.

    Args:
        plan: the leaves, in flattening order.
        fitness: [N] shaped fitness.
        key: (seed word, seed word, generation word).
        sigma: noise standard deviation.
        chunk: at most this many members' factors at once, in whole blocks; partial sums are accumulated in f32 (or wider).
        part: weights of all directions [G, P, Q] -> (those of some, identities of their row and of their column factors);
            None: all.
        total: sums of these -> sums of all.

    Returns:
        One array per leaf in the leaf's shape, None for frozen leaves.
    """
    weights = direction_weights(fitness, population)
    own = (weights, population.row_ids(), population.column_ids()) if part is None else part(weights)
    active = [leaf for leaf in plan if leaf.form != "frozen"]

    def block_sum(block):
        w, rows, columns = block
        # a kernel makes the factors of a matrix where it needs them: nothing is drawn for those
        made = [leaf.low_rank and es_update.serves(_wide(leaf)) for leaf in active]
        rest = [leaf for leaf, m in zip(active, made, strict=True) if not m]
        drawn = iter(zip(*noise.factors(rest, key, rows, columns, rank, kind, population.columns > 1), strict=True))
        address = lambda leaf: tuple(
            noise.addresses(leaf, key, ids, role, rank, kind)
            for ids, role in ((rows, noise.LEFT), (columns, noise.RIGHT))
        )
        parts = [address(leaf) if m else next(drawn) for leaf, m in zip(active, made, strict=True)]
        return [_leaf_sum(leaf, w, *part) for leaf, part in zip(active, parts, strict=True)]

    blocks, *per_block = own[0].shape
    members = math.prod(per_block) * population.signs
    step = blocks if chunk is None else max(1, min(chunk // members, blocks))
    sums = total(_summed(block_sum, own, step))
    scaled = {leaf.path: x * _scale(leaf, population, sigma, rank) for leaf, x in zip(active, sums, strict=True)}
    return [scaled.get(leaf.path) for leaf in plan]


def _scale(leaf: Leaf, population: Population, sigma: Array, rank: int) -> Array:
    """1 / (N sigma sqrt(r)) for factors, 1 / (N sigma) for full noise, in the accumulator's type.

    One product and one quotient of numbers: XLA turns a division into this where it sees that sigma never changes, and on a
    mesh it does not see it, so that dividing every sum would give other bits there.
    """
    return 1 / (sigma.astype(_wide(leaf)) * (population.size * (math.sqrt(rank) if leaf.low_rank else 1)))


def _summed(fn: Callable, xs, size: int):
    """sum of fn over the leading axis, `size` entries at a time."""
    n = jax.tree.leaves(xs)[0].shape[0]
    if size >= n:
        return fn(xs)
    whole = n // size
    head = jax.tree.map(lambda x: x[: whole * size].reshape(whole, size, *x.shape[1:]), xs)
    tail = jax.tree.map(lambda x: x[whole * size :], xs)
    add = lambda total, part: jax.tree.map(jnp.add, total, part)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, jax.tree.map(lambda x: x[0], head)))
    total, _ = lax.scan(lambda total, block: (add(total, fn(block)), None), zero, head)
    return add(total, fn(tail)) if n % size else total


def _is_none(x) -> bool:
    return x is None
