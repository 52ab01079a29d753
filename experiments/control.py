"""Learns to control: EGGROLL, OpenES or PPO on a gymnax or brax environment.

    python -m experiments.control --config=configs/control_cartpole.py[:variant] --workdir=runs/cartpole

The same command resumes. At the end, the mean parameters play `eval_episodes` fresh episodes: the result is printed and
written to `result.json`, and `plot.png` is drawn.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from experiments import build, plot
from rl import config as config_lib
from rl import envs, generations
from rl.control import evolution, ppo, rollout
from rl.control.normalizer import Normalizer
from rl.control.policy import Policy
from rl.launch import launch
from rl.models.mlp import MLP
from rl.run import Run

METHODS = ("eggroll", "openes", "ppo")


class Learner(NamedTuple):
    """A method, ready to run."""

    state: Any
    step: Callable[[Any], tuple[Any, dict[str, Any]]]  # metrics include env_steps and, of evolution, the generation
    actor: Callable[[Any], Any]  # state -> parameters of the policy
    policy: Policy
    show: tuple[str, ...]  # metrics on the progress line
    update: Callable[[Any, evolution.Generation], tuple[Any, dict[str, jax.Array]]] | None = (
        None  # the part a replay repeats
    )


def make_learner(config: ml_collections.ConfigDict, env: envs.Env) -> Learner:
    """Builds the method that a config describes.

    Raises:
      rl.config.ConfigError: an unknown method, optimizer, shaping or population design (the message lists what
        exists), a number out of range, or settings that do not fit together.
    """
    build.check(config)
    try:
        return _make_learner(config, env)
    except ValueError as error:
        raise config_lib.ConfigError(str(error)) from error


def _make_learner(config: ml_collections.ConfigDict, env: envs.Env) -> Learner:
    build.choose("method", config.method, dict.fromkeys(METHODS))
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    policy = Policy(env.action, tuple(config.policy.hidden), config.policy.stochastic)
    if config.method == "ppo":
        if build.mesh(config) is not None:
            raise config_lib.ConfigError("PPO runs on one device; got sizes of config.mesh above 1: set them to 1")
        settings = ppo.Settings(**config.ppo.to_dict(), normalize_observations=config.policy.normalize_observations)
        # Nearly uniform first actions: PPO has to explore by them.
        policy = dataclasses.replace(policy, stochastic=True, output_scale=0.01)
        critic = MLP(1, tuple(config.policy.hidden), output_scale=1.0)
        return Learner(
            state=ppo.init(env, policy, critic, settings, key),
            step=ppo.make_step(env, policy, critic, settings),
            actor=lambda state: state.params["actor"],
            policy=policy,
            show=("eval_return", "return_mean", "entropy", "kl"),
        )
    es = build.strategy(config, devices=build.mesh(config))
    play = evolution.make_play(
        env, policy, es, episodes=config.episodes, common_random_numbers=config.common_random_numbers
    )
    update = evolution.make_update(es)
    return Learner(
        state=evolution.init(env, policy, es, key, normalize_observations=config.policy.normalize_observations),
        step=functools.partial(_generation, play, update),
        actor=lambda state: state.es.params,
        policy=policy,
        show=("eval_return", "fitness_mean", "fitness_max", "length_mean"),
        update=update,
    )


def _generation(play: Callable, update: Callable, state: evolution.State) -> tuple[evolution.State, dict[str, Any]]:
    generation, played = play(state)
    state, learnt = update(state, generation)
    return state, played | learnt | {"generation": generation}


def train(config: ml_collections.ConfigDict, workdir: str | Path, tensorboard: bool = False) -> dict[str, Any]:
    """Runs or resumes a config in a folder.

    Returns:
      What `result.json` holds (`rl.run.Run.finish`); the score is the mean return over the final episodes, with its
      standard deviation and the lowest return beside it.
    """
    build.require(config, "env", "method")
    env = envs.make(config.env, config.max_steps or None)
    learner = make_learner(config, env)

    @jax.jit
    def evaluate(params: Any, normalizer: Normalizer | None, stream: jax.Array, step: jax.Array) -> rollout.Episode:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), stream), step)
        return rollout.evaluate(env, learner.policy, params, jax.random.split(key, config.eval_episodes), normalizer)

    run = Run(
        workdir,
        config,
        total_steps=config.steps,
        save_every=config.save_every,
        show=learner.show,
        logs=(generations.NAME,) if learner.update else (),
        tensorboard=tensorboard,
    )
    with run:
        state = run.restore(learner.state)
        while run.step < run.total_steps:
            state, metrics = learner.step(state)
            work = int(metrics.pop("env_steps"))
            step = run.step + 1
            if learner.update:
                run.append(generations.NAME, generations.pack(step, metrics.pop("generation")))
            if step % config.eval_every == 0 or step == run.total_steps:
                played = evaluate(learner.actor(state), state.normalizer, jnp.int32(1), jnp.int32(step))
                metrics["eval_return"] = jnp.mean(played.total)
            run.record(state, metrics, work=work)
        final = evaluate(learner.actor(state), state.normalizer, jnp.int32(2), jnp.int32(0)).total
        return run.finish(
            "mean return",
            float(final.mean()),
            env=config.env,
            method=config.method,
            episodes=config.eval_episodes,
            std=float(final.std()),
            lowest=float(final.min()),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    workdir, result = launch(train, argv, errors=(envs.EnvError,))
    print(
        f"{result['env']}, {result['method']}, seed {result['seed']}: mean return {result['score']:.2f} "
        f"(std {result['std']:.2f}, lowest {result['lowest']:.2f}) of the mean parameters over "
        f"{result['episodes']} fresh episodes, after {result['env_steps']} environment steps in "
        f"{result['seconds']:.1f} s"
    )
    plot.main([workdir, "--x=env_steps", "--y=eval_return"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
