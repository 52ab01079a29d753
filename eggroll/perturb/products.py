"""Rules for the operations that use a weight: products, gathers and convolutions.

Each gives base result + scale * correction, where the base result is the primitive itself on the unperturbed weight. That
keeps it unbatched under `vmap` over members, which leaves one large product for the whole population.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array, lax

from eggroll.perturb.interpreter import is_weight
from eggroll.perturb.weight import LowRank
from kernels import lowrank_matmul

_RANK = -1  # label of the rank axis; other axes are labelled from 0
_UNROLLED = 4  # ranks up to this are so many corrections of rank 1, which a CPU has no slow batched products for


def _dot_general(eqn, lhs, rhs):
    if is_weight(lhs) and is_weight(rhs):
        return NotImplemented
    w, x = (lhs, rhs) if is_weight(lhs) else (rhs, lhs)
    if _plain_matrix(eqn, w, x, is_weight(lhs)):
        return _fused(eqn, w, x, is_weight(lhs))
    plain = [side.base if is_weight(side) else side for side in (lhs, rhs)]
    base = eqn.primitive.bind(*plain, **eqn.params)
    labels, out, contracted = _labels(eqn.params["dimension_numbers"], lhs.ndim, rhs.ndim)
    w_labels, x_labels = labels if is_weight(lhs) else labels[::-1]
    ranks = (
        [(w.right, w.left)]
        if w.rank > _UNROLLED
        else [(w.right[..., k, None], w.left[..., k, None]) for k in range(w.rank)]
    )
    y = sum(_correction(w, w_labels, x, x_labels, out, contracted, *factors) for factors in ranks)
    return base + y.astype(base.dtype)


def _correction(w: LowRank, w_labels, x: Array, x_labels, out, contracted, right: Array, left: Array) -> Array:
    """scale (x B) A^T, with the axes of the result."""
    sizes = dict(zip(w_labels, w.shape, strict=True)) | dict(zip(x_labels, x.shape, strict=True))
    factors = [_present(factor, w_labels) for factor in (right, left)]
    first, second = min((factors, factors[::-1]), key=lambda pair: _middle(x_labels, *pair, contracted, sizes)[1])
    middle, _ = _middle(x_labels, first, second, contracted, sizes)
    t = lowrank_matmul.contract(x, x_labels, first[0].astype(x.dtype), first[1], middle)
    t = t * w.scale.astype(t.dtype)  # here and not on the result, which is larger
    y = lowrank_matmul.contract(
        t, middle, second[0].astype(t.dtype), second[1], [a for a in out if a in (*middle, *second[1])]
    )
    lacking = [a for a in out if a not in (*middle, *second[1])]  # axes the weight was broadcast along
    return jnp.expand_dims(y, [out.index(a) for a in lacking])


def _plain_matrix(eqn, w: LowRank, x: Array, first: bool) -> bool:
    """Whether this is x W with W [in, out], for which there is a kernel on this device."""
    contract, batch = eqn.params["dimension_numbers"]
    sides = {(w.left.shape[:2], w.right.shape[:2]), (w.right.shape[:2], w.left.shape[:2])}
    if w.ndim != 2 or batch[0] or len(contract[0]) != 1 or ((1, w.shape[1]), (w.shape[0], 1)) not in sides:
        reason = "it is another operation than x W"
    elif contract[not first] != (0,):
        reason = "the weight is [out, in] here: kernels read [in, out]"
    elif x.dtype != w.base.dtype:
        reason = f"x is {x.dtype} and the weight {w.base.dtype}"
    else:
        return lowrank_matmul.serves(x.dtype, w.shape, w.rank)
    lowrank_matmul.passed(f"x {list(x.shape)} with {w.path}", reason)
    return False


def _fused(eqn, w: LowRank, x: Array, first: bool) -> Array:
    """The product of the base, corrected while it is made."""
    inner, outer = (w.right, w.left) if w.right.shape[:2] == (w.shape[0], 1) else (w.left, w.right)
    (axis,) = eqn.params["dimension_numbers"][0][first]
    rows = jnp.moveaxis(x, axis, -1)
    y = lowrank_matmul.matmul(
        rows.reshape(-1, rows.shape[-1]), w.base, inner[:, 0].T, outer[0].T, w.scale, dtype=eqn.outvars[0].aval.dtype
    )
    y = y.reshape(*rows.shape[:-1], w.shape[1])
    return jnp.moveaxis(y, -1, 0) if first else y


def _labels(dimension_numbers, lhs_ndim: int, rhs_ndim: int):
    """(labels of both operands' axes, labels of the output's axes, contracted labels)."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    lhs = list(range(lhs_ndim))
    rhs = list(range(lhs_ndim, lhs_ndim + rhs_ndim))
    for a, b in zip((*lhs_contract, *lhs_batch), (*rhs_contract, *rhs_batch), strict=True):
        rhs[b] = a
    batch = list(lhs_batch)
    free = [
        [a for i, a in enumerate(side) if i not in used]
        for side, used in ((lhs, (*lhs_contract, *lhs_batch)), (rhs, (*rhs_contract, *rhs_batch)))
    ]
    return (lhs, rhs), [*batch, *free[0], *free[1]], set(lhs_contract)


