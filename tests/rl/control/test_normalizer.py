"""Running statistics against NumPy over all observations at once."""

import jax
import jax.numpy as jnp
import numpy as np

from rl.control import normalizer as lib


def moments_of(normalizer, obs):
    z = lib.standardise(normalizer, obs)
    return lib.Moments(jnp.full(obs.shape[:-2], obs.shape[-2], jnp.float32), z.sum(-2), jnp.square(z).sum(-2))


def test_equals_numpy_over_uneven_batches_far_from_zero():
    rng = np.random.default_rng(0)
    # A mean 1,000 times the deviation: sums of raw squares in f32 would lose all digits of the variance.
    batches = [
        (rng.normal(size=shape) * [0.5, 1.0, 3.0] + [500.0, 0.0, -3000.0]).astype(np.float32)
        for shape in ((4, 5, 3), (2, 1, 3), (30, 7, 3), (1, 400, 3))
    ]
    normalizer = lib.init(3)
    seen = np.zeros((0, 3))
    for batch in batches:
        normalizer = lib.update(normalizer, moments_of(normalizer, jnp.asarray(batch)))
        seen = np.concatenate([seen, batch.reshape(-1, 3).astype(np.float64)])
        assert float(normalizer.count) == len(seen)
        np.testing.assert_allclose(normalizer.mean, seen.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.sqrt(normalizer.m2 / normalizer.count), seen.std(0), rtol=2e-3)
    z = np.asarray(lib.standardise(normalizer, jnp.asarray(seen, jnp.float32)))
    np.testing.assert_allclose(z.mean(0), 0.0, atol=2e-3)
    np.testing.assert_allclose(z.std(0), 1.0, atol=2e-3)


def test_typed_in_numbers():
    # Observations 1 and 3, then 8: mean 2, M2 2; then mean 4, M2 = 9 + 1 + 16 = 26.
    first = lib.update(lib.init(1), lib.Moments(jnp.float32(2), jnp.array([4.0]), jnp.array([10.0])))
    np.testing.assert_allclose([first.count, first.mean[0], first.m2[0]], [2, 2, 2], rtol=1e-6)
    second = lib.update(first, moments_of(first, jnp.array([[8.0]])))
    np.testing.assert_allclose([second.count, second.mean[0], second.m2[0]], [3, 4, 26], rtol=1e-6)


def test_before_any_observation_nothing_changes():
    obs = jnp.array([3.0, -7.0])
    np.testing.assert_allclose(lib.standardise(lib.init(2), obs), obs, rtol=1e-7)
    empty = lib.update(lib.init(2), lib.Moments(jnp.zeros(5), jnp.zeros((5, 2)), jnp.zeros((5, 2))))
    assert all(np.array_equal(a, b) for a, b in zip(empty, lib.init(2), strict=True))


def test_a_constant_observation_becomes_zero_and_jumps_are_clipped():
    normalizer = lib.update(lib.init(1), moments_of(lib.init(1), jnp.full((50, 1), 2.0)))
    assert float(lib.standardise(normalizer, jnp.array([2.0]))[0]) == 0.0
    assert float(lib.clip(lib.standardise(normalizer, jnp.array([2.1])))[0]) == 10.0


def test_episodes_with_non_finite_observations_do_not_poison_the_statistics():
    good = lib.Moments(jnp.float32(2), jnp.array([4.0]), jnp.array([10.0]))
    bad = lib.Moments(jnp.float32(9), jnp.array([jnp.nan]), jnp.array([jnp.inf]))
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), good, bad)
    assert lib.update(lib.init(1), both) == lib.update(lib.init(1), good)
