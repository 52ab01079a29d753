"""Episodes against Python loops that step gymnax by hand, alone and under vmap."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl import envs
from rl.control import normalizer as normalizer_lib
from rl.control import rollout
from rl.control.policy import Policy


def by_hand(name, choose, key, limit=None):
    """Returns (total, observations acted on): gymnax stepped one by one; `choose(obs)` gives the action."""
    inner, params = gymnax.make(name)
    reset_key, _ = jax.random.split(key)
    obs, state = inner.reset_env(reset_key, params)
    step = jax.jit(inner.step_env)
    total, seen = 0.0, []
    for _ in range(limit or params.max_steps_in_episode):
        seen.append(np.asarray(obs))
        obs, state, reward, done, _ = step(key, state, choose(obs), params)
        total += float(reward)
        if done:
            break
    return total, np.array(seen)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [("CartPole-v1", None), ("Pendulum-v1", None), ("Acrobot-v1", 40)])
def test_episode_equals_a_python_loop(name, limit):
    env = envs.make(name, max_steps=limit)
    policy = Policy(env.action, hidden=(8,))
    params = policy.init(jax.random.key(1), jnp.zeros(env.observation_size))
    act = rollout.make_act(policy, params)
    keys = jax.random.split(jax.random.key(2), 4)
    result = jax.jit(jax.vmap(lambda key: rollout.episode(env, act, key, normalizer_lib.init(env.observation_size))))(
        keys
    )
    lengths = []
    for i, key in enumerate(keys):
        total, seen = by_hand(name, jax.jit(lambda obs: act(None, obs)), key, limit)
        lengths.append(len(seen))
        assert int(result.length[i]) == len(seen) == float(result.moments.count[i])
        np.testing.assert_allclose(result.total[i], total, rtol=1e-3)
        np.testing.assert_allclose(result.moments.sum[i], seen.sum(0), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(result.moments.sum_squares[i], np.square(seen).sum(0), rtol=2e-3, atol=2e-3)
    if name == "CartPole-v1":
        assert len(set(lengths)) > 1  # members that end early share the loop with longer ones
    else:
        assert set(lengths) == {env.max_steps}


def counting_env(max_steps=9):
    """Gives reward 1 and terminates after as many steps as the reset drew; a NaN reward follows its end."""

    def reset(key):
        return (jnp.int32(0), jax.random.randint(key, (), 1, 14)), jnp.zeros(1)

    def step(key, state, action):
        count, end = state[0] + 1, state[1]
        reward = jnp.where(count <= end, 1.0, jnp.nan)
        return (count, end), jnp.where(count < end, 0.0, jnp.nan)[None], reward, count == end

    return envs.Env("counting", 1, envs.Discrete(2), max_steps, reset, step)


def test_what_happens_after_the_end_leaves_no_trace():
    env = counting_env()
    keys = jax.random.split(jax.random.key(0), 30)
    ends = np.array([int(env.reset(jax.random.split(key)[0])[0][1]) for key in keys])
    assert ends.min() < 4 and ends.max() > 9
    play = lambda key: rollout.episode(env, lambda _, obs: jnp.int32(0), key, normalizer_lib.init(1))  # noqa: E731
    together = jax.vmap(play)(keys)
    np.testing.assert_array_equal(together.length, np.minimum(ends, 9))
    np.testing.assert_array_equal(together.total, np.minimum(ends, 9))
    np.testing.assert_array_equal(together.moments.sum, 0.0)
    alone = play(keys[0])
    assert (int(alone.length), float(alone.total)) == (int(together.length[0]), float(together.total[0]))


@pytest.mark.slow
def test_members_in_nested_vmaps_share_the_randomness_of_an_episode():
    """Stochastic policies with equal parameters and the same episode key do the same, whatever the layout."""
    env = envs.make("CartPole-v1", max_steps=60)
    policy = Policy(env.action, hidden=(8,), stochastic=True)
    params = policy.init(jax.random.key(1), jnp.zeros(4))
    keys = jax.random.split(jax.random.key(5), 3)
    scales = jnp.array([[1.0, 1.0], [1.0, -3.0]])

    def score(scale, key):
        return rollout.episode(env, rollout.make_act(policy, jax.tree.map(lambda p: scale * p, params)), key).length

    nested = jax.jit(jax.vmap(jax.vmap(jax.vmap(score, (None, 0)), (0, None)), (0, None)))
    lengths = nested(scales, keys)
    assert lengths.shape == (2, 2, 3)
    for i in (0, 1):
        for j in (0, 1):
            np.testing.assert_array_equal(lengths[i, j], [int(score(scales[i, j], key)) for key in keys])
    np.testing.assert_array_equal(lengths[0, 0], lengths[1, 0])
    assert (lengths[1, 1] != lengths[0, 0]).any() and len(set(lengths[0, 0].tolist())) > 1


def test_the_step_counter_has_no_batch_axis():
    env = envs.make("Acrobot-v1", max_steps=5)
    policy = Policy(env.action, hidden=(4,), stochastic=True)
    params = policy.init(jax.random.key(1), jnp.zeros(6))
    jaxpr = jax.make_jaxpr(
        jax.vmap(
            lambda scale, key: rollout.episode(
                env, rollout.make_act(policy, {"params": jax.tree.map(lambda p: p * scale, params["params"])}), key
            ),
            (0, None),
        )
    )(jnp.ones(7), jax.random.key(0))
    (loop,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "while"]
    assert loop.outvars[0].aval.shape == ()  # the counter
    assert loop.outvars[-1].aval.shape == (7,)  # the lengths
