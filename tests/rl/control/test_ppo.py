"""PPO: advantages and loss by hand, truncation, and that it learns."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import envs
from rl.control import ppo
from rl.control.policy import Policy
from rl.models.mlp import MLP


def test_gae_by_hand():
    # gamma 0.5, lambda 0.5. Column 0 runs on; column 1 terminates at t = 1; column 2 is cut by its time limit at t = 1.
    reward = jnp.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    value = jnp.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [4.0, 4.0, 4.0]])
    next_value = jnp.array([[2.0, 2.0, 2.0], [4.0, 8.0, 8.0], [6.0, 6.0, 6.0]])
    terminated = jnp.array([[False] * 3, [False, True, False], [False] * 3])
    done = jnp.array([[False] * 3, [False, True, True], [False] * 3])
    # delta: t = 2: 3 + 0.5 * 6 - 4 = 2 in all columns
    #        t = 1: 2 + 0.5 * 4 - 2 = 2 | 2 + 0 - 2 = 0 | 2 + 0.5 * 8 - 2 = 4
    #        t = 0: 1 + 0.5 * 2 - 1 = 1 in all columns
    # A: t = 1: 2 + 0.25 * 2 = 2.5 | 0 | 4;   t = 0: 1 + 0.25 * A_1 = 1.625 | 1 | 2
    expected = [[1.625, 1.0, 2.0], [2.5, 0.0, 4.0], [2.0, 2.0, 2.0]]
    np.testing.assert_allclose(ppo.gae(reward, value, next_value, terminated, done, 0.5, 0.5), expected, rtol=1e-6)


def test_gae_equals_a_numpy_loop():
    rng = np.random.default_rng(0)
    reward, value, next_value = rng.normal(size=(3, 20, 6)).astype(np.float32)
    terminated = rng.random((20, 6)) < 0.15
    done = terminated | (rng.random((20, 6)) < 0.1)
    expected = np.zeros((20, 6))
    for b in range(6):
        following = 0.0
        for t in reversed(range(20)):
            delta = reward[t, b] + 0.97 * (0.0 if terminated[t, b] else next_value[t, b]) - value[t, b]
            following = delta + 0.97 * 0.9 * (0.0 if done[t, b] else following)
            expected[t, b] = following
    result = ppo.gae(*map(jnp.asarray, (reward, value, next_value, terminated, done)), 0.97, 0.9)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_clipped_objective_by_hand():
    ratio = np.array([1.5, 1.5, 0.5, 0.5, 1.1])
    advantage = np.array([2.0, -2.0, 2.0, -2.0, 3.0])
    # The bound holds only where it makes the objective smaller: 1.2 * 2, 1.5 * -2, 0.5 * 2, 0.8 * -2, 1.1 * 3.
    result = ppo.clipped_objective(jnp.log(ratio) + 0.3, jnp.full(5, 0.3), jnp.asarray(advantage), 0.2)
    np.testing.assert_allclose(result, [2.4, -3.0, 1.0, -1.6, 3.3], rtol=1e-5)


def test_loss_by_hand():
    policy, critic = Policy(envs.Discrete(2), hidden=(), stochastic=True), MLP(1, hidden=())
    params = {
        "actor": {
            "params": {"MLP_0": {"Dense_0": {"kernel": jnp.array([[0.0, math.log(3.0)]]), "bias": jnp.zeros(2)}}}
        },
        "critic": {"params": {"Dense_0": {"kernel": jnp.array([[2.0]]), "bias": jnp.array([1.0])}}},
    }
    # Observations 0 and 1: probabilities (1/2, 1/2) and (1/4, 3/4); values 1 and 3.
    batch = ppo.Batch(
        obs=jnp.array([[0.0], [1.0]]),
        action=jnp.array([0, 1]),
        logp_behaviour=jnp.log(jnp.array([0.5, 0.5])),
        advantage=jnp.array([1.0, 5.0]),
        target=jnp.array([2.0, 0.0]),
    )
    settings = ppo.Settings(envs=1, steps=2, minibatches=1, clip=0.2, value=0.5, entropy=0.1)
    total, parts = ppo.loss(params, policy, critic, batch, settings)
    # Standardised advantages -1, 1; ratios 1, 1.5 (clipped to 1.2): -(-1 + 1.2) / 2 = -0.1
    entropy = (math.log(2) + (math.log(4) / 4 + 0.75 * math.log(4 / 3))) / 2
    expected = {
        "policy_loss": -0.1,
        "value_loss": 0.5 * (1 + 9) / 2,
        "entropy": entropy,
        "kl": (0.5 - math.log(1.5)) / 2,
        "clip_fraction": 0.5,
    }
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(total, -0.1 + 0.5 * 2.5 - 0.1 * entropy, rtol=1e-5)


def test_settings_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"4 \* 5 = 20, but 3 does not"):
        ppo.Settings(envs=4, steps=5, minibatches=3)


def clock_env(max_steps, end):
    """Observes and pays the number of the step; terminates at `end`."""

    def step(key, state, action):
        return state + 1, (state + 1.0)[None], state + 1.0, state + 1 >= end

    return envs.Env("clock", 1, envs.Discrete(2), max_steps, lambda key: (jnp.float32(0), jnp.zeros(1)), step)


@pytest.mark.parametrize(("max_steps", "end", "terminal"), [(3, 99, False), (99, 3, True)])
def test_collected_transitions(max_steps, end, terminal):
    env = clock_env(max_steps, end)
    policy, critic = Policy(env.action, hidden=(), stochastic=True), MLP(1, hidden=())
    settings = ppo.Settings(envs=2, steps=7, minibatches=1, normalize_observations=False)
    state = ppo.init(env, policy, critic, settings, jax.random.key(0))
    state, data = ppo._collect(env, policy, settings, state, jax.random.key(1))
    for column in (0, 1):
        np.testing.assert_array_equal(data.obs[:, column, 0], [0, 1, 2, 0, 1, 2, 0])
        np.testing.assert_array_equal(data.next_obs[:, column, 0], [1, 2, 3, 1, 2, 3, 1])  # before the reset
        np.testing.assert_array_equal(data.reward[:, column], [1, 2, 3, 1, 2, 3, 1])
        ends = np.array([0, 0, 1, 0, 0, 1, 0], bool)
        np.testing.assert_array_equal(data.done[:, column], ends)
        np.testing.assert_array_equal(data.terminated[:, column], ends & terminal)
        np.testing.assert_array_equal(data.finished_total[:, column], 6.0 * ends)
    np.testing.assert_array_equal(state.length, [1, 1])
    np.testing.assert_array_equal(state.total, [1.0, 1.0])


@pytest.mark.slow
def test_observations_are_normalised_and_counted():
    env = clock_env(3, 99)
    policy, critic = Policy(env.action, hidden=(4,), stochastic=True), MLP(1, hidden=(4,))
    settings = ppo.Settings(envs=2, steps=6, minibatches=2, epochs=1)
    state = ppo.init(env, policy, critic, settings, jax.random.key(0))
    state, metrics = ppo.make_step(env, policy, critic, settings)(state)
    assert float(state.normalizer.count) == 12.0
    np.testing.assert_allclose(state.normalizer.mean, 1.0, rtol=1e-6)  # of 0, 1, 2
    np.testing.assert_allclose(state.normalizer.m2 / 12, 2 / 3, rtol=1e-5)
    assert float(metrics["return_mean"]) == 6.0 and int(metrics["episodes"]) == 4
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.slow
@pytest.mark.parametrize("box", [False, True])
def test_learns_a_bandit(box):
    """The best of two arms; the best point, 0.5, of a line."""
    action = envs.Continuous((-1.0,), (1.0,)) if box else envs.Discrete(2)

    def step(key, state, taken):
        reward = -jnp.square(taken[0] - 0.5) if box else (taken == 1).astype(jnp.float32)
        return state, jnp.zeros(1), reward, jnp.bool_(True)

    env = envs.Env("bandit", 1, action, 1, lambda key: (jnp.int32(0), jnp.zeros(1)), step)
    policy, critic = Policy(action, hidden=(8,), stochastic=True), MLP(1, hidden=(8,))
    settings = ppo.Settings(envs=32, steps=8, minibatches=4, learning_rate=1e-2)
    state = ppo.init(env, policy, critic, settings, jax.random.key(0))
    run = ppo.make_step(env, policy, critic, settings)
    for _ in range(30):
        state, metrics = run(state)
    location = policy.apply(state.params["actor"], jnp.zeros(1)).location
    if box:
        np.testing.assert_allclose(location, [0.5], atol=0.1)
    else:
        assert jax.nn.softmax(location)[1] > 0.95
    assert float(metrics["return_mean"]) > (-0.2 if box else 0.9)


def test_a_deterministic_policy_is_refused():
    env = clock_env(3, 99)
    with pytest.raises(ValueError, match="stochastic=True"):
        ppo.init(env, Policy(env.action, hidden=()), MLP(1, hidden=()), ppo.Settings(), jax.random.key(0))
