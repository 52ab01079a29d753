"""Aggregation: four means of the same terms, kept as sums."""

import jax.numpy as jnp
import numpy as np
import pytest

from rl.objectives.aggregate import KINDS, aggregate, quotient

# two sequences of 2 and 8 tokens with advantages 1 and -1 and ratio 1
MASK = np.arange(8) < np.array([[2], [8]])
TERMS = np.where(np.array([[True], [False]]), 1.0, -1.0) * np.ones((2, 8))


@pytest.mark.parametrize(
    ("kind", "longest", "value"),
    [("token_mean", None, -0.6), ("sequence_mean", None, 0.0), ("sequence_sum", None, -3.0), ("constant", 10, -0.3)],
)
def test_four_means(kind, longest, value):
    numerator, denominator = aggregate(kind, jnp.asarray(TERMS), jnp.asarray(MASK), longest)
    assert numerator / denominator == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_padding_and_order(kind):
    r = np.random.default_rng(0)
    terms, length = r.normal(size=(6, 9)).astype(np.float32), np.array([9, 1, 4, 0, 7, 2])
    mask = np.arange(9) < length[:, None]
    longest = 12 if kind == "constant" else None
    whole = np.array(aggregate(kind, terms, mask, longest))
    parts = sum(np.array(aggregate(kind, terms[rows], mask[rows], longest)) for rows in ([0], [1, 2, 3], [4, 5]))
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    wide = [np.pad(x, ((0, 0), (0, 5)), constant_values=y) for x, y in ((terms, np.nan), (mask, False))]
    np.testing.assert_allclose(np.array(aggregate(kind, *wide, longest)), whole, rtol=1e-6)
    order = r.permutation(6)
    np.testing.assert_allclose(np.array(aggregate(kind, terms[order], mask[order], longest)), whole, rtol=1e-6)
    # rows that do not exist count nowhere, whatever stands in them; the row without a token (3) counts in N
    ghost = [np.concatenate([x, y]) for x, y in ((terms, np.full((2, 9), np.inf)), (mask, np.ones((2, 9), bool)))]
    counted = np.arange(8) < 6
    np.testing.assert_allclose(np.array(aggregate(kind, *ghost, longest, counted)), whole, rtol=1e-6)
    assert np.isfinite(whole).all()
    assert whole[1] == {"token_mean": 23, "sequence_mean": 6, "sequence_sum": 6, "constant": 72}[kind]


def test_nothing_counts():
    numerator, denominator = aggregate("token_mean", jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool))
    assert numerator == 0 and denominator == 0 and quotient(numerator, denominator) == 0
    assert quotient(jnp.float32(3), jnp.float32(2)) == 1.5


def test_types():
    for given, got in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32)):
        assert all(x.dtype == got for x in aggregate("token_mean", jnp.ones((1, 2), given), jnp.ones((1, 2), bool)))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("mean", np.ones((1, 2)), np.ones((1, 2), bool)), "one of token_mean, .*; got 'mean'"),
        (("constant", np.ones((1, 2)), np.ones((1, 2), bool)), "longest belongs to .*'constant' and None"),
        (("token_mean", np.ones((1, 2)), np.ones((1, 2), bool), 5), "longest belongs to .*'token_mean' and 5"),
        (("constant", np.ones((1, 2)), np.ones((1, 2), bool), 0), "at least 1 token; got 0"),
        (("token_mean", np.ones((1, 2)), np.ones((1, 3), bool)), r"\(1, 2\) and \(1, 3\)"),
    ],
)
def test_refused(args, words):
    with pytest.raises(ValueError, match=words):
        aggregate(*args)
