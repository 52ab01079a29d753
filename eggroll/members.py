"""Runs one member's function for the whole population: members x evaluations laid out, chunked, vectorised."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from eggroll.population import Population


def map_members(
    member: Callable,
    draw: Callable[[Array, Array], tuple],
    population: Population,
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
        batch: shared by all members; with `per_member`, [N, ...].
        chunk: at most this many members at once: whole blocks, or else whole columns of one block.

    Returns:
        The tree `member` returns, with leading axis N.
    """
    signs = jnp.array([1.0, -1.0][: population.signs], jnp.float32)
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
    ids = (population.row_ids(), population.column_ids(), data)
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
