"""Environment adapters: names, shapes, and the same numbers as the libraries stepped by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import envs


@pytest.mark.parametrize(
    ("name", "size", "action", "max_steps"),
    [
        ("CartPole-v1", 4, envs.Discrete(2), 500),
        ("Pendulum-v1", 3, envs.Continuous((-2.0,), (2.0,)), 200),
        ("Acrobot-v1", 6, envs.Discrete(3), 500),
        ("MountainCarContinuous-v0", 2, envs.Continuous((-1.0,), (1.0,)), 999),
        ("Breakout-MinAtar", 400, envs.Discrete(3), 1000),
        ("FrozenLake-misc", 1, envs.Discrete(4), 100),
    ],
)
def test_facts(name, size, action, max_steps):
    env = envs.make(name)
    assert (env.name, env.observation_size, env.action, env.max_steps) == (name, size, action, max_steps)
    assert envs.make(name, max_steps=7).max_steps == 7


def example_action(env):
    if isinstance(env.action, envs.Discrete):
        return jnp.int32(env.action.n - 1)
    return jnp.asarray(env.action.high, jnp.float32)


@pytest.mark.parametrize(
    "name", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCarContinuous-v0", "Breakout-MinAtar", "Swimmer-misc"]
)
def test_the_state_fits_a_loop_and_nothing_resets(name):
    env = envs.make(name)
    key = jax.random.key(3)
    state, obs = env.reset(key)
    stepped = jax.eval_shape(env.step, key, state, example_action(env))
    assert jax.tree.structure(stepped[0]) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(stepped[0]), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
        assert not before.weak_type and not after.weak_type
    assert [(x.shape, x.dtype) for x in stepped[1:]] == [
        ((env.observation_size,), jnp.float32),
        ((), jnp.float32),
        ((), jnp.bool_),
    ]
    assert (obs.shape, obs.dtype) == ((env.observation_size,), jnp.float32)


def test_cartpole_equals_gymnax_stepped_by_hand_beyond_its_end():
    import gymnax

    env = envs.make("CartPole-v1")
    inner, params = gymnax.make("CartPole-v1")
    key = jax.random.key(0)
    obs_h, state_h = inner.reset_env(key, params)
    state, obs = env.reset(key)
    step, step_h = jax.jit(env.step), jax.jit(inner.step_env)
    dones = []
    for _ in range(12):
        np.testing.assert_allclose(obs, obs_h, rtol=1e-6)
        state, obs, reward, terminated = step(key, state, jnp.int32(1))
        obs_h, state_h, reward_h, done_h, _ = step_h(key, state_h, 1, params)
        assert (float(reward), bool(terminated)) == (float(reward_h), bool(done_h))
        dones.append(bool(terminated))
    # Always pushing right: the pole falls within 9 to 11 steps, and stays fallen.
    first = dones.index(True)
    assert 8 <= first <= 10 and all(dones[first:])


def test_actions_beyond_the_bounds_are_clipped():
    env = envs.make("MountainCarContinuous-v0")
    state, _ = env.reset(jax.random.key(0))
    reward = {a: float(env.step(jax.random.key(0), state, jnp.array([a], jnp.float32))[2]) for a in (1.0, 5.0, -5.0)}
    np.testing.assert_allclose([reward[1.0], reward[5.0], reward[-5.0]], -0.1, rtol=1e-6)  # -0.1 * 1 ** 2, not * 25


def test_centre_and_half_range():
    kind = envs.Continuous((-1.0, 0.0), (3.0, 1.0))
    np.testing.assert_array_equal(kind.centre, [1.0, 0.5])
    np.testing.assert_array_equal(kind.half_range, [2.0, 0.5])
    assert kind.size == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [("CartPole-v2", "Did you mean CartPole-v1"), ("ant", "brax/NAME"), ("brax/ants", "brax/ant,")],
)
def test_unknown_names_list_what_exists(name, expected):
    if name.startswith("brax/"):
        pytest.importorskip("brax")
    with pytest.raises(envs.EnvError, match="unknown environment") as error:
        envs.make(name)
    assert expected in str(error.value)


def test_a_time_limit_below_one_is_refused():
    with pytest.raises(envs.EnvError, match="at least 1, not 0"):
        envs.make("CartPole-v1", max_steps=0)


def test_names_can_be_made():
    known = envs.names()
    assert {"CartPole-v1", "Breakout-MinAtar"} <= set(known) and "MNISTBandit-bsuite" not in known


@pytest.mark.slow
def test_brax_facts_and_steps():
    pytest.importorskip("brax")
    env = envs.make("brax/inverted_pendulum", max_steps=3)
    assert (env.observation_size, env.action, env.max_steps) == (4, envs.Continuous((-3.0,), (3.0,)), 3)
    key = jax.random.key(0)

    @jax.jit
    def push(force):
        state, obs = env.reset(key)
        return obs, *env.step(key, state, force)[1:]

    before, still, reward, terminated = push(jnp.zeros(1))
    assert float(reward) == 1.0 and not bool(terminated)
    assert np.abs(before).max() < 0.02 and 0 < np.abs(np.asarray(still) - before).max() < 0.1
    bound, beyond = push(jnp.full(1, 3.0))[1], push(jnp.full(1, 90.0))[1]
    np.testing.assert_array_equal(bound, beyond)
    assert np.abs(np.asarray(bound) - still).max() > 0.01
