"""The training that `experiments.fault_campaign` harms: evolution fits a vector within a second, and saves every step.

    python -m experiments.victim --config=experiments/victim.py --workdir=DIR

As small as a run can be that has all that a run has: optimizer state, keys, metrics, a log of generations, a result.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

import eggroll
from rl import generations
from rl.launch import launch
from rl.run import Run

SIZE = 12


def get_config() -> ml_collections.ConfigDict:
    """6 steps, of which every one is saved."""
    return ml_collections.ConfigDict(
        {"seed": 0, "steps": 6, "save_every": 1, "members": 8, "sigma": 0.1, "learning_rate": 0.1}
    ).lock()


def train(config: ml_collections.ConfigDict, workdir: str | Path, tensorboard: bool = False) -> dict[str, Any]:
    """Runs or resumes a config in a folder; the score is minus the squared distance to a random vector."""
    es = eggroll.strategy(
        optax.adam(config.learning_rate), population=eggroll.antithetic(config.members), sigma=config.sigma
    )
    shape, update = map(jax.jit, generations.cut(es))

    def score(params: jax.Array, goal: jax.Array) -> jax.Array:
        return -jnp.sum(jnp.square(params - goal))

    @jax.jit
    def start(key: jax.Array) -> tuple[eggroll.State, jax.Array]:
        return es.init(jnp.zeros(SIZE), key), jax.random.normal(key, (1, SIZE))

    @jax.jit
    def play(state: eggroll.State, goals: jax.Array) -> jax.Array:
        return es.evaluate(state, score, goals)

    run = Run(
        workdir, config, total_steps=config.steps, save_every=config.save_every, logs=(generations.NAME,),
        tensorboard=tensorboard,
    )  # fmt: skip
    with run:
        state, goals = start(jax.random.key(config.seed))
        state = run.restore(state)
        while run.step < run.total_steps:
            fitness, metrics = shape(play(state, goals))
            run.append(generations.NAME, generations.pack(run.step + 1, fitness))
            state, more = update(state, fitness)
            run.record(state, metrics | more, work=config.members)
        return run.finish("minus squared distance", -float(((state.params - goals[0]) ** 2).sum()))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    _, result = launch(train, argv)
    print(f"{result['measure']} {result['score']:.4f} in {result['seconds']:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
