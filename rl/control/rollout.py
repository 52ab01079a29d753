"""Whole episodes as pure functions: written for one policy and one environment, batched by `jax.vmap`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl.control import normalizer as normalizer_lib
from rl.control import policy as policy_lib
from rl.control.normalizer import Moments, Normalizer
from rl.envs import Env

Act = Callable[[jax.Array, jax.Array], jax.Array]  # (key, observation) -> action


class Episode(NamedTuple):
    """What an episode leaves behind; leading axes as vmapped."""

    total: jax.Array  # f32 [...], undiscounted sum of rewards
    length: jax.Array  # i32 [...], environment steps
    moments: Moments | None  # sums over the observations acted on; None where nothing is normalised


class _Carry(NamedTuple):
    step: jax.Array
    env_state: Any
    obs: jax.Array
    running: jax.Array
    total: jax.Array
    length: jax.Array
    sums: tuple[jax.Array, jax.Array] | None


def episode(env: Env, act: Act, key: jax.Array, normalizer: Normalizer | None = None) -> Episode:
    """Plays one episode until it terminates or reaches `env.max_steps`.

    Under `vmap` all episodes run in lockstep until the last one ends, with one step counter for all: keys of a step
    are derived once per episode key, so members that share an episode key (common random numbers) share the draws, and
    keys that nothing uses cost nothing. Steps after an episode's own end leave no trace in its result.

    Args:
      env: the environment.
      act: `(key, observation) -> action`; sees normalised observations if there is a normalizer.
      key: decides the first state and all later randomness.
      normalizer: statistics to normalise observations with; they are not updated here.

    Returns:
      An `Episode`; `moments` are standardised by `normalizer`, ready for `normalizer.update`.
    """
    reset_key, steps_key = jax.random.split(key)
    env_state, obs = env.reset(reset_key)
    zeros = jnp.zeros(env.observation_size, jnp.float32)
    start = _Carry(
        step=jnp.int32(0),
        env_state=env_state,
        obs=obs,
        running=jnp.bool_(True),
        total=jnp.float32(0),
        length=jnp.int32(0),
        sums=None if normalizer is None else (zeros, zeros),
    )

    def body(carry: _Carry) -> _Carry:
        seen, sums = carry.obs, carry.sums
        if normalizer is not None:
            standardised = normalizer_lib.standardise(normalizer, carry.obs)
            counted = jnp.where(carry.running, standardised, 0.0)
            sums = (sums[0] + counted, sums[1] + jnp.square(counted))
            seen = normalizer_lib.clip(standardised)
        action = act(jax.random.fold_in(steps_key, 2 * carry.step), seen)
        step_key = jax.random.fold_in(steps_key, 2 * carry.step + 1)
        env_state, obs, reward, terminated = env.step(step_key, carry.env_state, action)
        return _Carry(
            step=carry.step + 1,
            env_state=env_state,
            obs=obs,
            running=carry.running & ~terminated & (carry.step + 1 < env.max_steps),
            total=carry.total + jnp.where(carry.running, reward, 0.0),
            length=carry.length + carry.running,
            sums=sums,
        )

    end = jax.lax.while_loop(lambda carry: _any(carry.running), body, start)
    moments = None if normalizer is None else Moments(end.length.astype(jnp.float32), *end.sums)
    return Episode(end.total, end.length, moments)


def make_act(policy: policy_lib.Policy, params: Any, greedy: bool = False) -> Act:
    """How `policy` with `params` acts: draws if it is stochastic and not asked to be greedy, else takes the mode."""

    def act(key: jax.Array, obs: jax.Array) -> jax.Array:
        distribution = policy.apply(params, obs)
        if policy.stochastic and not greedy:
            return policy_lib.sample(policy.action, distribution, key)
        return policy_lib.mode(policy.action, distribution)

    return act


def evaluate(
    env: Env, policy: policy_lib.Policy, params: Any, keys: jax.Array, normalizer: Normalizer | None = None
) -> Episode:
    """Plays one episode per key with the same parameters, always taking the most likely action; leading axis [keys]."""
    return jax.vmap(lambda key: episode(env, make_act(policy, params, greedy=True), key, normalizer))(keys)


@jax.custom_batching.custom_vmap
def _any(running: jax.Array) -> jax.Array:
    """Whether any episode of the batch runs; not batched, however many `vmap`s are around it.

    A loop condition with a batch axis would give every loop variable one: the step counter, and with it all keys.
    """
    return running


@_any.def_vmap
def _any_of_batch(axis_size: int, in_batched: list[bool], running: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return _any(jnp.any(running, axis=0)), False
