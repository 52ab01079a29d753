"""One member's parameters, and one member's function run for the whole population: laid out, chunked, vectorised."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from eggroll.noise import Leaf
from eggroll.perturb import LowRank
from eggroll.population import Population


def perturbed(plan: Sequence[Leaf], params, lefts: list, rights: list, weight: Array):
    """params + weight * noise: low-rank weights as `LowRank`, fully perturbed ones as arrays.

    Args:
        plan: the leaves, in flattening order.
        params: the mean parameters.
        lefts, rights: per leaf, the two factors of one member in the layout of `LowRank`, or the row and column parts of full
            noise (column part None where rows are not shared); sigma is in the left ones.
        weight: f32 scalar: +1 or -1, the member's sign; 0 gives the mean.
    """
    leaves, tree = jax.tree.flatten(params)

    def member(leaf, base, left, right):
        if leaf.form == "frozen":
            return base
        wide = lambda x: x.astype(jnp.promote_types(base.dtype, jnp.float32))
        if leaf.low_rank:
            return LowRank(base, wide(left), wide(right), wide(weight), leaf.path)
        full = wide(left) if right is None else wide(left) * wide(right)
        return base + (wide(weight) * full).astype(base.dtype)

    return jax.tree.unflatten(tree, [member(*x) for x in zip(plan, leaves, lefts, rights, strict=True)])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "lefts", "rights"),
    meta_fields=("plan", "population"),
)
@dataclasses.dataclass(frozen=True)
class Drawn:
    """One generation: the mean parameters and all noise factors, made by `Strategy.draw`.

        run = lambda params, x: eggroll.perturbed_call(model, params, x)
        rows, axes = eggroll.rows(drawn, members)          # members [S]: any, in any order, -1 for the mean
        y = jax.vmap(run, in_axes=(axes, 0))(rows, x)      # x [S, ...]; the base weights stay unbatched

    Attributes:
        params: the mean parameters.
        lefts, rights: per leaf, the factors of every row and every column of the population (leading axis).
        plan: how each leaf is perturbed.
        population: which row and column a member has.
    """

    params: Any
    lefts: list
    rights: list
    plan: tuple[Leaf, ...]
    population: Population

    def member(self, index: Array):
        """One member's parameters, low-rank weights as factors; index -1 is the unperturbed mean."""
        row, column, sign = self.population.coordinates(jnp.maximum(index, 0))
        weight = jnp.where(index < 0, 0.0, 1 - 2 * sign.astype(jnp.float32))
        pick = lambda side, i: [None if x is None else x[i] for x in side]
        return perturbed(self.plan, self.params, pick(self.lefts, row), pick(self.rights, column), weight)


def rows(weights, members: Array):
    """Parameters of several members for a `vmap` over them, and its axes.

    Args:
        weights: `Drawn`, or plain parameters, which are the same for every row.
        members: i32 [S], index of each row's member, -1 for the mean; ignored with plain parameters.

    Returns:
        (parameters, in_axes): what differs between rows has a leading axis S, what does not (every base matrix) has none.
    """
    if not isinstance(weights, Drawn):
        return weights, None
    forms = jax.tree.unflatten(jax.tree.structure(weights.params), weights.plan)

    def axes(leaf, base):
        if leaf.low_rank:
            return LowRank(None, 0, 0, 0, leaf.path)
        return None if leaf.form == "frozen" else 0

    axes = jax.tree.map(axes, forms, weights.params)
    return jax.vmap(weights.member, out_axes=axes)(members), axes


def map_members(
    member: Callable,
    draw: Callable[[Array, Array], tuple],
    population: Population,
    ids: tuple[Array, Array],
    batch,
    per_member: bool,
    chunk: int | None,
):
    """member(row parts, column parts, sign, data) for every member.

    Columns are mapped outside rows, so that a product with the input-side factors, [Q, P, n] with [Q, n], needs no transpose
    of the activations; everything unbatched inside `member` (the base weights) stays one product for all members.

    Args:
        member: pure function of one member's noise and sign (+1 or -1) and of its data.
        draw: factor identities [g, P], [g, Q] -> (row parts, column parts), trees with those leading axes.
        population: how many there are, and in which grid.
        ids: identities of their row and column factors, u32 [G, P] and [G, Q].
        batch: shared by all members; with `per_member`, [N, ...].
        chunk: at most this many members at once: whole blocks, or else whole columns of one block.

    Returns:
        The tree `member` returns, with leading axis N.
    """
    signs = jnp.array([1, -1][: population.signs], jnp.int32)
    own = 0 if per_member else None

    def over(fn, axes, size):  # the size, because a tree of frozen or absent parts has nothing to map
        return mapped(fn, (*axes, own), size)

    over_rows = over(over(member, (None, None, 0), population.signs), (0, None, None), population.rows)

    def columns_of(row_parts, column_parts, data):
        size = jax.tree.leaves(column_parts)[0].shape[0] if jax.tree.leaves(column_parts) else population.columns
        return over(over_rows, (None, 0, None), size)(row_parts, column_parts, signs, data)

    def blocks(ids):
        rows, columns, data = ids
        parts = draw(rows, columns)
        return mapped(columns_of, (0, 0, own), rows.shape[0])(*parts, batch if data is None else data)

    def block_in_chunks(ids):
        rows, columns, data = jax.tree.map(lambda x: x[0], ids)
        row_parts = _first(draw(rows[None], columns[None])[0])

        def some(part):
            columns, data = part
            column_parts = _first(draw(rows[None], columns[None])[1])
            return columns_of(row_parts, column_parts, batch if data is None else data)

        out = _in_chunks(some, (columns, data), max(1, chunk // (population.rows * population.signs)))
        return jax.tree.map(lambda x: x[None], out)

    data = None
    if per_member:  # [N, ...] -> [G, Q, P, S, ...]
        data = jax.tree.map(lambda x: population.grid(x).swapaxes(1, 2), batch)
    ids = (*ids, data)
    per_block = population.size // population.blocks
    if chunk is None or chunk >= population.size:
        out = blocks(ids)
    elif chunk >= per_block:
        out = _in_chunks(blocks, ids, chunk // per_block)
    else:
        out = _in_chunks(block_in_chunks, ids, 1)
    return jax.tree.map(lambda x: x.swapaxes(1, 2).reshape(population.size, *x.shape[4:]), out)


def mapped(fn: Callable, axes: tuple[int | None, ...], size: int) -> Callable:
    """vmap over leading axes (0 or None per argument) of this size; an axis of size 1 is dropped and put back.

    XLA's CPU compiler makes slower code for the same work in arrays with axes of size 1.
    """
    if size != 1:
        return jax.vmap(fn, axes, axis_size=size)

    def once(*args):
        out = fn(*(x if axis is None else _first(x) for x, axis in zip(args, axes, strict=True)))
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), out)

    return once


def _in_chunks(fn: Callable, xs, size: int):
    """fn over the leading axis, `size` entries at a time; fn takes and returns trees with that axis."""
    n = jax.tree.leaves(xs)[0].shape[0]
    whole = n // size
    head = jax.tree.map(lambda x: x[: whole * size].reshape(whole, size, *x.shape[1:]), xs)
    out = jax.tree.map(lambda x: x.reshape(whole * size, *x.shape[2:]), lax.map(fn, head))
    if n % size:
        tail = fn(jax.tree.map(lambda x: x[whole * size :], xs))
        out = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, tail)
    return out


def _first(tree):
    return jax.tree.map(lambda x: x[0], tree)
