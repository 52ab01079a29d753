"""Evolution strategies that learn to control: the fitness of a member is the return of its episodes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import eggroll
from rl import generations
from rl.control import normalizer as normalizer_lib
from rl.control import rollout
from rl.control.normalizer import Normalizer
from rl.control.policy import Policy
from rl.envs import Env

Metrics = dict[str, jax.Array]


class State(NamedTuple):
    """Everything that changes from one generation to the next."""

    es: eggroll.State
    normalizer: Normalizer | None
    key: jax.Array  # of the episodes; never changes


class Generation(NamedTuple):
    """All that the next state takes from a generation's episodes."""

    fitness: jax.Array  # f32 [N], shaped
    normalizer: Normalizer | None  # after these episodes


def init(env: Env, policy: Policy, es: eggroll.Strategy, key: jax.Array, *, normalize_observations: bool) -> State:
    """Mean parameters as the policy initialises them, and empty observation statistics."""
    params_key, noise_key, episodes_key = jax.random.split(key, 3)
    params = policy.init(params_key, jnp.zeros(env.observation_size, jnp.float32))
    normalizer = normalizer_lib.init(env.observation_size) if normalize_observations else None
    return State(es.init(params, noise_key), normalizer, episodes_key)


def make_play(
    env: Env, policy: Policy, es: eggroll.Strategy, *, episodes: int, common_random_numbers: bool = True
) -> Callable[[State], tuple[Generation, Metrics]]:
    """Makes the jitted first half of a generation, in which all members play: `state -> (generation, metrics)`.

    Args:
      env: the environment.
      policy: acts with each member's perturbed parameters, which it never sees as such.
      es: the strategy.
      episodes: E, played by each member in each generation.
      common_random_numbers: whether all members play the same E episodes (first state, and all later draws), so that
        differences in fitness are due to the parameters; else each member has episodes of its own.

    Metrics: those of the shaping, `length_mean` and the `env_steps` of this call. All members' observations update the
    statistics that the next generation is normalised with.
    """

    shape, _ = generations.cut(es)

    @jax.jit
    def play(state: State) -> tuple[Generation, Metrics]:
        lead = (episodes,) if common_random_numbers else (es.population.size, episodes)
        keys = jax.random.split(jax.random.fold_in(state.key, state.es.generation), lead)

        def score(params: Any, key: jax.Array) -> tuple[jax.Array, rollout.Episode]:
            played = rollout.episode(env, rollout.make_act(policy, params), key, state.normalizer)
            return played.total, played

        scores, played = es.evaluate(state.es, score, keys, has_aux=True, per_member=not common_random_numbers)
        fitness, metrics = shape(scores)
        normalizer = state.normalizer
        if normalizer is not None:
            normalizer = normalizer_lib.update(normalizer, played.moments)
        metrics |= {"length_mean": jnp.mean(played.length.astype(jnp.float32)), "env_steps": jnp.sum(played.length)}
        return Generation(fitness, normalizer), metrics

    return play


def make_update(es: eggroll.Strategy) -> Callable[[State, Generation], tuple[State, Metrics]]:
    """Makes the jitted second half, `(state, generation) -> (state, metrics)`: of a run, and of its replay from a log."""
    _, update = generations.cut(es)

    @jax.jit
    def learn(state: State, generation: Generation) -> tuple[State, Metrics]:
        new, metrics = update(state.es, generation.fitness)
        return State(new, generation.normalizer, state.key), metrics

    return learn
