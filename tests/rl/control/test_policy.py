"""Action distributions: typed-in numbers and Monte-Carlo."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import envs
from rl.control import policy as lib

BOX = envs.Continuous((-1.0, 0.0), (3.0, 1.0))  # centre (1, 0.5), half range (2, 0.5)


def test_discrete_numbers():
    action = envs.Discrete(3)
    distribution = lib.Distribution(jnp.log(jnp.array([[0.2, 0.5, 0.3], [0.7, 0.2, 0.1]])) + 4.0)
    np.testing.assert_array_equal(lib.mode(action, distribution), [1, 0])
    np.testing.assert_allclose(
        lib.log_prob(action, distribution, jnp.array([2, 0])), [math.log(0.3), math.log(0.7)], rtol=1e-5
    )
    np.testing.assert_allclose(lib.entropy(action, distribution), [1.029653, 0.801819], rtol=1e-5)
    one = lib.Distribution(distribution.location[0])
    draws = jax.vmap(lambda key: lib.sample(action, one, key))(jax.random.split(jax.random.key(0), 4000))
    assert draws.dtype == jnp.int32
    np.testing.assert_allclose(np.bincount(draws) / 4000, [0.2, 0.5, 0.3], atol=0.04)  # 5 sigma


def test_continuous_numbers():
    distribution = lib.Distribution(jnp.array([1.0, 0.5]), jnp.log(jnp.array([0.5, 0.2])))  # deviations 1.0 and 0.1
    np.testing.assert_array_equal(lib.mode(BOX, distribution), [1.0, 0.5])
    # one deviation off in both: -1 - ln(1.0 * 0.1) - ln(2 pi) = -1 + 2.302585 - 1.837877
    np.testing.assert_allclose(lib.log_prob(BOX, distribution, jnp.array([2.0, 0.4])), -0.535292, rtol=1e-4)
    # 2 * 1.418939 + ln(0.1)
    np.testing.assert_allclose(lib.entropy(BOX, distribution), 0.535292, rtol=1e-4)
    draws = jax.vmap(lambda key: lib.sample(BOX, distribution, key))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(draws.mean(0), [1.0, 0.5], atol=0.08)
    np.testing.assert_allclose(draws.std(0), [1.0, 0.1], rtol=0.06)


def test_the_mean_is_squashed_into_the_bounds():
    policy = lib.Policy(BOX, hidden=())
    params = {"params": {"MLP_0": {"Dense_0": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}}}
    location = policy.apply(params, jnp.array([[0.0, 0.0], [50.0, -50.0], [0.5, math.atanh(0.2)]])).location
    np.testing.assert_allclose(location, [[1.0, 0.5], [3.0, 0.0], [1.0 + 2 * math.tanh(0.5), 0.6]], rtol=1e-6)


def test_only_stochastic_continuous_policies_have_a_log_std():
    def leaves(**kwargs):
        return lib.Policy(hidden=(4,), **kwargs).init(jax.random.key(0), jnp.zeros(3))["params"].keys()

    assert leaves(action=BOX) == leaves(action=envs.Discrete(2), stochastic=True) == {"MLP_0"}
    assert leaves(action=BOX, stochastic=True) == {"MLP_0", "log_std"}


def test_drawing_without_a_deviation_says_what_to_do():
    with pytest.raises(ValueError, match=r"Policy\(stochastic=True\)"):
        lib.sample(BOX, lib.Distribution(jnp.zeros(2)), jax.random.key(0))
