"""What callers import."""

from collections.abc import Sequence

from jax import Array

from kernels.lowrank_matmul import reference


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
