"""Contractions with a factor against einsum written out."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import lowrank_matmul


@pytest.mark.parametrize(
    ("labels", "factor_labels", "out", "spec"),
    [
        ([0, 1], [1], [0], "ab,b->a"),  # rank 1: a dot product a row
        ([0], [2], [0, 2], "a,c->ac"),  # an outer product
        ([0, 1], [1, 2], [0, 2], "ab,bc->ac"),
        ([0, 1], [0, 1], [], "ab,ab->"),
        ([0, 1], [2, 1], [2, 0], "ab,cb->ca"),
        ([0, 1], [0], [1, 0], "ab,a->ba"),  # nothing summed: a scaled transpose
        ([0, 1], [2], [2, 0], "ab,c->ca"),  # a label of x alone is summed too
    ],
)
def test_contract(labels, factor_labels, out, spec):
    sizes = (3, 4, 5)
    rng = np.random.default_rng(0)
    x = rng.normal(size=[sizes[i] for i in labels]).astype(np.float32)
    f = rng.normal(size=[sizes[i] for i in factor_labels]).astype(np.float32)
    got = lowrank_matmul.contract(jnp.asarray(x), labels, jnp.asarray(f), factor_labels, out)
    np.testing.assert_allclose(got, np.einsum(spec, x.astype(float), f.astype(float)), rtol=1e-5, atol=1e-5)


def test_half_precision_accumulates_in_f32():
    x = jnp.full((1, 4096), 1.0, jnp.bfloat16)
    got = lowrank_matmul.contract(x, [0, 1], jnp.ones(4096, jnp.bfloat16), [1], [0])
    assert got.dtype == jnp.float32
    assert float(got[0]) == 4096.0  # a bf16 accumulator would stop at 256
