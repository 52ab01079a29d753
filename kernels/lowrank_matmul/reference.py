"""Plain-JAX contraction of an activation with a factor; see `kernels.lowrank_matmul.api`."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array


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
