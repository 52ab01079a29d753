"""What callers import."""

from jax import Array

from kernels.es_update import reference


def update(weights: Array, left: Array, right: Array) -> Array:
    """Sum over members of weight_gij * (sum_k left_gi,k right_gj,k^T), one matrix per stacked index.

    Two contractions, F R first and then L^T (F R): 2 G P Q r n + 2 G P r m n operations for a crossed block of P x Q
    members, against 2 G P Q r m n for the sum written out.

    Args:
        weights: [G, P, Q], shaped fitness per direction.
        left: [G, P, stacked, r, m], output-side factors of the rows.
        right: [G, Q, stacked, r, n], input-side factors of the columns.

    Returns:
        [stacked, m, n] in the operands' type (f32 or f64).

    Raises:
        ValueError: shapes that do not fit.
    """
    expected = (
        (*weights.shape[:2], *left.shape[2:]),
        (weights.shape[0], weights.shape[2], *left.shape[2:4], right.shape[-1]),
    )
    if weights.ndim != 3 or (left.shape, right.shape) != expected:
        raise ValueError(
            f"update needs weights [G, P, Q], left [G, P, S, r, m] and right [G, Q, S, r, n]; got {weights.shape}, "
            f"{left.shape} and {right.shape}"
        )
    return reference.update(weights, left, right)
