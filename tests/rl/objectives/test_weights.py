"""Importance weights: three levels, three ways to treat what falls outside; the proximal policy without a forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.objectives.weights import LOG_LIMIT, Weight, approximate_proximal, importance_weight

LOG = jnp.array([[0.0, 0.5, 1.0, -1.0]])
ALL = jnp.ones((1, 4), bool)


@pytest.mark.parametrize(
    ("weight", "values"),
    [
        (Weight(), [1, 1.648721, 2.718282, 0.367879]),
        (Weight(cap=2.0), [1, 1.648721, 2, 0.367879]),
        (Weight(floor=0.5, cap=2.0, outside="zero"), [1, 1.648721, 0, 0]),
        (Weight(floor=0.5, cap=2.0), [1, 1.648721, 2, 0.5]),
        (Weight(floor=0.5, cap=2.0, outside="reject"), [1, 1, 0, 0]),
        (Weight(level="sequence"), [1.648721] * 4),
        (Weight(level="sequence", cap=1.5), [1.5] * 4),
        (Weight(level="sequence", cap=1.5, outside="zero"), [0] * 4),
        (Weight(level="geometric"), [1.133148] * 4),
        (Weight(level="geometric", floor=0.999, cap=1.001, outside="reject"), [0] * 4),
    ],
)
def test_values(weight, values):
    got, outside = importance_weight(weight, LOG, ALL)
    np.testing.assert_allclose(got[0], values, rtol=2e-6)
    plain, _ = importance_weight(Weight(level=weight.level), LOG, ALL)
    bounds = weight.floor or 0, weight.cap or np.inf
    assert outside.tolist() == [[not bounds[0] <= x <= bounds[1] for x in plain[0]]]


def test_truncation_of_minirl():
    got, _ = importance_weight(Weight(of="policy", cap=5.0), jnp.array([[2.0, -2.0]]), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(got, [[5.0, 0.135335]], rtol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("outside", ["clamp", "zero", "reject"])
def test_no_mismatch_is_no_op(level, outside):
    weight = Weight(level=level, floor=0.5, cap=2.0, outside=outside)
    got, out = importance_weight(weight, jnp.zeros((3, 4)), jnp.arange(4) < jnp.array([[4], [0], [2]]))
    assert (got == 1).all() and not out.any()


def test_masked_tokens_take_no_part():
    mask = jnp.array([[True, True, False]])
    got, out = importance_weight(Weight(level="geometric", cap=2.0), jnp.array([[0.2, 0.4, 0.0]]), mask)
    np.testing.assert_allclose(got, [[np.exp(0.3), np.exp(0.3), 1]], rtol=1e-6)
    assert not out.any()
    kept, out = importance_weight(Weight(level="sequence", cap=1.5, outside="zero"), jnp.array([[0.2, 0.4, 0.0]]), mask)
    assert kept.tolist() == [[0, 0, 1]] and out.tolist() == [[True, True, False]]


def test_limits_and_gradient():
    far = jnp.array([[1e3, -1e3]])
    got, _ = importance_weight(Weight(), far, jnp.ones((1, 2), bool))
    np.testing.assert_allclose(got, np.exp([[LOG_LIMIT, -LOG_LIMIT]]), rtol=1e-5)
    assert np.isfinite(got**2).all()
    gradient = jax.grad(lambda x: importance_weight(Weight(level="sequence"), x, ALL)[0].sum())(LOG)
    assert not gradient.any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"of": "reference"}, "of must be one of proximal, policy; got 'reference'"),
        ({"level": "word"}, "level must be one of token"),
        ({"outside": "drop"}, "outside must be one of clamp"),
        ({"cap": 0.5, "floor": 0.5}, "0 <= floor < cap; got floor 0.5 and cap 0.5"),
        ({"floor": -1.0}, "0 <= floor < cap"),
        ({"cap": float("nan")}, "0 <= floor < cap"),
        ({"outside": "reject"}, "needs a cap or a floor"),
    ],
)
def test_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Weight(**settings)


def test_approximate_proximal():
    logp, behaviour = jnp.full((1, 4), -1.5), jnp.full((1, 4), -2.0)
    got = approximate_proximal(logp, behaviour, jnp.array([[3, 5, 6, 0]]), 6)
    # ages 3, 1, 0, 6: two thirds of the way; the sampler itself where it is the proximal policy or newer; five sixths
    np.testing.assert_allclose(got, [[-1.666667, -2.0, -2.0, -2 + 0.5 * 5 / 6]], rtol=1e-6)
    assert not jax.grad(lambda x: approximate_proximal(x, behaviour, jnp.zeros((1, 4), int), 6).sum())(logp).any()
    # never all the way
    assert (approximate_proximal(logp, behaviour, jnp.arange(-100, 0).reshape(25, 4), 6) < -1.5).all()
