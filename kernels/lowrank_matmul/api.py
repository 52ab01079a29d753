"""What callers import."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from kernels import batching, dispatch
from kernels.lowrank_matmul import reference
from kernels.noise_bits import Generated

_KERNELS = ("pallas_tpu", "pallas_gpu")
MAX_RANK = 16


def matmul(
    x: Array,
    w: Array,
    right: Array | Generated,
    left: Array | Generated,
    scale: Array,
    *,
    dtype: jnp.dtype | None = None,
    implementation: str | None = None,
) -> Array:
    """y = x W + scale (x B) A^T, with B and A the two factors of a low-rank perturbation of W.

    Leading axes are those of a population and broadcast against each other, or are added by `vmap`, with W unbatched: members
    that share a factor have an axis of size 1 there. Independent members: [N] on x, B and A. Antithetic pairs: x [P, 2], B and
    A [P, 1], scale [1, 2]. Crossed: x [P, Q], A [P, 1], B [1, Q].

    Args:
        x: [*members, M, K], M rows per member; bf16 or f32.
        w: [K, N], in the type of x.
        right: B^T [*members, r, K], finite, or its address: then it is made inside the kernel and never stored.
        left: A^T [*members, r, N], likewise.
        scale: [*members], for example the sign of a member.
        dtype: of the result; None: of x.
        implementation: see `kernels.use`.

    Returns:
        [*members, M, N]; sums in f32.

    Raises:
        ValueError: shapes or types that do not fit, a rank below 1, a named kernel that cannot serve.
    """
    lead = (x.ndim - 2, right.ndim - 2, left.ndim - 2, scale.ndim)
    if len(set(lead)) > 1 or w.ndim != 2 or lead[0] < 0:
        raise ValueError(
            f"matmul needs x [*members, M, K], w [K, N], right [*members, r, K], left [*members, r, N] and scale [*members] "
            f"with as many member axes each; got {x.shape}, {w.shape}, {right.shape}, {left.shape} and {scale.shape}"
        )
    (k, n), rank = w.shape, right.shape[-2]
    if x.shape[-1] != k or right.shape[-1] != k or left.shape[-2:] != (rank, n):
        raise ValueError(
            f"matmul of w {w.shape} needs x [.., {k}], right [.., r, {k}] and left [.., r, {n}]; got {x.shape}, "
            f"{right.shape} and {left.shape}"
        )
    if rank < 1:
        raise ValueError(f"the rank must be at least 1; got {rank}")
    if x.dtype != w.dtype:
        raise ValueError(f"x and w must be of one type; got {x.dtype} and {w.dtype}: cast one of them")
    jnp.broadcast_shapes(x.shape[:-2], right.shape[:-2], left.shape[:-2], scale.shape)
    chosen = _choose(x.dtype, w.shape, rank, (right, left), implementation, empty=not (x.size and w.size))
    dtype = dtype or x.dtype
    if chosen == "reference":
        return reference.matmul(x, w, right, left, scale, dtype)
    parts, tree = jax.tree.flatten((right, left))
    keys = jax.tree.leaves(
        [dataclasses.replace(f, key=True, ids=False) if _generated(f) else False for f in (right, left)]
    )

    def call(fn, w, x, scale, *parts):
        return fn(x, w, *jax.tree.unflatten(tree, parts), scale, dtype)

    def own(w, x, scale, *parts):
        members = math.prod(jnp.broadcast_shapes(scale.shape, *(f.shape[:-2] for f in jax.tree.unflatten(tree, parts))))
        if math.prod(x.shape[:-2]) < members:  # the reference multiplies what members share once
            dispatch.passed("lowrank_matmul", f"x {list(x.shape)} of {members} members", "members share rows of x")
            return plain(w, x, scale, *parts)
        return call(dispatch.module("lowrank_matmul", chosen).matmul, w, x, scale, *parts)

    plain = functools.partial(call, reference.matmul)
    return batching.differentiable(batching.leading(own, [True, False, False, *keys]), plain)(w, x, scale, *parts)


def _generated(factor) -> bool:
    return isinstance(factor, Generated)


def _choose(dtype, w_shape, rank: int, factors: tuple, implementation: str | None, empty: bool = False) -> str:
    made = [f.kind for f in factors if _generated(f)]
    shape = f"x [*, {w_shape[0]}] {jnp.dtype(dtype).name}, w {list(w_shape)}, rank {rank}, {made or 'stored'} factors"

    def unserved(name):
        kernel = dispatch.module("lowrank_matmul", name)
        if empty:
            return "there is nothing to compute"
        if rank > MAX_RANK:
            return f"ranks go up to {MAX_RANK}"
        if jnp.dtype(dtype) not in kernel.DTYPES:
            return f"it takes {', '.join(jnp.dtype(d).name for d in kernel.DTYPES)}"
        return ""

    limits = {name: functools.partial(unserved, name) for name in _KERNELS}
    return dispatch.choose("lowrank_matmul", shape, limits, implementation)


def serves(dtype: jnp.dtype, w_shape: tuple[int, int], rank: int, implementation: str | None = None) -> bool:
    """Whether `matmul` of stored factors would run a kernel rather than the reference: for callers with a form of their own."""
    return _choose(dtype, w_shape, rank, (), implementation) != "reference"


def passed(shape: str, reason: str) -> None:
    """Logs why a caller uses `contract`, where it is not because of `serves`."""
    dispatch.passed("lowrank_matmul", shape, reason)


def contract(
    x: Array, x_labels: Sequence[int], factor: Array, factor_labels: Sequence[int], out: Sequence[int]
) -> Array:
    """Einstein sum of two operands over every label not in `out`.

    The correction of y = x W^T by a rank-r perturbation A B^T is two of these: t = x B (labels of B's rows summed), then
    t A^T. At rank 1 the first is a dot product per row and the second an outer product, which is why this is not one
    `einsum`: see the reference.

    Args:
        x, factor: operands, one label per axis; equal labels have equal sizes.
        out: labels of the result, in order, each present in an operand.

    Returns:
        The result, accumulated in f32 at least: f32 for bf16 operands.
    """
    return reference.contract(x, x_labels, factor, factor_labels, out)
