"""Projections of gradients: the part that an optimizer with memory sees, and how its steps become steps of the weights.

For a matrix G [m, n] (every matrix of a stack by itself), density rho:

| name        | small                                   | shape                   | stored            |
|-------------|-----------------------------------------|-------------------------|-------------------|
| columns     | G[:, J], J a random subset              | m x floor(rho n)        | nothing           |
| rows        | G[J, :]                                 | floor(rho m) x n        | nothing           |
| permutation | columns or rows of the shorter side     | round(rho min) instead  | nothing           |
| randk       | G[I], I random coordinates              | floor(rho m n)          | I, i32            |
| svd         | G Q or Q^T G, Q the top singular vectors | m x r or r x n          | Q, r = round(rho min) |
| random      | the same, Q random with Q^T Q = 1       | the same                | Q                 |

JAX keeps the kernel of a linear layer as [in, out], PyTorch as [out, in]: the columns of the published code are rows here,
which are also gathered faster on a CPU. J depends on (seed, window, path) alone and is computed anew in every
step; a window is the time between two refreshes.
svd and random project the shorter side, as GaLore does ("short"), or "long", "left" (rows), "right" (columns).
"block", which takes whole tensors, is `rl.optim.blocks`. Source: Zmushko et al., FRUGAL, arXiv 2411.07837.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels import noise_bits
from rl.optim import groups

Free = Callable[[Array], Array] | None


class Projection(NamedTuple):
    """Functions of trees; `window` is i32, the number of refreshes before the last one.

    Attributes:
        init: params -> stored, a dict of arrays.
        zeros: params -> small, of zeros.
        renew: (stored, window, gradients) -> stored for the window.
        where: (stored, window, gradients) -> where, a dict of what the window projects onto: what is stored, or chosen anew.
        down: (where, gradients) -> small.
        join: (where, small, gradients, down(gradients), free) -> updates: `small` lifted to the weights, plus `free` of what
            of the gradients is not in the projection (None: zero).
    """

    init: Callable[[Any], dict[str, Array]]
    zeros: Callable[[Any], Any]
    renew: Callable[..., dict[str, Array]]
    where: Callable[..., dict[str, Array]]
    down: Callable[..., Any]
    join: Callable[..., Any]


class _Matrix(NamedTuple):
    """A projection of one matrix.

    Attributes:
        shapes: (m, n) -> (shape of small, (shape, dtype) of what is stored or None).
        renew: (key, G) -> stored, or None where nothing is.
        choose: (key, G) -> where, or None: what is stored.
        down, join: as of `Projection`.
        apart: whether `small` is finished before `join` reads it. Else XLA fuses what makes it, a step of Adam, into its
            readers, which is one pass less over memory where they are few and vectorise, and slow where they do not.
    """

    shapes: Callable
    renew: Callable | None
    choose: Callable | None
    down: Callable
    join: Callable
    apart: bool = False


def columns(density: float, seed: int = 0) -> Projection:
    """floor(density n) random columns."""
    return _lifted(_subset(lambda m, n: 1, lambda size: _floor(density * size))._replace(apart=True), seed)


def rows(density: float, seed: int = 0) -> Projection:
    """floor(density m) random rows."""
    return _lifted(_subset(lambda m, n: 0, lambda size: _floor(density * size)), seed)


def permutation(density: float, seed: int = 0) -> Projection:
    """round(density min(m, n)) columns or rows of the shorter side: the projection by part of a permutation matrix."""
    return _lifted(_subset(lambda m, n: int(n <= m), lambda size: round(density * size)), seed)


def randk(density: float, seed: int = 0) -> Projection:
    """floor(density m n) random coordinates, whose numbers are stored."""
    count = lambda m, n: _floor(density * m * n)

    def shapes(m, n):
        return (count(m, n),), ((count(m, n),), jnp.int32)

    def renew(key, gradient):
        return _choose(key, gradient.size, count(*gradient.shape))

    def down(ids, gradient):
        return gradient.reshape(-1)[ids]

    def join(ids, small, gradient, projected, free):
        rest = jnp.zeros_like(gradient) if free is None else free(gradient)
        set_ = rest.reshape(-1).at[ids].set(small, unique_indices=True, indices_are_sorted=True)
        return set_.reshape(gradient.shape)

    return _lifted(_Matrix(shapes, renew, None, down, join), seed)


def svd(rank: Callable[[int], int], side: str = "short", seed: int = 0) -> Projection:
    """Top singular vectors of the gradient at the refresh; `rank` is a function of the smaller side."""

    def basis(key, gradient, right, size):
        u, _, vh = jnp.linalg.svd(gradient, full_matrices=False)
        return vh[:size].T if right else u[:, :size]

    return _lifted(_dense(rank, side, basis), seed, rank)


def random(rank: Callable[[int], int], side: str = "short", seed: int = 0) -> Projection:
    """A random semi-orthogonal basis."""

    def basis(key, gradient, right, size):
        length = gradient.shape[1 if right else 0]
        return jnp.linalg.qr(jax.random.normal(key, (length, size), gradient.dtype))[0]

    return _lifted(_dense(rank, side, basis), seed, rank)


_SIDES = {
    "short": lambda m, n: n <= m,
    "long": lambda m, n: n > m,
    "left": lambda m, n: False,
    "right": lambda m, n: True,
}


def right_side(side: str) -> Callable[[int, int], bool]:
    """(m, n) -> whether columns are projected (G Q) rather than rows (Q^T G); equal sides count n as the shorter one."""
    return groups.choose("side", side, _SIDES)


def product(a: Array, b: Array) -> Array:
    """a @ b in full precision."""
    return jnp.matmul(a, b, precision="highest")


def _floor(size: float) -> int:
    return int(size + 1e-9)  # 0.29 * 100 is below 29 in binary


def _choose(key: Array, size: int, count: int) -> Array:
    """`count` of `size` numbers in ascending order, i32."""
    bits = (size - 1).bit_length()
    if bits > 16:
        return jnp.sort(jax.random.permutation(key, size)[:count]).astype(jnp.int32)
    # random words that end with their number: they sort faster than a permutation is made
    number = jnp.uint32((1 << bits) - 1)
    words = jax.random.bits(key, (size,)) & ~number | jnp.arange(size, dtype=jnp.uint32)
    return jnp.sort(jnp.sort(words)[:count] & number).astype(jnp.int32)


def _take(x: Array, ids: Array, axis: int) -> Array:
    """Rows (axis 0) or columns of a matrix, of numbers in range.

    Columns as single numbers of each row in turn: XLA would gather column by column on a CPU, and transpose.
    """
    if axis == 0 or x.size >= 2**31:
        return jnp.take(x, ids, axis, mode="clip")
    m, n = x.shape
    return x.reshape(-1).at[jnp.arange(m)[:, None] * n + ids].get(mode="promise_in_bounds")


def _spread(small: Array, place: Array, axis: int) -> Array:
    """Rows or columns of `small` at these places, anything where a place is -1.

    Not `_take`: a product with a mask follows, which fuses with a gather of each row and not with one of a flat matrix.
    """
    ids = jnp.maximum(place, 0)
    row = lambda x: x.at[ids].get(mode="promise_in_bounds")
    return jax.vmap(row)(small) if axis else row(small)


def _subset(axis_of: Callable[[int, int], int], count_of: Callable[[int], int]) -> _Matrix:
    def sizes(shape):
        axis = axis_of(*shape)
        return axis, shape[axis], count_of(shape[axis])

    def shapes(m, n):
        axis, _, count = sizes((m, n))
        return ((m, count) if axis else (count, n)), None

    def choose(key, gradient):
        _, size, count = sizes(gradient.shape)
        return jnp.arange(count, dtype=jnp.int32) if count in (0, size) else _choose(key, size, count)

    def down(ids, gradient):
        axis, size, count = sizes(gradient.shape)
        return gradient if count == size else _take(gradient, ids, axis)

    def join(ids, small, gradient, projected, free):
        axis, size, count = sizes(gradient.shape)
        rest = jnp.zeros_like(gradient) if free is None else free(gradient)
        if count in (0, size):
            return small if count else rest
        place = jnp.full(size, -1).at[ids].set(jnp.arange(count))
        return jnp.where(jnp.expand_dims(place >= 0, 1 - axis), _spread(small, place, axis), rest)

    return _Matrix(shapes, None, choose, down, join)


def _dense(rank: Callable[[int], int], side: str, basis: Callable) -> _Matrix:
    right_of = right_side(side)

    def shapes(m, n):
        right, size = right_of(m, n), rank(min(m, n))
        return ((m, size) if right else (size, n)), ((n if right else m, size), None)

    def renew(key, gradient):
        return basis(key, gradient, right_of(*gradient.shape), rank(min(gradient.shape)))

    def down(basis, gradient):
        return product(gradient, basis) if right_of(*gradient.shape) else product(basis.T, gradient)

    def up(basis, small, shape):
        return product(small, basis.T) if right_of(*shape) else product(basis, small)

    def join(basis, small, gradient, projected, free):
        lifted = up(basis, small, gradient.shape)
        if free is None or basis.shape[1] == min(gradient.shape):  # nothing is left but rounding
            return lifted
        return lifted + free(gradient - up(basis, projected, gradient.shape))

    return _Matrix(shapes, renew, None, down, join)


def _lifted(matrix: _Matrix, seed: int, rank: Callable[[int], int] | None = None) -> Projection:
    """The projection of every leaf of a tree, by that of one matrix."""

    def shapes(path, leaf):
        groups.check_rank(path, leaf, rank(min(leaf.shape[-2:])) if rank and leaf.ndim > 1 else 0)
        *lead, m, n = leaf.shape
        small, kept = matrix.shapes(m, n)
        return (*lead, *small), kept and ((*lead, *kept[0]), kept[1] or leaf.dtype)

    def keys(path, window, leaf):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), window), groups.seed_word(path))
        return jax.random.split(key, leaf.shape[:-2]) if leaf.ndim > 2 else key

    def each(fn, gradients, *trees):
        rest = [jax.tree.leaves(tree) for tree in trees]
        outs = [fn(path, leaf, *(x[i] for x in rest)) for i, (path, leaf) in enumerate(groups.leaves(gradients))]
        return jax.tree.unflatten(jax.tree.structure(gradients), outs)

    def init(params):
        kept = {path: shapes(path, leaf)[1] for path, leaf in groups.leaves(params)}
        return {path: jnp.zeros(*x) for path, x in kept.items() if x}

    def zeros(params):
        return each(lambda path, leaf: jnp.zeros(shapes(path, leaf)[0], leaf.dtype), params)

    def drawn(fn, window, gradients):
        make = lambda path, leaf: groups.over_stack(fn, leaf.ndim - 2)(keys(path, window, leaf), leaf)
        return {path: make(path, leaf) for path, leaf in groups.leaves(gradients)}

    def renew(stored, window, gradients):
        return stored if matrix.renew is None else drawn(matrix.renew, window, gradients)

    def where(stored, window, gradients):
        return stored if matrix.choose is None else drawn(matrix.choose, window, gradients)

    def down(where, gradients):
        return each(lambda path, leaf: groups.over_stack(matrix.down, leaf.ndim - 2)(where[path], leaf), gradients)

    def join(where, small, gradients, projected, free):
        def one(path, leaf, small, projected):
            if matrix.apart and small.size:
                small = noise_bits.once(lambda _, small: small, [jnp.ravel(where[path])[:1].astype(jnp.uint32)], small)
            fn = groups.over_stack(functools.partial(matrix.join, free=free), leaf.ndim - 2)
            return fn(where[path], small, leaf, projected)

        return each(one, gradients, small, projected)

    return Projection(init, zeros, renew, where, down, join)
