"""KL estimators: values, guards, and which KL their gradients belong to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.objectives.kl import ESTIMATORS, convex_share, kl, kl_convex


@pytest.mark.parametrize(
    ("estimator", "d", "value"),
    [
        ("k1", 0.1, -0.1), ("k2", 0.1, 0.005), ("k3", 0.1, 0.005170918), ("k3_straight", 0.1, 0.005170918),
        ("k3", -0.1, 0.004837418), ("k3", 1.0, 0.718282), ("k3", -1.0, 0.367879),
    ],
)  # fmt: skip
def test_values(estimator, d, value):
    assert kl(estimator, jnp.float32(-2.0), jnp.float32(-2.0 + d)) == pytest.approx(value, rel=2e-6, abs=1e-8)


def _facts():
    logits, reference = jnp.array([0.3, -0.5, 1.1]), jnp.array([-0.2, 0.6, 0.4])
    lp, lr = jax.nn.log_softmax, jax.nn.log_softmax(reference)
    p = jax.nn.softmax(logits)
    mean_gradient = lambda name: jax.grad(lambda x: (p * kl(name, lp(x), lr)).sum())(logits)
    reverse = jax.grad(lambda x: (jax.nn.softmax(x) * (lp(x) - lr)).sum())(logits)
    forward = jax.grad(lambda x: (jnp.exp(lr) * (lr - lp(x))).sum())(logits)
    return mean_gradient, reverse, forward


def test_gradients_on_an_enumerated_policy():
    mean_gradient, reverse, forward = _facts()
    assert np.abs(reverse - forward).max() > 0.05  # the two can be told apart
    np.testing.assert_allclose(mean_gradient("k1"), 0, atol=1e-7)
    np.testing.assert_allclose(mean_gradient("k2"), reverse, atol=1e-7)
    np.testing.assert_allclose(mean_gradient("k3_straight"), reverse, atol=1e-7)
    np.testing.assert_allclose(mean_gradient("k3"), forward, atol=1e-7)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_far_apart(estimator):
    for d in (1e3, -1e3):
        value, slope = jax.value_and_grad(lambda x, d=d: kl(estimator, x, jnp.float32(d)))(jnp.float32(0))
        assert np.isfinite(value) and np.isfinite(slope)
    if estimator.startswith("k3"):
        assert kl(estimator, jnp.float32(0), jnp.float32(1e3)) == kl(estimator, jnp.float32(0), jnp.float32(-1e3)) == 10
    slope = lambda d: float(jax.grad(lambda x: kl(estimator, x, jnp.float32(d)))(jnp.float32(0)))
    assert slope(2.6) != 0 and slope(-10.9) != 0
    assert (slope(2.62) == 0) == (slope(-11.1) == 0) == (estimator == "k3")


def test_two_anchors():
    r = np.random.default_rng(0)
    logp, base, previous = (jnp.asarray(r.normal(size=(2, 3)), jnp.float32) for _ in range(3))
    mixed = kl_convex("k3", logp, base, previous, 0.7)
    np.testing.assert_allclose(mixed, 0.7 * kl("k3", logp, base) + 0.3 * kl("k3", logp, previous), rtol=1e-6)
    total = lambda x, share, base=base, previous=previous: kl_convex("k2", x, base, previous, share).sum()
    # no distance and no pull exactly where all three agree
    assert total(logp, 0.5, logp, logp) == 0
    assert not jax.grad(total)(logp, 0.5, logp, logp).any()
    assert total(logp, 0.5, logp, previous) > 0 and total(logp, 0.5, base, logp) > 0
    # share 1: the second anchor takes no part, even where it is not a number
    for broken in (previous + 1, jnp.full_like(previous, jnp.nan)):
        assert (kl_convex("k3", logp, base, broken, 1.0) == kl("k3", logp, base)).all()
        gradient = jax.grad(lambda x, broken=broken: kl_convex("k3", x, base, broken, 1.0).sum())(logp)
        np.testing.assert_array_equal(gradient, jax.grad(lambda x: kl("k3", x, base).sum())(logp))


def test_share_of_the_base():
    steps = [0, 50, 51, 60, 61, 90, 91, 100, 1000]
    assert [round(float(convex_share(t)), 6) for t in steps] == [1.0, 1.0, 0.9, 0.9, 0.8, 0.6, 0.5, 0.5, 0.5]
    every = np.array(convex_share(jnp.arange(200)))
    assert (np.diff(every) <= 0).all() and every.min() == 0.5


def test_unknown():
    with pytest.raises(ValueError, match="one of k1, k2, k3, k3_straight; got 'k4'"):
        kl("k4", jnp.zeros(1), jnp.zeros(1))
