"""The estimate's contraction against a loop over members."""

import numpy as np
import pytest

from kernels import es_update


@pytest.mark.parametrize(
    ("blocks", "rows", "columns", "stacked", "rank"), [(5, 1, 1, 1, 2), (2, 3, 4, 2, 3), (1, 2, 2, 1, 1)]
)
def test_update_is_the_sum_over_members(blocks, rows, columns, stacked, rank):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(blocks, rows, columns)).astype(np.float32)
    left = rng.normal(size=(blocks, rows, stacked, rank, 5)).astype(np.float32)
    right = rng.normal(size=(blocks, columns, stacked, rank, 3)).astype(np.float32)
    expected = np.zeros((stacked, 5, 3))
    for g in range(blocks):
        for i in range(rows):
            for j in range(columns):
                for s in range(stacked):
                    expected[s] += (
                        float(weights[g, i, j]) * left[g, i, s].T.astype(float) @ right[g, j, s].astype(float)
                    )
    np.testing.assert_allclose(es_update.update(weights, left, right), expected, rtol=1e-5, atol=1e-5)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"weights \[G, P, Q\]"):
        es_update.update(np.ones((1, 2, 2)), np.ones((1, 2, 1, 1, 5)), np.ones((1, 3, 1, 1, 5)))