def _present(factor: Array, labels: list[int]) -> tuple[Array, list[int]]:
    """A factor without its axes of size 1 (and without the rank axis at rank 1), and the labels that remain."""
    absent = [i for i, n in enumerate(factor.shape[:-1]) if n == 1]
    kept = [label for i, label in enumerate(labels) if i not in absent]
    if factor.shape[-1] == 1:
        return lax.squeeze(factor, [*absent, factor.ndim - 1]), kept
    return lax.squeeze(factor, absent), [*kept, _RANK]


def _middle(x_labels, first, second, contracted, sizes) -> tuple[list[int], int]:
    """Labels and size of x contracted with the first factor: what the second one still needs, and what stays."""
    kept = [a for a in x_labels if a not in contracted or a in second[1]]
    kept += [a for a in first[1] if a not in x_labels]
    return kept, math.prod(sizes.get(a, 1) for a in kept)


def _gather(eqn, operand, indices):
    if not is_weight(operand) or is_weight(indices):
        return NotImplemented
    p = eqn.params
    dims = p["dimension_numbers"]
    if dims.operand_batching_dims:
        return NotImplemented
    base = eqn.primitive.bind(operand.base, indices, **p)
    left, right = (
        _gather_factor(eqn, operand, factor, indices, base.shape) for factor in (operand.left, operand.right)
    )
    # Rows on which one factor is constant are vectors (an embedding's); else they are matrices (a layer's), weights still.
    window = [a for a in range(operand.ndim) if a not in dims.collapsed_slice_dims and operand.shape[a] > 1]
    vectors = any(all(factor.shape[a] == 1 for a in window) for factor in (operand.left, operand.right))
    return dataclasses.replace(operand, base=base, left=left, right=right, activation=operand.activation or vectors)


def _gather_factor(eqn, w: LowRank, factor: Array, indices: Array, out_shape: tuple[int, ...]) -> Array:
    """The same gather on one factor: index 0 and slice 1 on the axes it lacks, the rank axis as a last window axis."""
    p, dims = eqn.params, eqn.params["dimension_numbers"]
    lacks = [factor.shape[a] != n for a, n in enumerate(w.shape)]
    sizes = [1 if absent else n for n, absent in zip(p["slice_sizes"], lacks, strict=True)] + [w.rank]
    window = [a for a in range(w.ndim) if a not in dims.collapsed_slice_dims]
    if all(lacks[a] for a in dims.start_index_map):  # indexed nowhere: the same for every row gathered
        cut = lax.slice(factor, [0] * factor.ndim, sizes)
        shape = [1] * len(out_shape)
        for axis, a in zip(dims.offset_dims, window, strict=True):
            shape[axis] = sizes[a]
        return cut.reshape(*shape, w.rank)
    keep = jnp.array([not lacks[a] for a in dims.start_index_map], indices.dtype)
    with_rank = lax.GatherDimensionNumbers(
        offset_dims=(*dims.offset_dims, len(out_shape)),
        collapsed_slice_dims=dims.collapsed_slice_dims,
        start_index_map=dims.start_index_map,
    )
    return lax.gather(
        factor,
        indices * keep,
        with_rank,
        sizes,
        unique_indices=False,
        mode=p["mode"],
        fill_value=p["fill_value"],
        indices_are_sorted=p["indices_are_sorted"],
    )


def _conv(eqn, lhs, rhs):
    p = eqn.params
    if is_weight(lhs) or p["batch_group_count"] != 1:
        return NotImplemented
    dims, groups = p["dimension_numbers"], p["feature_group_count"]
    out_axis, channel = dims.rhs_spec[0], dims.out_spec[1]
    others = [a for a in range(rhs.ndim) if a != out_axis]
    for inner, outer in ((rhs.right, rhs.left), (rhs.left, rhs.right)):
        if inner.shape[out_axis] == 1 and all(outer.shape[a] == 1 for a in others):
            break
    else:
        return NotImplemented
    base = eqn.primitive.bind(lhs, rhs.base, **p)
    filters = jnp.moveaxis(inner, -1, out_axis).squeeze(out_axis + 1 if out_axis < inner.ndim - 1 else out_axis)
    filters = jnp.broadcast_to(filters, [rhs.rank if a == out_axis else n for a, n in enumerate(rhs.shape)])
    filters = jnp.concatenate([filters] * groups, axis=out_axis).astype(lhs.dtype)
    t = jnp.moveaxis(eqn.primitive.bind(lhs, filters, **p), channel, -1)
    t = t.reshape(*t.shape[:-1], groups, rhs.rank)
    weights = (rhs.scale * outer).reshape(groups, rhs.shape[out_axis] // groups, rhs.rank).astype(t.dtype)
    y = jnp.einsum("...gr,gor->...go", t, weights).reshape(*t.shape[:-2], rhs.shape[out_axis])
    return base + jnp.moveaxis(y, -1, channel).astype(base.dtype)


RULES = {"conv_general_dilated": _conv, "dot_general": _dot_general, "gather": _gather}
