"""Effective sample size, step scale, the baseline of least variance, and the surrogate of gradient norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl.objectives import vcpo

# a weight of 0 is a log-weight of minus infinity
log = lambda *w: jnp.log(jnp.array(w, jnp.float32))


@pytest.mark.parametrize(
    ("weights", "size", "factor"),
    [
        ((2, 1, 1, 0), 2.666667, 0.816497),
        ((8, 1, 1, 1), 1.805970, 0.671932),
        ((1, 0, 0, 0), 1.0, 0.5),
        ((1, 1, 1, 1), 4.0, 1.0),
    ],
)
def test_values(weights, size, factor):
    assert vcpo.ess(log(*weights)) == pytest.approx(size, rel=1e-6)
    assert vcpo.step_scale(log(*weights)) == pytest.approx(factor, rel=1e-6)
    assert vcpo.step_scale(log(*weights), rule="linear") == pytest.approx(factor**2, rel=1e-6)
    assert vcpo.step_scale(log(*weights), 0.55) == pytest.approx(min(1, size / 4 / 0.55) ** 0.5, rel=1e-6)


def test_base_is_a_dead_zone():
    assert vcpo.step_scale(log(2, 1, 1, 0), 0.55) == 1


@pytest.mark.parametrize("level", [0.0, 0.1, -13.8, 700.0, -700.0])
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_a_common_factor_is_no_mismatch(level, rows):
    """Exactly: a step that is scaled by 0.9999999 on-policy would be another optimizer."""
    weights = jnp.full(rows, level, jnp.float32)
    assert vcpo.ess(weights) == rows and vcpo.step_scale(weights) == 1


def test_huge_weights():
    assert vcpo.ess(jnp.array([800.0, 1, 0, -2])) == 1
    np.testing.assert_allclose(
        vcpo.ess(jnp.array([3.0, 1, 0, -2]) + 500), vcpo.ess(jnp.array([3.0, 1, 0, -2])), rtol=1e-5
    )


@pytest.mark.parametrize("broken", [[jnp.nan, 0], [jnp.inf, 0], [jnp.inf, jnp.inf], [-jnp.inf, -jnp.inf]])
def test_weights_that_are_no_numbers_shorten_the_step_most(broken):
    assert vcpo.ess(jnp.array(broken)) == 1 and vcpo.step_scale(jnp.array(broken)) == pytest.approx(0.5**0.5)


def test_rows_that_do_not_exist():
    weights, counted = jnp.array([0.3, 1.0, jnp.nan, 0.0]), jnp.array([True, True, False, False])
    assert vcpo.ess(weights, counted) == vcpo.ess(weights[:2])
    assert vcpo.step_scale(weights, counted=counted) == pytest.approx(float(vcpo.step_scale(weights[:2])), rel=1e-6)
    grid = lambda x: x.reshape(2, 2)  # any shape: micro-batches of rows
    assert vcpo.step_scale(grid(weights), counted=grid(counted)) == vcpo.step_scale(weights, counted=counted)
    assert jnp.isfinite(vcpo.step_scale(weights, counted=jnp.zeros(4, bool)))


def test_bounds():
    r = np.random.default_rng(0)
    for scale in (0.1, 1, 10, 100):
        size = float(vcpo.ess(jnp.asarray(scale * r.normal(size=64), jnp.float32)))
        assert 1 <= size <= 64
    ell = r.normal(size=8)
    w = np.exp(ell)
    assert vcpo.ess(jnp.asarray(ell, jnp.float32)) == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("base", "rule", "words"), [(0.0, "sqrt", "got 0.0"), (1.5, "sqrt", "1.5"), (1.0, "log", "'log'")]
)
def test_refused(base, rule, words):
    with pytest.raises(ValueError, match=words):
        vcpo.step_scale(jnp.zeros(2), base, rule)


def baseline(weights, norms, rewards, **more):
    norms, rewards = (jnp.array([x], jnp.float32) for x in (norms, rewards))
    return float(vcpo.minimum_variance_baseline(log(*weights)[None], norms**2, rewards, **more)[0])


@pytest.mark.parametrize(
    ("weights", "norms", "rewards", "value"),
    [
        ((1, 1, 1, 1), (1, 2, 1, 2), (1, 0, 1, 0), 0.2),
        ((1, 1, 1, 1), (3, 3, 3, 3), (1, 0, 1, 0), 0.5),
        ((2, 1, 0.5, 1), (1, 2, 1, 2), (1, 0, 1, 0), 0.346939),
        ((2, 0.5), (1, 1), (1, 0), 0.941176),
        ((1, 1, 1), (0, 0, 0), (1, 0, 0.5), 0.5),  # no gradient anywhere: the mean
        ((1, 1, 1), (0, 1, 0), (1, 0.2, 0.5), 0.2),
        ((0, 1, 1), (5, 1, 1), (9, 0.2, 0.4), 0.3),
    ],
)
def test_baseline(weights, norms, rewards, value):
    assert baseline(weights, norms, rewards) == pytest.approx(value, rel=1e-5)


def test_baseline_is_the_minimum():
    r = np.random.default_rng(0)
    ell, norms, rewards = r.normal(size=(5, 6)), r.gamma(2.0, size=(5, 6)), r.normal(size=(5, 6))
    got = np.array(vcpo.minimum_variance_baseline(jnp.asarray(ell), jnp.asarray(norms), jnp.asarray(rewards)))
    grid = np.linspace(-3, 3, 60001)
    for p in range(5):
        second = (np.exp(2 * ell[p]) * norms[p]) @ (rewards[p][:, None] - grid) ** 2
        assert got[p] == pytest.approx(grid[second.argmin()], abs=2e-4)


def test_baseline_moves_with_the_rewards():
    weights, norms = (2, 1, 0.5, 1), (1, 2, 1, 2)
    assert baseline(weights, norms, (6, 5, 6, 5)) == pytest.approx(5 + baseline(weights, norms, (1, 0, 1, 0)), rel=1e-6)
    for n in (4, 7, 11):  # exactly: the advantage is 0, not a rounding
        assert baseline(np.linspace(0.3, 2, n), np.linspace(1, 3, n), (0.1,) * n) == np.float32(0.1)


def test_baseline_of_extreme_and_missing_rows():
    norms, rewards = jnp.ones((1, 3)), jnp.array([[1.0, 0, 0.5]])
    assert vcpo.minimum_variance_baseline(jnp.array([[800.0, 0, -800]]), norms, rewards)[0] == 1
    assert vcpo.minimum_variance_baseline(jnp.array([[-900.0, -900, -901]]), norms, rewards)[0] == pytest.approx(
        (1 + 0.5 * np.exp(-2)) / (2 + np.exp(-2)), rel=1e-5
    )
    ok = jnp.array([[True, True, False], [False] * 3])
    broken = jnp.array([[1.0, 0, jnp.nan]] * 2)
    got = vcpo.minimum_variance_baseline(broken, jnp.abs(broken) + 1, broken, ok)
    weight = np.array([np.exp(2.0) * 2, 1])
    np.testing.assert_allclose(got, [weight @ [1, 0] / weight.sum(), 0], rtol=1e-5)


def test_bandit():
    """Sampler (1/2, 1/2), policy (4/5, 1/5), rewards (1, 0): the mean does not move with b, the variance does."""
    score, w, rewards = np.array([0.2, -0.8]), np.array([1.6, 0.4]), np.array([1.0, 0])
    sample = lambda b: w * score * (rewards - b)
    np.testing.assert_allclose([sample(b).mean() for b in (0, 0.8, 0.5)], 0.16)
    np.testing.assert_allclose([sample(b).var() for b in (0, 0.8, 0.5)], [0.0256, 0.009216, 0], atol=1e-15)
    assert baseline(w, np.abs(score), rewards) == pytest.approx(0.5, rel=1e-6)


def test_surrogate_is_the_norm_with_respect_to_the_logits():
    r = np.random.default_rng(0)
    logits, ids = jnp.asarray(2 * r.normal(size=(3, 4, 6)), jnp.float32), jnp.asarray(r.integers(0, 6, (3, 4)))
    mask = jnp.arange(4) < jnp.array([[4], [2], [0]])
    chosen = lambda x: jnp.take_along_axis(jax.nn.log_softmax(x), ids[..., None], -1)[..., 0]
    slope = jax.grad(lambda x: jnp.where(mask, chosen(x), 0).sum())(logits)
    got = vcpo.logit_squared_norms(jnp.where(mask, chosen(logits), jnp.nan), vcpo.collision(logits), mask)
    np.testing.assert_allclose(got, (slope**2).sum((1, 2)), rtol=1e-5)
    assert vcpo.collision(jnp.array([1e4, 0.0, 0.0])) == 1
    assert vcpo.collision(jnp.zeros(5)) == pytest.approx(0.2)
