"""Plain-JAX products with a perturbed weight; see `kernels.lowrank_matmul.api`."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from kernels.noise_bits import Generated


def matmul(x: Array, w: Array, right: Array | Generated, left: Array | Generated, scale: Array, dtype) -> Array:
    """One product with w for all members that differ in x, and two small ones for each."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    right, left = (f.array() if isinstance(f, Generated) else f for f in (right, left))
    base = jnp.matmul(x, w, preferred_element_type=wide)
    t = scale[..., None, None] * jnp.einsum("...mk,...rk->...mr", x, right.astype(x.dtype), preferred_element_type=wide)
    return (base + jnp.einsum("...mr,...rn->...mn", t, left.astype(wide))).astype(dtype)


def contract(
    x: Array, x_labels: Sequence[int], factor: Array, factor_labels: Sequence[int], out: Sequence[int]
) -> Array:
    """Einstein sum over every label not in `out`; a plain product where nothing is summed."""
    dtype = jnp.promote_types(jnp.result_type(x, factor), jnp.float32)
    summed = {*x_labels, *factor_labels} - {*out}
    if not summed:
        return _aligned(x, x_labels, out).astype(dtype) * _aligned(factor, factor_labels, out).astype(dtype)
    names = {label: i for i, label in enumerate({*x_labels, *factor_labels})}
    index = lambda labels: [names[label] for label in labels]
    return jnp.einsum(x, index(x_labels), factor, index(factor_labels), index(out), preferred_element_type=dtype)


def _aligned(x: Array, labels: Sequence[int], out: Sequence[int]) -> Array:
    """x with its axes in the order of `out`, size 1 where it lacks one."""
    order = sorted(range(len(labels)), key=lambda i: out.index(labels[i]))
    sizes = dict(zip(labels, x.shape, strict=True))
    return x.transpose(order).reshape([sizes.get(label, 1) for label in out])
